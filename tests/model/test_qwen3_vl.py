"""Qwen3-VL: deepstack features, learned positions between the table's, and videos plane by plane behind their times."""

import copy

import pytest
import torch
from transformers import AutoConfig
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

from fastrm.config import ModelConfig, load_config
from fastrm.data.group import GroupSize, encode_group
from fastrm.data.record import VideoRef
from fastrm.errors import ConfigError, RecordError
from fastrm.evaluate.reward_model import RewardModel
from fastrm.model.architectures import PUBLISHED, find_architecture, meta_network
from fastrm.model.export import load_model, save_model
from fastrm.model.families import check_family
from fastrm.model.vision.qwen3_vl import PlacedShape
from fastrm.train.loop import train
from tests.helpers import stock
from tests.helpers.runs import tiny_config, write_rows
from tests.helpers.support import FAMILIES, make_image, make_model, make_record, pack_of
from tests.helpers.video_files import clip_rows, make_video

GRIDS = [(1, 2, 2), (1, 8, 6), (3, 4, 14), (1, 48, 48), (1, 100, 6)]


@pytest.fixture
def network():
    return make_model("qwen3_vl")


def _text_of(network, record) -> str:
    return network.encoder.tokenizer.decode(network.encoder.encode(record.responses[0]).tokens)


def test_learned_positions_are_stocks_to_the_bit():
    layout = PlacedShape(2, 0, (0,), 48).lay_out(GRIDS)
    corners, weights = get_vision_interpolation_indices_and_weights(
        torch.tensor(GRIDS), num_grid_per_side=48, mode="bilinear", align_corners=True, spatial_merge_size=2
    )
    assert torch.equal(layout.corners, corners)
    assert torch.equal(layout.weights, weights)


@pytest.mark.parametrize("pooling", ["anchor", "mean"])
def test_deepstack_features_reach_the_reward(pooling):
    network = make_model("qwen3_vl", pooling=pooling)
    records = [make_record(1, images=[make_image(90, 60)]), make_record(2)]
    pack, runner = pack_of(network, records), network._runner
    wanted = stock.stock_rewards(network, records)
    assert (network(pack) - wanted).abs().max() <= 1e-5
    features = runner.media_features
    runner.media_features = lambda *arguments: features(*arguments)._replace(deep=())
    without = network(pack)
    assert (without - wanted)[:2].abs().max() > 1e-4, "they change nothing here, so that nothing was tested"
    assert (without - wanted)[2:].abs().max() <= 1e-5, "they are of the group without an image"


def test_a_video_stands_behind_the_times_of_its_planes(network):
    # Ten frames in five seconds, of which six are read: numbers 0, 2, 4, 5, 7, 9.
    record = make_record(1, images=[make_video(10, 60, 60, rate=2)])
    response = record.responses[0]
    pads = "<|video_pad|>" * (network.encoder.encode(response).media[0].num_tokens)
    planes = [f"<{time} seconds><|vision_start|>{pads}<|vision_end|>" for time in ("0.5", "2.2", "4.0")]
    assert "".join(planes) in _text_of(network, record)


def test_an_odd_number_of_frames_repeats_the_last_one(network):
    record = make_record(1, images=[make_video(3, 60, 60, rate=1)])
    size = network.encoder.measure(record.responses[0].media[0])
    assert (size.frames, size.times) == (2, (0.5, 2.0))


def test_groups_share_a_video_to_its_last_plane(network):
    video = make_video(12, 90, 70)
    records = [make_record(n, num_responses=2, images=[video], prompt_words=40 + n) for n in range(2)]
    groups = [encode_group(record, network.encoder) for record in records]
    spans = groups[0].responses[0].media
    assert len(spans) == 3 and [span.first_token for span in spans] == [n * spans[0].num_tokens for n in range(3)]
    sizes = [GroupSize.of(group) for group in groups]
    assert {size.num_lead_tokens for size in sizes} == {spans[-1].stop}
    # One tree, whose root holds the video once.
    pack = pack_of(network, records)
    assert pack.parents.count(-1) == 1 and pack.lengths[0] >= spans[-1].stop
    pads = pack.input_ids == network.encoder.vision.placeholders[VideoRef]
    assert pads.sum() == network.encoder.measure(video).num_tokens
    assert pack.media_features.tolist() == list(range(int(pads.sum())))


def test_a_video_of_one_frame_is_refused_as_by_stock(network):
    with pytest.raises(RecordError, match="has 1 frames, the model reads videos of at least 2") as caught:
        encode_group(make_record(1, images=[make_video(1, 64, 48)]), network.encoder)
    assert caught.value.code == "VIDEO_TOO_SHORT"


def test_an_export_reads_media_as_before(network, tmp_path):
    save_model(network, tmp_path / "model")
    again = load_model(tmp_path / "model")
    records = [make_record(1, images=[make_video(9, 90, 70), make_image(60, 80)])]
    assert again.encoder.vision.video == network.encoder.vision.video
    packs = [pack_of(one, records) for one in (network, again)]
    assert torch.equal(packs[0].pixel_values, packs[1].pixel_values)
    again.set_kernels(torch.float32, attention="sdpa")
    assert torch.equal(network(packs[0]), again(packs[1]))


REFUSED = {
    "mrope_interleaved is false": ("text_config", {"rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": False}}),
    "num_position_embeddings is 26, wanted a square": ("vision_config", {"num_position_embeddings": 26}),
    r"deepstack_visual_indexes is \[0, 3\], wanted rising numbers of its 3 blocks": (
        "vision_config", {"deepstack_visual_indexes": [0, 3]}),
    r"deepstack_visual_indexes is \[1, 1\]": ("vision_config", {"deepstack_visual_indexes": [1, 1]}),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_read_otherwise_is_refused_by_name(message, monkeypatch):
    part, keys = REFUSED[message]
    options = copy.deepcopy(FAMILIES["qwen3_vl"])
    options[part].update(keys)
    monkeypatch.setitem(FAMILIES, "qwen3_vl", options)
    with pytest.raises(ConfigError, match=f"qwen3_vl: .*{message}"):
        make_model("qwen3_vl")


def test_models_with_experts_are_refused_by_name():
    with pytest.raises(ConfigError, match=r"model type 'qwen3_vl_moe' is not supported; wanted one of .*qwen3_vl"):
        check_family(AutoConfig.for_model("qwen3_vl_moe"))


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.startswith("Qwen3-VL")])
def test_published_sizes_are_those_of_the_names(name):
    network = meta_network(find_architecture(ModelConfig(path=name))[0], ModelConfig(path=name))
    text = sum(p.numel() for key, p in network.model.named_parameters() if key.startswith("language_model"))
    billions = float(name.split("-")[2].removesuffix("B"))
    assert 0.8 * billions < text / 1e9 < 1.1 * billions


def test_a_run_on_videos_trains_is_exported_and_scores(tmp_path):
    """Its first rewards are compared with the stock class, and so are those of the export."""
    rows = write_rows(tmp_path / "clips.jsonl", clip_rows(tmp_path))
    limits = {"video_frames": 8, "video_min_pixels": 784, "video_max_pixels": 28 * 28 * 12, "num_workers": 1}
    config = tiny_config(
        tmp_path, rows, run={"max_steps": 3}, data=limits, model={"init": FAMILIES["qwen3_vl"]}
    )
    summary = train(load_config(config))
    assert summary["quarantined"] == 0 and summary["steps"] == 3
    assert summary["tokens_unshared"] > 1.5 * summary["tokens_processed"], "a clip's planes are not shared"
    model = RewardModel.from_pretrained(tmp_path / "run" / "model")
    group = {"prompt": "What moves?", "videos": [str(tmp_path / "3.mp4")], "responses": ["up", "down"]}
    assert len(set(model.score([group])[0])) == 2

"""Conversations with videos: tokens, positions, packs, rewards and gradients are those of the stock model alone."""

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version

from fastrm.data.balance import CostModel
from fastrm.data.batching import PackPlan
from fastrm.data.group import GroupMedium, GroupSize, encode_group
from fastrm.data.loader import PackBuilder
from fastrm.data.media.format import MediaSize, MediaSpan
from fastrm.data.media.qwen2_vl import _say_where_stock_differs, load_qwen_format, mrope_positions
from fastrm.data.media.videos import VideoSettings
from fastrm.data.packing import EncodedGroup
from fastrm.data.record import ImageRef, Message, Preference, Record, Response, VideoRef
from fastrm.errors import RecordError
from fastrm.limits import MediaLimits
from fastrm_kernels import preference_loss
from tests.helpers import stock
from tests.helpers.support import make_image, make_model, make_record, make_tokenizer, pack_of
from tests.helpers.video_files import decode_all, encode_video, make_video, moving_frames, write_frames

needs_stock_times = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"),
    reason="transformers 5.17 cuts the seconds between planes of a video to whole numbers; 5.18 and later do not",
)
FAMILIES = [pytest.param("qwen2_5_vl", marks=needs_stock_times), "qwen2_vl", "qwen3_vl"]
# Frames of the shortest video that stock reads, where it is not one.
FEWEST = {"qwen3_vl": 2}


def _cases(fewest=1):
    """Videos of many frames, few and one; long in time and short; with images, alone, twice, and as a shared root."""
    long, short = make_video(40, 90, 70, 1, rate=2), make_video(5, 60, 120, 2, rate=60)
    single, image = make_video(fewest, 64, 48, 3), make_image(60, 80)
    return [
        make_record(1, num_responses=8, images=[long], response_words=(1, 12)),
        make_record(2, num_responses=3, images=[long], prompt_words=6),  # another question about the same video
        make_record(3, images=[image, short, long]),
        make_record(4),
        make_record(5, images=[short, single, short]),
        make_record(6, images=[image]),
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_positions_equal_the_stock_ones(family):
    network = make_model(family)
    spread = set()
    for record in _cases(fewest=FEWEST.get(family, 1)):
        for response in record.responses[:1]:
            inputs = stock.stock_inputs(network.encoder, response)
            encoded = network.encoder.encode(response)
            assert encoded.tokens.tolist() == inputs["input_ids"][0].tolist()
            if not encoded.media:
                assert encoded.positions is None
                continue
            named = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
            expected, _ = network.model.get_rope_index(
                inputs["input_ids"], inputs["mm_token_type_ids"], **{k: inputs[k] for k in named if k in inputs}
            )
            assert torch.equal(torch.from_numpy(encoded.positions), expected[:, 0])
            for span in encoded.media:
                spread.add(int(np.ptp(encoded.positions[0, span.start : span.stop])))
    # A plane's step in time is 1 for Qwen2-VL, and follows the seconds for Qwen2.5-VL; Qwen3-VL writes times as text.
    assert spread == {"qwen2_vl": {0, 2}, "qwen2_5_vl": {0, 53}, "qwen3_vl": {0}}[family]


@needs_stock_times
def test_times_of_planes_are_rounded_as_by_the_stock_model():
    network = make_model("qwen2_5_vl")
    rng = np.random.default_rng(0)
    video = network.encoder.vision.placeholders[VideoRef]
    for seconds in (*rng.uniform(0.01, 9, 200), 1 / 3, 0.1, 2.0):
        grid = torch.tensor([[16, 4, 6]])
        ids = torch.tensor([[5, 6, *[video] * 96, 8]])
        expected, _ = network.model.get_rope_index(
            ids, (ids == video).int() * 2, video_grid_thw=grid, second_per_grid_ts=torch.tensor([seconds])
        )
        span = MediaSpan(2, MediaSize(16, 2, 3, float(seconds)), None)
        tokens_per_second = network.model.config.vision_config.tokens_per_second
        assert torch.equal(torch.from_numpy(mrope_positions(99, [span], tokens_per_second)), expected[:, 0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("share", [True, False], ids=["tree", "rows"])
def test_packed_equals_alone_in_stock_transformers(family, share):
    network, records = make_model(family), _cases(fewest=FEWEST.get(family, 1))
    loss, rewards = stock.stock_loss(network, records)
    loss.backward()
    expected = {name: p.grad.clone() for name, p in network.named_parameters()}
    network.zero_grad(set_to_none=True)

    pack = pack_of(network, records, share)
    packed = network(pack)
    ours = preference_loss(packed, pack.edges, center=stock.CENTER)
    ours.backward()
    assert (packed - rewards).abs().max() <= 1e-5
    assert abs(ours - loss) <= 1e-5
    for name, parameter in network.named_parameters():
        assert expected[name].abs().max() > 0, f"{name}: the oracle's gradient is zero"
        assert (parameter.grad - expected[name]).abs().max() <= 1e-5, name


@needs_stock_times
def test_compiled_layers_and_checkpointing_read_videos():
    network, records = make_model("qwen2_5_vl"), _cases()[:3]
    rewards = stock.stock_rewards(network, records)
    network.compile_layers("eager")
    network.use_activation_checkpointing("full")
    network.set_kernels(torch.float32, attention="sdpa")
    assert (network(pack_of(network, records)) - rewards).abs().max() <= 1e-5


def test_a_reward_depends_on_the_order_of_frames_and_on_their_times():
    network = make_model("qwen2_5_vl")
    frames = moving_frames(6, 56, 56)
    videos = [
        VideoRef(data=encode_video(content, rate=rate))
        for content, rate in ((frames, 1), (frames[::-1], 1), (frames, 9))
    ]
    rewards = [network(pack_of(network, [make_record(1, images=[video])]))[0].item() for video in videos]
    assert len({round(reward, 6) for reward in rewards}) == 3


def test_a_video_is_decoded_and_encoded_once_in_a_pack(monkeypatch):
    network = make_model("qwen2_5_vl")
    video, other = make_video(12, 90, 70), make_video(4, 60, 60, 1)
    records = [make_record(n, num_responses=3, images=[video, *extra]) for n, extra in enumerate([(), (other,), ()])]
    cut = []
    original = type(network.encoder.vision).cut
    monkeypatch.setattr(
        type(network.encoder.vision), "cut", lambda self, ref, *rest: cut.append(ref.key) or original(self, ref, *rest)
    )
    pack = pack_of(network, records)
    assert cut == [video.key, other.key]
    assert len(pack.media_grids) == 2
    # One tree: its root holds the video's tokens once, whatever the question.
    num_tokens = sum(network.encoder.measure(ref).num_tokens for ref in (video, other))
    assert pack.parents.count(-1) == 1
    assert (pack.input_ids == network.encoder.vision.placeholders[VideoRef]).sum() == num_tokens
    alone = pack_of(network, records[:1])
    assert (network(pack)[:3] - network(alone)).abs().max() <= 1e-6


def test_still_images_keep_one_frame_beside_a_video():
    network = make_model("qwen2_5_vl")
    image, video = make_image(60, 80), make_video(5, 64, 48)
    pack = pack_of(network, [make_record(1, images=[video, image])])
    vision = network.encoder.vision
    sizes = [network.encoder.measure(ref) for ref in (image, video)]
    assert pack.patches.shape == (4 * sizes[0].num_tokens, 3 * 14 * 14)
    assert pack.video_patches.shape == (4 * sizes[1].num_tokens, 3 * 2 * 14 * 14)
    assert pack.media_grids == [(size.frames, 2 * size.height, 2 * size.width) for size in sizes]
    stills = vision.processor(images=[stock.Image.open(stock.io.BytesIO(image.data))], return_tensors="pt")
    moving = stock.stock_videos(network.encoder, [video])
    assert torch.equal(pack.pixel_values, torch.cat([stills["pixel_values"], moving["pixel_values_videos"]]))
    ids = pack.input_ids[pack.media_rows]
    numbers = {kind: ids == vision.placeholders[kind] for kind in (ImageRef, VideoRef)}
    assert sorted(pack.media_features[numbers[ImageRef]].tolist()) == list(range(sizes[0].num_tokens))
    assert pack.media_features[numbers[VideoRef]].min() == sizes[0].num_tokens
    moved = pack.to("meta")
    assert moved.video_patches.device.type == moved.patches.device.type == "meta"


def test_a_folder_of_frames_gives_the_patches_of_the_file(tmp_path):
    network = make_model("qwen2_5_vl")
    video = make_video(31, 90, 70)
    folder = write_frames(tmp_path / "clip", decode_all(video.data))
    packs = [pack_of(network, [make_record(1, images=[ref])]) for ref in (video, folder)]
    assert torch.equal(packs[0].video_patches, packs[1].video_patches)
    assert torch.equal(packs[0].input_ids, packs[1].input_ids)


def test_a_prepared_group_counts_the_planes_of_a_video():
    network = make_model("qwen2_5_vl")
    video = make_video(9, 90, 70)
    record = make_record(1, images=[video])
    size = network.encoder.measure(video)
    group = GroupSize.of(encode_group(record, network.encoder))
    assert size.frames == 3
    assert group.media == (GroupMedium(video.key, size.height, size.width, size.frames),)
    cost = CostModel(0.0, per_media_token=1.0, per_media_pair=0.1, per_window_pair=0.01, window=2)
    assert cost.of_group(group) == pytest.approx(3 * cost.of_medium(size.height, size.width))


def test_a_video_that_has_changed_is_refused(tmp_path):
    network = make_model("qwen2_5_vl")
    path = tmp_path / "clip.mp4"
    path.write_bytes(make_video(9, 90, 70).data)
    records = [make_record(1, images=[VideoRef(path=str(path))])]
    plan = PackPlan((0,), 0, True)
    builder = PackBuilder(records, network.encoder, True)
    assert builder[plan].pack is not None
    path.write_bytes(make_video(3, 90, 70).data)
    (refusal,) = builder[plan].refused
    assert refusal.code == "VIDEO_CHANGED" and "clip.mp4" in refusal.message
    assert not PackBuilder(records, network.encoder.looking_anew(), True)[plan].refused


def test_what_a_model_does_not_read_is_refused():
    video, image = make_video(3, 64, 48), make_image(30, 30)
    with pytest.raises(RecordError, match="has a video but the model reads text only") as caught:
        encode_group(make_record(1, images=[video]), make_model("qwen2").encoder)
    assert caught.value.code == "VIDEO_UNSUPPORTED"
    network = make_model("qwen2_5_vl")
    network.encoder.vision.placeholders = {ImageRef: network.encoder.vision.placeholders[ImageRef]}
    assert isinstance(encode_group(make_record(1, images=[image]), network.encoder), EncodedGroup)
    with pytest.raises(RecordError, match="has a video but the model reads no videos"):
        encode_group(make_record(1, images=[video]), network.encoder)
    narrow = make_video(2, 2000, 8)
    with pytest.raises(RecordError, match="is 2000 x 8; the model accepts ratios up to 200; crop it") as caught:
        encode_group(make_record(1, images=[narrow]), make_model("qwen2_5_vl").encoder)
    assert caught.value.code == "VIDEO_ASPECT"


def test_a_template_that_swaps_or_drops_media_is_refused():
    encoder = make_model("qwen2_5_vl").encoder
    question = Message("user", (make_image(30, 30), make_video(3, 64, 48), "Why?"))
    record = Record("x", (Response((question, Message("assistant", ("So",)))),), (Preference(0, 0),), "test", "test:1")
    template = encoder.tokenizer.chat_template
    for wrong, message in (
        (template.replace("<|image_pad|>", "<|video_pad|>"), "made placeholders other than the record's media"),
        (template.replace("<|vision_start|><|video_pad|><|vision_end|>", ""), "left a video out"),
    ):
        encoder.tokenizer.chat_template = wrong
        with pytest.raises(RecordError, match=message):
            encode_group(record, encoder)


def test_settings_of_videos_survive_an_export(tmp_path):
    network = make_model("qwen2_5_vl")
    network.encoder.vision.video = VideoSettings(10, 3000, 9000, 3.0)
    network.encoder.vision.save(tmp_path)
    vision = load_qwen_format(network.model.config.vision_config, make_tokenizer(), str(tmp_path))
    assert vision.video == network.encoder.vision.video
    video = make_video(40, 90, 70)
    assert vision.measure(video, MediaLimits()) == network.encoder.measure(video)
    given = load_qwen_format(network.model.config.vision_config, make_tokenizer(), str(tmp_path), VideoSettings())
    assert given.video == VideoSettings()


def test_an_old_transformers_whose_own_times_are_others_is_named_once(monkeypatch):
    vision, video = make_model("qwen2_5_vl").encoder.vision, make_video(5, 60, 60, rate=60)
    monkeypatch.setattr("transformers.__version__", "5.17.0")
    _say_where_stock_differs.cache_clear()
    with pytest.warns(UserWarning, match=r"5\.17\.0 rounds the seconds .* use 5\.18 or newer") as said:
        for _ in range(3):
            vision.measure(video, MediaLimits())
    _say_where_stock_differs.cache_clear()
    assert len(said) == 1

"""From image files to pixel values: uint8 patches from the workers, the rest on the training device."""

import io
import os
import resource
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image

from fastrm.config import load_config
from fastrm.data import loader
from fastrm.data.batching import PackPlan
from fastrm.data.loader import LoadedPack, PackBuilder, Waiting, load_packs
from fastrm.data.media.format import FormatSettings
from fastrm.data.media.images import decode_image
from fastrm.data.media.qwen2_vl import QwenFormat
from fastrm.data.packing import Pack
from fastrm.data.record import ImageRef
from fastrm.errors import ConfigError
from fastrm.evaluate.accuracy import PreferenceMeter
from fastrm.limits import MediaLimits
from fastrm.model.backbone import PackLayouts
from fastrm.model.export import make_encoder
from fastrm.train.loop import train
from fastrm.train.metrics import read_rows
from fastrm_kernels import preference_loss
from tests.helpers.own_process import run_alone
from tests.helpers.pool_jobs import exit_codes_of_workers
from tests.helpers.runs import tiny_config
from tests.helpers.support import make_image, make_model, make_record, pack_of


def _encoded(image: Image.Image, kind: str = "PNG", **options) -> ImageRef:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return ImageRef(data=buffer.getvalue())


def _odd_images():
    """120 images of odd sizes, shapes and modes, with the limits and normalisation that they are read with."""
    rng = np.random.default_rng(0)
    for number in range(120):
        width, height = (int(size) for size in rng.integers(3, 420, 2))
        if number % 10 == 0:  # up to 197 : 1; the processor refuses more than 200
            width, height = (5 * number + 40, 3) if number % 20 else (3, 5 * number + 40)
        pixels = rng.integers(0, 256, (height, width, 4), dtype=np.uint8)
        image = Image.fromarray(pixels[:, :, :3])
        mode = ("RGB", "L", "P", "RGBA", "1", "LA")[number % 6]
        if "A" in mode:
            image.putalpha(Image.fromarray(pixels[:, :, 3]))
        lossy = number % 7 == 3 and mode in ("RGB", "L")
        yield number, _encoded(image.convert(mode), "JPEG" if lossy else "PNG")


@pytest.mark.parametrize(
    "limits",
    [(56 * 56, 28 * 28 * 1280), (28 * 28 * 16, 28 * 28 * 20), (28 * 28, 28 * 28 * 5)],
    ids=["wide", "up", "down"],
)
def test_pixel_values_equal_those_of_the_stock_processor(limits):
    encoder = make_model("qwen2_5_vl").encoder
    mean, std = ([0.4, 0.5, 0.6], [0.3, 0.2, 0.1]) if limits[0] == 784 else (None, None)
    settings = FormatSettings(*limits, image_mean=mean, image_std=std)
    config = make_model("qwen2_5_vl").model.config
    vision = make_encoder(config, encoder.tokenizer, None, "last_token", MediaLimits(), settings).vision
    form, seen = vision.patch_format, set()
    for number, ref in _odd_images():
        image = decode_image(ref, MediaLimits())
        stock = vision.processor(images=[image], return_tensors="pt")
        patches, grid = vision.cut(ref, vision.measure(ref, MediaLimits()), MediaLimits())
        assert patches.dtype == np.uint8
        assert [list(grid)] == stock["image_grid_thw"].tolist(), number
        ours = form.normalize(torch.from_numpy(patches))
        assert ours.dtype == torch.float32 and torch.equal(ours, stock["pixel_values"]), number
        seen.add(grid)
    assert len(seen) >= (20 if limits[1] > 10_000 else 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_that_lies_is_read_as_stock_loaders_turn_it(tmp_path, orientation):
    from transformers.image_utils import load_image

    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.random.default_rng(0).integers(0, 256, (40, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.jpg", exif=exif)
    vision, ref = make_model("qwen2_5_vl").encoder.vision, ImageRef(path=str(tmp_path / "photo.jpg"))
    stock = vision.processor(images=[load_image(ref.path)], return_tensors="pt")
    size = vision.measure(ref, MediaLimits())
    assert (size.height, size.width) == ((3, 1) if orientation > 4 else (1, 3))
    patches, grid = vision.cut(ref, size, MediaLimits())
    assert [list(grid)] == stock["image_grid_thw"].tolist()
    assert torch.equal(vision.patch_format.normalize(torch.from_numpy(patches)), stock["pixel_values"])


@pytest.mark.parametrize(
    "settings",
    [
        {"do_rescale": False}, {"do_normalize": False}, {"rescale_factor": 1 / 127.5}, {"resample": 2},
        {"patch_size": 16, "merge_size": 1}, {"temporal_patch_size": 1},
    ],
    ids=lambda settings: next(iter(settings)),
)  # fmt: skip
def test_every_setting_of_the_processor_counts(settings):
    vision = make_model("qwen2_5_vl").encoder.vision
    usual = vision.cut(make_image(100, 75), vision.measure(make_image(100, 75), MediaLimits()), MediaLimits())
    usual_form = vision.patch_format
    for name, value in settings.items():
        setattr(vision.processor, name, value)
    form = vision.patch_format
    now = vision.cut(make_image(100, 75), vision.measure(make_image(100, 75), MediaLimits()), MediaLimits())
    assert form != usual_form or not np.array_equal(now.values, usual.values)
    for seed, size in enumerate([(100, 75), (31, 300)]):
        ref = make_image(*size, seed)
        image = decode_image(ref, MediaLimits())
        patches, _ = vision.cut(ref, vision.measure(ref, MediaLimits()), MediaLimits())
        stock = vision.processor(images=[image], return_tensors="pt")["pixel_values"]
        assert torch.equal(form.normalize(torch.from_numpy(patches)), stock)


@pytest.mark.parametrize("settings", [{"do_resize": False}, {"resample": None}])
def test_a_processor_that_does_not_resize_is_refused(settings):
    vision = make_model("qwen2_5_vl").encoder.vision
    for name, value in settings.items():
        setattr(vision.processor, name, value)
    with pytest.raises(ConfigError, match=r"do_resize is .* and resample is .*correct preprocessor_config\.json"):
        QwenFormat(vision.processor, vision.placeholders)


@pytest.mark.gpu
def test_values_on_a_gpu_are_those_on_the_cpu():
    form = make_model("qwen2_5_vl").encoder.vision.patch_format
    patches = torch.arange(256, dtype=torch.uint8).repeat_interleave(3 * form.side**2).view(256, -1)
    assert torch.equal(form.normalize(patches.cuda()).cpu(), form.normalize(patches))


def test_a_patch_travels_in_an_eighth_of_the_bytes():
    network = make_model("qwen2_5_vl")
    pack = pack_of(network, [make_record(1, images=[make_image(112, 90)])])
    assert pack.pixel_values.nbytes == 8 * pack.patches.nbytes
    assert pack.patches.nbytes == pack.patches.shape[0] * 3 * 14 * 14


def test_images_of_a_pack_stand_in_their_order():
    network = make_model("qwen2_5_vl")
    refs = [make_image(56, 84, 1), make_image(140, 28, 2), make_image(30, 33, 3)]
    pack = pack_of(network, [make_record(1, images=refs[:2]), make_record(2, images=refs[2:])])
    images = [decode_image(ref, MediaLimits()) for ref in refs]
    stock = network.encoder.vision.processor(images=images, return_tensors="pt")
    assert torch.tensor(pack.media_grids).equal(stock["image_grid_thw"])
    assert torch.equal(pack.pixel_values, stock["pixel_values"])
    assert torch.equal(pack.media_features, torch.arange((2 * 3) + (5 * 1) + (1 * 1)))
    assert (pack.input_ids[pack.media_rows] == network.encoder.vision.placeholders[ImageRef]).all()


def _padded(network, records, multiple):
    builder = PackBuilder(records, network.encoder, True, multiple=multiple)
    return builder[PackPlan(tuple(range(len(records))), 0, True)].pack


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen2"])
@pytest.mark.parametrize("fused", [False, True])
def test_padding_changes_no_reward_and_no_gradient(family, fused):
    network = make_model(family)
    if fused:
        network.fuse_projections()
    images = [make_image(112, 90)] if family != "qwen2" else []
    records = [make_record(1, num_responses=3, images=images), make_record(2, prompt="Three more words, please")]
    results = []
    for multiple in (1, 16, 1024):
        pack = _padded(network, records, multiple)
        assert pack.input_ids.shape[0] % multiple == 0
        assert pack.input_ids.shape[0] - pack.num_padding_tokens == pack.num_tokens
        rewards = network(pack)
        preference_loss(rewards, pack.edges).backward()
        gradients = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
        network.zero_grad(set_to_none=True)
        meter = PreferenceMeter()
        meter.add(pack, rewards.detach())
        results.append((rewards.detach(), gradients, meter.num_tokens, pack.num_padding_tokens))
    assert results[0][3] == 0 < results[1][3] < 16 < results[2][3]
    for rewards, gradients, num_tokens, _ in results[1:]:
        assert (rewards - results[0][0]).abs().max() <= 1e-6
        assert num_tokens == results[0][2]
        assert gradients.keys() == results[0][1].keys()
        for name, gradient in gradients.items():
            assert (gradient - results[0][1][name]).abs().max() <= 1e-6, name


def test_a_full_row_gets_no_padding():
    network = make_model("qwen2")
    records = [make_record(1)]
    num_tokens = _padded(network, records, 1).num_tokens
    pack = _padded(network, records, num_tokens)
    assert pack.num_padding_tokens == 0 and len(pack.lengths) == len(_padded(network, records, 1).lengths)


def test_padding_is_a_tree_of_its_own():
    network = make_model("qwen2_5_vl")
    records = [make_record(1), make_record(2)]
    plain, pack = _padded(network, records, 1), _padded(network, records, 64)
    count = pack.num_padding_tokens
    assert pack.lengths == [*plain.lengths, count] and pack.parents == [*plain.parents, -1]
    assert torch.equal(pack.position_ids, torch.cat([plain.position_ids, torch.arange(count).expand(3, -1)], dim=1))
    assert torch.equal(pack.input_ids[:-count], plain.input_ids)
    before = network(pack)
    pack.input_ids[-count:] = 7
    assert torch.equal(network(pack), before)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_layouts_made_in_a_worker_are_those_made_here(num_workers):
    network = make_model("qwen2_5_vl")
    records = [make_record(n, num_responses=3, images=[make_image(60 + n, 90, n)]) for n in range(6)]
    plans = [PackPlan((n, n + 1), n, False) for n in range(0, 6, 2)]
    builder = PackBuilder(records, network.encoder, True, lay_out=network.lay_out)
    plain = PackBuilder(records, network.encoder, True)
    for loaded, plan in zip(load_packs(builder, plans, num_workers), plans, strict=True):
        assert isinstance(loaded.pack.layouts, PackLayouts)
        assert torch.equal(network(loaded.pack), network(plain[plan].pack))
    # They are used, not made again.
    loaded.pack.layouts = plain[plans[0]].pack
    with pytest.raises(AttributeError):
        network(loaded.pack)


def test_a_pack_moves_and_keeps_everything():
    network = make_model("qwen2_5_vl")
    builder = PackBuilder(
        [make_record(1, images=[make_image(60, 90)])], network.encoder, True, multiple=16, lay_out=network.lay_out
    )
    pack = builder[PackPlan((0,), 0, True)].pack
    moved = pack.to("meta")
    for name, value in vars(pack).items():
        if isinstance(value, torch.Tensor):
            assert getattr(moved, name).device.type == "meta", name
        elif name != "layouts":
            assert getattr(moved, name) == value, name
    assert moved.layouts.tree.device.type == moved.layouts.vision.positions.device.type == "meta"
    assert pack.to("cpu") is pack


def test_every_tensor_of_a_pack_is_pinned(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(id(self)) or self)
    network = make_model("qwen2_5_vl")
    builder = PackBuilder([make_record(1, images=[make_image(60, 90)])], network.encoder, True, lay_out=network.lay_out)
    loaded = builder[PackPlan((0,), 0, True)]
    again = loaded.pin_memory()
    assert isinstance(again, LoadedPack) and isinstance(again.pack, Pack)
    tensors = [value for value in vars(loaded.pack).values() if isinstance(value, torch.Tensor)]
    layouts = loaded.pack.layouts
    tensors += [layouts.tree.cu_seqlens_q, layouts.anchors.key_index, layouts.vision.positions, layouts.vision.order]
    assert {id(tensor) for tensor in tensors} <= set(pinned)


def test_waiting_is_counted(monkeypatch):
    network = make_model("qwen2")
    builder = PackBuilder([make_record(1)], network.encoder, True)
    clock = iter(range(100))
    monkeypatch.setattr("fastrm.data.loader.time.perf_counter", lambda: next(clock))
    waiting = Waiting()
    assert len(list(load_packs(builder, [PackPlan((0,), 0, True)] * 3, 0, waiting=waiting))) == 3
    assert waiting.take() == 4  # three packs, and the end
    assert waiting.take() == 0


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_page_locked_memory_is_not_asked_for_without_an_accelerator():
    with pytest.raises(AssertionError, match="page-locked memory is for an accelerator"):
        next(load_packs(PackBuilder([], make_model("qwen2").encoder, True), [], 0, pin_memory=True))


def test_a_worker_that_a_thread_of_a_pool_has_begun_ends_without_an_error():
    """A program that scores in such threads hears of every worker that fails, in its main thread."""
    codes = run_alone(exit_codes_of_workers).value
    assert len(codes) == 2 and {0, -signal.SIGTERM} >= set(codes)  # SIGTERM: on a busy machine, to one slow to end


def test_many_packs_may_be_held_at_once():
    """Every tensor from a worker is an open file, and a step keeps its packs until its update."""
    network = make_model("qwen2_5_vl")
    builder = PackBuilder([make_record(1, images=[make_image(60, 90)])], network.encoder, True, lay_out=network.lay_out)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = len(os.listdir("/proc/self/fd")) + 100
    resource.setrlimit(resource.RLIMIT_NOFILE, (low, hard))
    packs = []
    try:
        packs += load_packs(builder, [PackPlan((0,), 0, True)], 1)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > low  # else the next line waits for ever
        packs += load_packs(builder, [PackPlan((0,), 0, True)] * 9, 1)
        assert len(packs) == 10 and len(os.listdir("/proc/self/fd")) > low
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] == hard
    finally:
        packs.clear()  # before the limit falls again
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_run_logs_the_share_of_time_that_it_waits(tmp_path, monkeypatch):
    """By seconds that were slept at least: other work on the machine makes waiting longer, and computing too."""
    encode, delay_s = loader.encode_group, 0.1
    monkeypatch.setattr(loader, "encode_group", lambda *arguments: time.sleep(delay_s) or encode(*arguments))
    summary = train(load_config(tiny_config(tmp_path, "digits:train", run={"max_steps": 3, "log_every": 3})))
    (row,) = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert 0.0 < row["data_wait_share"] < 1.0
    assert row["data_wait_share"] * summary["train_seconds"] >= 3 * delay_s  # a group a step at least


def test_a_worker_reports_everything_but_a_killed_training_process(capsys):
    for error in (ConnectionResetError("gone"), EOFError(), ValueError("named")):
        loader._report_but_lost_connections(type(error), error, None)
    assert capsys.readouterr().err.strip() == "ValueError: named"

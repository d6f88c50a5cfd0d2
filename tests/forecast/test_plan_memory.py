"""The plan's peak memory against real training steps: what autograd keeps, and what the process grows by.

    pytest tests/forecast/test_plan_memory.py             four shapes
    pytest tests/forecast/test_plan_memory.py -m slow     the others

A table of all predictions and measurements ends the output.
"""

import copy

import pytest
import torch

import fastrm.model.layers
from fastrm.config import Config, ModelConfig, PrecisionConfig
from fastrm.forecast.fake_step import FakeSteps
from fastrm.forecast.full_pack import PackShape
from fastrm_kernels.tree_attention.gather import take_rows
from tests.helpers import memory_runs, support

TOLERANCE = 0.10
VISION = {
    "depth": 4, "hidden_size": 256, "intermediate_size": 768, "num_heads": 4, "window_size": 112,
    "fullatt_block_indexes": [1],
}  # fmt: skip


def text(hidden, layers, intermediate=None, vocabulary=2048):
    return {
        "hidden_size": hidden, "intermediate_size": intermediate or 3 * hidden, "num_hidden_layers": layers,
        "vocab_size": vocabulary,
    }  # fmt: skip


MEDIUM = {"text": text(512, 6, vocabulary=8192), "load": [2, 80, 40, 0]}
SEES = {**MEDIUM, "vision": VISION, "load": [2, 20, 40, 280]}
# What dominates: activations; gradients and states; one layer run again; copies of weights.
DEFAULT = {
    "deep and narrow": {"text": text(256, 16), "load": [2, 80, 40, 0]},
    "shallow and wide, selective": {"text": text(768, 3, 3072, 8192), "load": [1, 80, 40, 0], "mode": "selective"},
    "long pack, full": {"text": text(256, 6, 1024), "load": [4, 160, 80, 0], "mode": "full"},
    "frozen tower, bf16": {**SEES, "freeze": ["vision"], "dtype": "bf16"},
    "critic": {**MEDIUM, "text": text(512, 3, vocabulary=16_384), "paradigm": "critic"},
}
TILES = {
    "num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4,
    "image_size": [224, 224], "attention_bias": True,
}  # fmt: skip
TILED = {**MEDIUM, "tiles": TILES, "load": [2, 20, 40, 448]}
SLOW = {
    "mean": {**MEDIUM, "pooling": "mean"},
    "mean, bf16, full": {**MEDIUM, "pooling": "mean", "dtype": "bf16", "mode": "full"},
    "tiles": TILED,
    "tiles, bf16, selective": {**TILED, "dtype": "bf16", "mode": "selective"},
    "tiles, frozen tower, full": {**TILED, "freeze": ["vision"], "mode": "full"},
    "one pack": {**MEDIUM, "packs": 1},
    "judge that sees, bf16, full": {**SEES, "paradigm": "judge", "dtype": "bf16", "mode": "full"},
    "bf16, selective": {**MEDIUM, "dtype": "bf16", "mode": "selective"},
    "bf16, full": {**MEDIUM, "dtype": "bf16", "mode": "full"},
    "bf16, fused": {**MEDIUM, "dtype": "bf16", "fuse": True},
    "bf16 weights": {**MEDIUM, "dtype": "bf16", "weights": "bf16"},
    "8-bit states": {**MEDIUM, "states": "8bit"},
    "trained tower": SEES,
    "trained tower, selective": {**SEES, "mode": "selective"},
    "large image": {**SEES, "load": [1, 20, 40, 560], "freeze": ["vision"]},
    "long pack": {"text": text(256, 4, 1024), "load": [4, 250, 120, 0]},
    "60 M, long pack": {"text": text(640, 10, 1920), "load": [3, 160, 80, 0]},
    "120 M, bf16, full": {"text": text(1024, 8, 3072, 8192), "load": [2, 80, 40, 0], "mode": "full", "dtype": "bf16"},
    "230 M, wide": {"text": text(1536, 6, 5120, 8192), "load": [1, 80, 40, 0]},
}


@pytest.fixture(scope="module")
def table(request):
    """Rows of (case, predicted, measured, when); printed at the end."""
    rows = []
    yield rows
    lines = [f"{'peak memory, MiB':<30}{'predicted':>10}{'measured':>10}{'ratio':>8}  fullest in"]
    for name, predicted, measured, when in rows:
        lines.append(
            f"{name:<30}{predicted / 2**20:>10.1f}{measured / 2**20:>10.1f}{predicted / measured:>8.3f}  {when}"
        )
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n" + "\n".join(lines))


@pytest.fixture(scope="module")
def default_runs():
    return dict(zip(DEFAULT, memory_runs.measure(list(DEFAULT.values())), strict=True))


@pytest.fixture(scope="module")
def slow_runs():
    return dict(zip(SLOW, memory_runs.measure(list(SLOW.values())), strict=True))


def check(name, case, run, table):
    peak = memory_runs.predict(case, run)
    table.append((name, peak.total, run["peak_bytes"], peak.when))
    state = peak.weights + peak.states + peak.gradients * (case.get("packs", 2) > 1)
    assert state == pytest.approx(run["state_bytes"], rel=0.03)
    assert peak.total == pytest.approx(run["peak_bytes"], rel=TOLERANCE)


@pytest.mark.parametrize("name", DEFAULT)
def test_peak_memory_is_that_of_a_real_step(name, default_runs, table):
    check(name, DEFAULT[name], default_runs[name], table)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_peak_memory_is_that_of_a_real_step_of_other_shapes(name, slow_runs, table):
    check(name, SLOW[name], slow_runs[name], table)


class _KeepsLikeFlash(torch.autograd.Function):
    """Keeps what FlashAttention keeps (query, key, value, output) and multiplies nothing."""

    @staticmethod
    def forward(ctx, query, key, value):
        output = query.clone()
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx, gradient):
        _, key, value, _ = ctx.saved_tensors
        return gradient, torch.zeros_like(key), torch.zeros_like(value)


def _attend_in_place(query, key, value, layout, **_):
    """As our Triton kernels: keys and values are read where they are."""
    return _KeepsLikeFlash.apply(query, key, value)


def _attend_with_copies(query, key, value, layout, **_):
    """As torch's varlen attention: shared keys and values are copied for each run."""
    return _KeepsLikeFlash.apply(query, take_rows(key, layout.key_index), take_rows(value, layout.key_index))


ATTENTIONS = {"triton": _attend_in_place, "varlen": _attend_with_copies, "eager": None}


def _kept_by_autograd(network, pack, bf16):
    """Bytes of all tensors that a forward pass leaves for the backward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            # The tensor itself is kept too: a freed address would be given out again.
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        assert network(pack).requires_grad
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        ("qwen2", "triton"), ("qwen2_vl", "varlen"), ("qwen3_vl", "triton"),
        *(("qwen2_5_vl", attention) for attention in ATTENTIONS),
    ],
)
@pytest.mark.parametrize("fused", [False, True], ids=["stock", "fused"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_activations_are_what_autograd_keeps(family, bf16, fused, attention, monkeypatch):
    network = _wide_network(family, monkeypatch)
    settings = ModelConfig(init={"model_type": family}, tokenizer="none", fuse_projections=fused)
    config = Config(model=settings, precision=PrecisionConfig(dtype="bf16" if bf16 else "fp32"))
    images = () if family == "qwen2" else (support.make_image(200, 120),)
    pack = support.pack_of(network, [support.make_record(1, prompt_words=300, images=images)])
    num_image_rows = 0 if pack.media_rows is None else len(pack.media_rows)
    shape = PackShape(
        tuple(pack.lengths), tuple(pack.parents), tuple(pack.anchor_rows), tuple(pack.media_grids), num_image_rows
    )
    steps = FakeSteps(copy.deepcopy(network).to("meta"))
    lives, _ = steps.lives(config, shape, attention, alone=True)
    # Those of the pack's own tensors were there before any weight was read.
    expected = sum(life.num_bytes for life in lives if life.part and outlives_forward(life))
    if fused:
        network.fuse_projections()
    if ATTENTIONS[attention] is not None:
        monkeypatch.setattr(fastrm.model.layers, "tree_attention", ATTENTIONS[attention])
    assert _kept_by_autograd(network, pack, bf16) == pytest.approx(expected, rel=0.04)


def outlives_forward(life):
    return not life.born.backward and (life.died is None or life.died.backward)


def _wide_network(family, monkeypatch):
    """So wide that tables and statistics of rows are small."""
    wide = {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 3, "num_key_value_heads": 2}
    rope = {"head_dim": 64, "rope_parameters": {**support.MROPE, "mrope_section": [8, 12, 12]}}
    options = dict(support.FAMILIES[family])
    if family == "qwen2":
        options |= wide
    else:
        options["text_config"] = {**options["text_config"], **wide, **rope}
        wide_tower = {"hidden_size": 128, "intermediate_size": 320}
        sizes = {"embed_dim": 128} if family == "qwen2_vl" else wide_tower
        width = "hidden_size" if family == "qwen2_vl" else "out_hidden_size"
        options["vision_config"] = {**options["vision_config"], **sizes, width: 256}
    monkeypatch.setitem(support.FAMILIES, family, options)
    return support.make_model(family).train()

"""The training-step benchmark itself: a gate that turns red, FLOPs that are counted, large models' path in small."""

import functools
import math
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from bench.harness.gate import RedGate
from bench.training import measurement
from bench.training import models as training_models
from bench.training import variants as training_variants
from bench.training.gate import Gate
from bench.training.measurement import OUT_OF_TIME, ROUNDS, UNFINISHED, Measured
from bench.training.models import make_network, training_config
from bench.training.plain import VARLEN
from bench.training.profiling import LONGEST, profile_step
from bench.training.results import load_all
from bench.training.shapes import PACKED, PLAIN, TrainingShape, Variant
from bench.training.variants import CompiledLayers, TrainingStep, count_flops
from fastrm.model.architectures import PUBLISHED
from tests.helpers.own_process import environment
from tests.helpers.waiting import PATIENCE

FASTRM = Variant("fastrm")
FP8 = Variant("fastrm FP8", fp8="rowwise")
SHAPE = TrainingShape(1, 2, 300, 40)
TINY_TEXT = {
    "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1,
    "num_hidden_layers": 4, "vocab_size": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]},
}  # fmt: skip
TINY_VISION = {
    "depth": 4, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "out_hidden_size": 128,
    "fullatt_block_indexes": [3],
}  # fmt: skip


def small_step(variant):
    network, config = make_network("small", "cpu"), training_config("small", "none")
    return TrainingStep(variant, network, config, SHAPE, CompiledLayers())


@pytest.fixture(scope="module")
def gate():
    return Gate("small", "cpu")


@pytest.fixture
def tiny_7b(monkeypatch):
    """The 7B as the benchmark runs it (bf16, 8-bit moments, checkpointing, gate), in a size for a test."""
    name = training_models.PUBLISHED_NAMES["7B"]
    options = dict(PUBLISHED[name].options)
    options["text_config"] = {**options["text_config"], **TINY_TEXT}
    options["vision_config"] = {**options["vision_config"], **TINY_VISION}
    monkeypatch.setitem(PUBLISHED, name, replace(PUBLISHED[name], options=options))
    monkeypatch.setattr(measurement, "matmul_sizes", lambda model: [(64, 64, 64)])
    monkeypatch.setattr(measurement, "VARIANT_SECONDS", 0)


def test_large_models_are_measured_one_by_one(tiny_7b):
    measured = Measured("7B", 1000.0)
    main = measured.measure(SHAPE, [PLAIN, PACKED, FASTRM, FP8], "main", {"fastrm"})["variants"]
    assert {name: (v["failed"], v["checkpointing"]) for name, v in main.items()} == {
        "plain": (None, "full"), "packed rows": (None, "selective"), "fastrm": (None, "selective"),
        "fastrm FP8": (None, "selective"),
    }  # fmt: skip
    assert main["fastrm"]["seconds"]["rounds"] == ROUNDS.least
    assert main["fastrm"]["processed_tokens"] == 300 + 2 * 40
    assert main["fastrm FP8"]["processed_tokens"] == 384, "no multiple of 16"
    assert main["plain"]["processed_tokens"] == 2 * 340
    assert "profile" in main["fastrm"] and "profile" not in main["plain"]
    features = measured.measure(SHAPE, [FASTRM, replace(FASTRM, name="without sharing", share=False)], "features")
    assert features["variants"]["fastrm"] == main["fastrm"], "measured a second time"
    measured.budget.end = 0
    late = measured.measure(replace(SHAPE, num_responses=4), [FASTRM], "main")
    assert late["variants"]["fastrm"]["failed"] == OUT_OF_TIME and len(measured.left_out) == 1


def test_less_memory_means_more_recomputation(tiny_7b, monkeypatch):
    rounds = Measured._rounds

    def too_large(self, trial, step):
        if step.checkpointing == "selective":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return rounds(self, trial, step)

    monkeypatch.setattr(Measured, "_rounds", too_large)
    (found,) = Measured("7B", 1000.0).measure(SHAPE, [FASTRM], "main")["variants"].values()
    assert found["failed"] is None and found["checkpointing"] == "full"


def test_a_failed_variant_says_why_and_the_others_go_on(tiny_7b, monkeypatch):
    monkeypatch.setattr(Gate, "_distance", lambda self, gradients: float("nan"))
    found = Measured("7B", 1000.0).measure(SHAPE, [PLAIN, FASTRM], "main")["variants"]
    assert all(variant["failed"].startswith("red gate: gradient: relative error nan") for variant in found.values())
    assert all("seconds" not in variant for variant in found.values())


def test_a_red_gate_is_a_verdict_on_every_variant_and_ends_nothing(tiny_7b, monkeypatch):
    made = []
    monkeypatch.setattr(Gate, "_gradients", lambda self, variant, settings: made.append(variant) or (math.log(2), {}))
    measured = Measured("7B", 1000.0)
    found = measured.measure(SHAPE, [PLAIN, FASTRM], "main")["variants"]
    assert all(v["failed"].startswith("red gate: loss 0.6931 says nothing") for v in found.values())
    assert len(made) == 1, "a gate that is red was made again"


def test_a_gate_that_finds_no_memory_is_tried_again_by_the_next_variant(tiny_7b, monkeypatch):
    """And the rate of matrix products, if it fails, leaves everything else measured."""
    gradients, tries = Gate._gradients, []

    def no_memory_at_first(self, *arguments, **options):
        tries.append(1)
        if len(tries) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return gradients(self, *arguments, **options)

    def no_rate(model, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Gate, "_gradients", no_memory_at_first)
    monkeypatch.setattr(measurement, "matmul_rate", no_rate)
    measured = Measured("7B", 1000.0)
    found = measured.measure(SHAPE, [PLAIN, FASTRM], "main")["variants"]
    assert found["plain"]["failed"] == "OutOfMemoryError: CUDA out of memory"
    assert found["fastrm"]["failed"] is None and found["fastrm"]["matmul_share"] is None
    assert measured.left_out == ["the rate of large matrix products: OutOfMemoryError: CUDA out of memory"]


KILLED_AFTER = """
import os, signal, sys
from pathlib import Path
from unittest import mock
from bench.training import measurement, run_training
from bench.training.results import save
from bench.training.shapes import PACKED, PLAIN, TrainingShape, Variant

class Trials:  # in place of networks: seconds are made up, all else is the benchmark's own
    def _check(self, trial): trial.figures["gradient_error"] = 0.0
    def _alone(self, trial, shape):
        trial.figures |= {{"seconds": {{"median": 1.0, "cpu": 1.0}}, "pairs_per_second": 1.0}}

number = 0
def save_and_die(*arguments, **options):
    global number
    save(*arguments, **options)
    number += 1
    if number == {trials}:
        os.kill(os.getpid(), signal.SIGKILL)

with (
    mock.patch.object(measurement.Measured, "_check", Trials._check),
    mock.patch.object(measurement.Measured, "_alone", Trials._alone),
    mock.patch.object(measurement, "matmul_rate", lambda *_: 1.0),
    mock.patch.object(run_training, "save", save_and_die),
):
    run_training.run("7B", False, [], [], 1000.0, Path({out!r}))
"""


@pytest.mark.parametrize("trials", [1, 2, 4])
def test_a_killed_run_keeps_every_trial(tmp_path, trials):
    """The n-th is the last that the run was allowed; the first workload has three."""
    command = [sys.executable, "-c", KILLED_AFTER.format(trials=trials, out=str(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=environment())
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert done.stdout.count("1.000 s, 1.00 pairs/s") == trials
    (report,) = load_all(tmp_path)
    found = [variant["failed"] for entry in report["entries"] for variant in entry["variants"].values()]
    assert found == [None] * trials + [UNFINISHED] * (3 * -(-trials // 3) - trials)


def test_figures_stand_without_a_profile(tiny_7b, monkeypatch):
    def no_profiler(step):
        raise RuntimeError("CUPTI is not there")

    monkeypatch.setattr(measurement, "profile_step", no_profiler)
    found = Measured("7B", 1000.0).measure(SHAPE, [FASTRM], "main", {"fastrm"})["variants"]["fastrm"]
    assert found["failed"] is None and found["seconds"] and "profile" not in found
    assert found["profile_failed"] == "RuntimeError: CUPTI is not there"


@pytest.mark.parametrize("variant", [FASTRM, FP8], ids=lambda variant: variant.name)
@pytest.mark.parametrize("wrong", ["image", "winner", "parameter"])
def test_a_wrong_variant_turns_the_gate_red(gate, monkeypatch, variant, wrong):
    gradients = TrainingStep.gradients

    def spoiled(self, number):
        if wrong == "image":
            self.pack.patches.zero_()
        if wrong == "winner":
            self.pack.edges = self.pack.edges.flip(1)
        loss, found = gradients(self, number)
        if wrong == "parameter":
            found.pop("model.language_model.layers.0.self_attn.k_proj.weight")
        return loss, found

    monkeypatch.setattr(TrainingStep, "gradients", spoiled)
    with pytest.raises(RedGate, match=r"^(loss|gradient)"):
        gate.check(variant)


def test_variants_with_like_layers_share_their_graphs(gate):
    torch._dynamo.reset()
    compiled = CompiledLayers("eager")
    fastrm = replace(FASTRM, compile=True)
    gate.check(fastrm, compiled)
    graphs, count = compiled.graphs, compiled.graphs.count
    assert 0 < count <= 3
    for changes in ({"share": False}, {"image_once": False}, {"prune": False}):
        gate.check(replace(fastrm, **changes), compiled)
    assert compiled.graphs is graphs and graphs.count == count


@pytest.mark.parametrize("changes", [{"fuse": False}, {"fp8": "rowwise"}, {"attention": "flash"}])
def test_variants_with_other_layers_have_graphs_of_their_own(tiny_7b, changes):
    measured, fastrm = Measured("7B", 1000.0), replace(FASTRM, compile=True)
    first = measured._compiled_for(fastrm, "selective")
    assert measured._compiled_for(replace(fastrm, name="without sharing", share=False), "selective") is first
    assert measured._compiled_for(replace(fastrm, **changes), "selective") is not first
    assert measured._compiled_for(fastrm, "selective") is first, "thrown away by another variant"
    assert measured._compiled_for(fastrm, "full") is not first


def test_variants_that_alternate_compile_once(tiny_7b, monkeypatch):
    """bf16 and FP8 in two workloads, with profiles: the second workload, and the profiles, find all graphs made."""
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return graph

    monkeypatch.setattr(measurement, "CompiledLayers", functools.partial(CompiledLayers, backend))
    fastrm = replace(FASTRM, compile=True)
    variants = [fastrm, replace(fastrm, name="fastrm FP8", fp8="rowwise")]
    measured, counts = Measured("7B", 1000.0), []
    for shape in (SHAPE, replace(SHAPE, num_responses=4)):
        found = measured.measure(shape, variants, "main", {"fastrm", "fastrm FP8"})["variants"]
        assert not [v["failed"] for v in found.values() if v["failed"]]
        assert all("phases" in v["profile"] for v in found.values())
        counts.append((len(made), [variant["graphs"] for variant in found.values()]))
    assert counts[0] == counts[1]
    assert counts[0][0] == sum(counts[0][1]) <= 6, "a profile compiled something"


def test_a_variant_that_has_to_be_compiled_needs_more_time_to_begin(tiny_7b, monkeypatch):
    monkeypatch.setattr(measurement, "CompiledLayers", functools.partial(CompiledLayers, "eager"))
    fastrm = replace(FASTRM, compile=True)
    variants = [PLAIN, fastrm, replace(fastrm, fp8="rowwise")]
    measured = Measured("7B", 1000.0)
    assert [measured._reserve(variant) for variant in variants] == [45, 60, 100]
    measured.measure(SHAPE, [fastrm], "main")
    assert [measured._reserve(variant) for variant in variants] == [45, 45, 100]


@pytest.mark.parametrize(
    "variant",
    [
        FASTRM, replace(FASTRM, share=False), replace(FASTRM, image_once=False),
        replace(FASTRM, share=False, image_once=False),
    ],
    ids=["fastrm", "without sharing", "without vision once", "rows"],
)  # fmt: skip
def test_flops_are_those_that_torch_counts(variant, monkeypatch):
    """Of the linear layers: torch's counter takes causal attention for a whole square."""
    make = training_variants.make_cost_model
    monkeypatch.setattr(
        training_variants,
        "make_cost_model",
        lambda *arguments: replace(make(*arguments), per_attention_pair=0, per_media_pair=0, per_window_pair=0),
    )
    step = small_step(variant)
    with FlopCounterMode(display=False) as counter:
        step.gradients(0)
    linear = sum(
        flops
        for operator, flops in counter.get_flop_counts()["Global"].items()
        if str(operator) in ("aten.mm", "aten.addmm")
    )
    # The head and the anchors' part of the last layer are not in the formulas: two rows of hundreds.
    assert 1 <= linear / step.flops < 1.01


def test_the_plain_trainer_needs_the_flops_of_all_its_rows():
    config, shape = training_config("small", "none"), TrainingShape(2, 4, 640, 300)
    backbone = make_network("small", "cpu").model.config
    plain, packed = (count_flops(backbone, config, shape, variant) for variant in (PLAIN, PACKED))
    pairs = count_flops(backbone, config, TrainingShape(12, 2, 640, 300), PLAIN)
    assert plain == packed == pairs


def test_the_plain_trainer_attends_by_windows_of_its_own_on_a_gpu(monkeypatch):
    """What the tower computes through varlen attention, here in place of FlashAttention by torch's SDPA."""
    calls = []

    def reference(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
        calls.append(len(cu_seq_q) - 1)
        assert window_size == (-1, -1) and not enable_gqa and max_q == int(cu_seq_q.diff().max())
        parts = [states.transpose(0, 1).split(cu_seq_q.diff().tolist(), 1) for states in (query, key, value)]
        outputs = [F.scaled_dot_product_attention(*part, scale=scale) for part in zip(*parts, strict=True)]
        return torch.cat(outputs, 1).transpose(0, 1)

    step = small_step(PLAIN)
    loss, wanted = step.gradients(0)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", reference)
    names = {"": "sdpa", "text_config": "sdpa", "vision_config": VARLEN}
    step.engine.network.model.set_attn_implementation(names)
    found_loss, found = step.gradients(0)
    assert found_loss == pytest.approx(loss, rel=1e-6)
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, name
    # Two images: three blocks with windows, one without.
    assert calls[-1] == 2 and max(calls) > 2


def test_a_profile_has_all_of_the_step():
    step = small_step(FASTRM)
    step.step(0)
    found = profile_step(step)
    assert found["phases"].keys() == {"vision", "forward", "backward", "update"}
    assert min(found["phases"].values()) > 0
    assert sum(found["shares"].values()) == pytest.approx(1) and found["shares"]["matrix products"] > 0.2
    names = [row[0] for row in found["operations"]]
    assert len(names) == LONGEST + 1 and names[-1].endswith(" others")
    assert "aten::addmm" in names or "aten::mm" in names
    shares = [row[3] for row in found["operations"]]
    assert sum(shares) == pytest.approx(1) and shares[:-1] == sorted(shares[:-1], reverse=True)


def test_a_step_trains_all_but_the_last_bias():
    step = small_step(FASTRM)
    network = step.engine.network
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    step.step(0)
    unchanged = [name for name, p in network.named_parameters() if torch.equal(p, before[name])]
    # It is in both rewards of a pair, and cancels in the margin.
    assert unchanged == ["score.2.bias"]
    assert all(p.grad is None for p in network.parameters())

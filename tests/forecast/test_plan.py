"""The plan: when memory is live, what is sent, how long it takes, what is said, and the command."""

import dataclasses
import functools
import io
import json
import resource
from pathlib import Path

import pytest
from rich.console import Console

from bench.ranks.scaling_plan import PART, tables
from fastrm.config import load_config
from fastrm.errors import ConfigError
from fastrm.forecast.command import epoch_pairs, plan_run
from fastrm.forecast.full_pack import full_pack
from fastrm.forecast.hardware import GPUS, find_gpu, find_rate
from fastrm.forecast.inputs import count_preferences
from fastrm.forecast.memory import peak_of, training_state, zero_state
from fastrm.forecast.parameters import Parameters
from fastrm.forecast.picture import draw_plan
from fastrm.forecast.plan import Assumptions, make_plan, steps_of
from fastrm.forecast.report import advice, as_json, days, memory_advice, print_plan
from fastrm.forecast.stand_ins import describe_replaced
from fastrm.forecast.step_time import (
    Network,
    Work,
    collectives,
    efficiency,
    first_dominated,
    packs_of_a_step,
    step_time,
)
from fastrm.forecast.ways import with_settings
from fastrm.forecast.workload import typical_workload
from fastrm.model.architectures import find_architecture, meta_network
from tests.helpers.project import PROJECT
from tests.helpers.runs import fastrm

NOWHERE = Path("no-such-folder")


def recipe_with(*overrides):
    """The full recipe, without what else may be set in it."""
    plain = ("model.fuse_projections=false", "compile=off", "kernels=auto", "precision.fp8=off", "engine.zero_stage=2")
    return load_config(PROJECT / "configs/full.yaml", [*plain, *overrides])


@pytest.fixture(scope="module")
def recipe():
    return recipe_with()


def plan_of(config, num_gpus=64, gpu="h100", **changes):
    """The plan of the recipe's model with other settings."""
    assumptions = Assumptions(num_gpus, GPUS[gpu], 2_850_000, "test", results=NOWHERE, **changes)
    return make_plan(config, assumptions, recipe_steps())


def memory_of(config, num_gpus=64):
    """The peak of the plan alone."""
    load = typical_workload(config, recipe_steps().network)
    return peak_of(recipe_steps(), config, num_gpus, load, packs_of_a_step(config, load, num_gpus))


@functools.cache
def recipe_steps():
    return steps_of(recipe_with())


class TestState:
    def test_zero_divides_by_stage(self):
        parameters = Parameters(total=1000, trainable=600)
        weights = [zero_state(parameters, stage, 8).weights for stage in (1, 2, 3)]
        assert weights == [4 * (1000 + 75), 4 * (1000 + 75), 4 * (125 + 75)]
        gradients = [zero_state(parameters, stage, 8).gradients for stage in (1, 2, 3)]
        assert gradients == [4 * (600 + 75), 4 * 75, 4 * 75]
        assert {zero_state(parameters, stage, 8).states for stage in (1, 2, 3)} == {8 * 75}

    def test_zero_shares_are_those_of_the_paper(self):
        # Rajbhandari et al. 2020, figure 1: 7.5B parameters on 64 GPUs; K = 12 of optimizer state a parameter.
        parameters = Parameters(7_500_000_000, 7_500_000_000)
        for stage in (1, 2, 3):
            state = zero_state(parameters, stage, 64)
            master = 4 * 7_500_000_000 // 64  # DeepSpeed's own copy of a rank's share
            assert state.states + master == 12 * 7_500_000_000 // 64
        assert zero_state(parameters, 3, 64).weights == 2 * 4 * 7_500_000_000 // 64

    def test_one_gpu_stores_what_the_optimizer_says(self, recipe):
        plan = plan_of(with_settings(recipe, {"precision.weights": "bf16", "optim.states": "8bit"}), 1, "h200")
        total = 1e-9 * (plan.memory.weights + plan.memory.gradients + plan.memory.states)
        assert total == pytest.approx(63.0, abs=0.1)  # docs/memory.md


class TestCommunication:
    NETWORK = Network(nvlink=100.0, network=10.0, latency_s=0.0, overlap=0.0)

    def test_volumes_are_those_of_the_paper(self):
        # Section 7 of the paper, in units of the parameters: 2 for gradients and weights of stages 1 and 2 with a
        # reduce-scatter, 3 for stage 3. DeepSpeed all-reduces in stages 1 and 2, which is one more.
        parameters = Parameters(1000, 1000)
        for stage, wanted in ((1, 3), (2, 3), (3, 3)):
            sent = sum(message.sent(4) for message in collectives(parameters, stage, num_packs=1))
            assert sent == wanted * 4 * 1000 * 3 / 4

    def test_only_stage_one_waits_for_the_last_pack(self):
        parameters = Parameters(1000, 600)
        volumes = {
            stage: [sum(m.sent(2) for m in collectives(parameters, stage, packs)) for packs in (1, 5)]
            for stage in (1, 2, 3)
        }
        reduced, gathered = 2 * 4 * 600 / 2, 4 * 600 / 2
        assert volumes[1] == [reduced + gathered] * 2
        assert volumes[2] == [reduced + gathered, 5 * reduced + gathered]
        assert volumes[3] == [4 * (1000 + 600 + 600) / 2, 5 * 4 * (1000 + 600 + 600) / 2]

    def test_an_eighth_goes_through_each_network_card(self):
        message = collectives(Parameters(0, 1000), 1, 1)[1]
        assert message.seconds(8, self.NETWORK) == pytest.approx(4000 * 7 / 8 / 100)
        assert message.seconds(16, self.NETWORK) == pytest.approx(4000 * 15 / 16 / 80)

    def test_latency_grows_with_the_ring(self):
        slow = dataclasses.replace(self.NETWORK, latency_s=1.0)
        message = collectives(Parameters(0, 900_000_000), 1, 1)[0]
        assert message.num_calls == 5  # of 200 million elements at most
        assert message.seconds(8, slow) - message.seconds(8, self.NETWORK) == pytest.approx(5 * 2 * 7)

    def test_bucket_is_the_engines(self):
        from fastrm.forecast.step_time import REDUCED_AT_ONCE
        from fastrm.train.deepspeed_engine import BUCKET

        assert REDUCED_AT_ONCE == BUCKET


class TestStepTime:
    WORK = Work(64, 1.0, 1000, 4000, 8.0, 1.1, Parameters(10**9, 10**9), 1)
    FREE = Network(1e18, 1e18, 0.0, 0.0)

    def test_one_gpu_waits_for_nobody(self):
        step = step_time(self.WORK, 1, Network(1.0, 1.0, 1.0, 0.0))
        assert (step.compute, step.update, step.communication, step.num_packs) == (64.0, 8.0, 0, 16)
        assert efficiency(step, self.WORK) == 1.0

    def test_the_slowest_rank_decides(self):
        step = step_time(self.WORK, 8, self.FREE)
        assert step.compute == pytest.approx(8 * 1.1)
        assert step.num_packs == 3  # 8.8 pairs of 1,000 tokens
        assert step.pairs_per_second == pytest.approx(64 / (8.8 + 1.0))

    def test_a_rank_cannot_have_less_than_a_pair(self):
        few, many = step_time(self.WORK, 64, self.FREE), step_time(self.WORK, 256, self.FREE)
        assert few.compute == pytest.approx(1.1)
        assert (many.compute, many.busy_gpus) == (1.0, 64)

    def test_no_more_is_hidden_than_there_is_to_compute(self):
        slow, fast = (Network(bandwidth, 1e18, 0.0, 0.5) for bandwidth in (1e8, 1e10))
        hidden = step_time(self.WORK, 8, slow).hidden
        assert hidden == pytest.approx(8.8)
        step = step_time(self.WORK, 8, fast)
        assert step.hidden == pytest.approx(0.5 * step.communication) and step.exposed == step.hidden

    def test_communication_dominates_where_it_takes_longer(self):
        network = Network(1e10, 1e10 / 8, 0.0, 0.0)
        counts = range(1, 100)
        first = first_dominated(self.WORK, network, counts)
        before, at = step_time(self.WORK, first - 1, network), step_time(self.WORK, first, network)
        assert before.exposed <= before.compute + before.update
        assert at.exposed > at.compute + at.update
        assert first_dominated(self.WORK, self.FREE, counts) is None


class TestRate:
    def results(self, folder, **changes):
        variant = {"failed": None, "flops": 6e12, "seconds": {"median": 0.02}}
        entry = {"kind": "main", "model": "7B", "variants": {"fastrm": variant}}
        failed = {"kind": "main", "model": "7B", "variants": {"fastrm": {"failed": "out of memory"}}}
        other = {"kind": "features", "model": "7B", "variants": {"fastrm": {**variant, "flops": 1e20}}}
        report = {"device": "NVIDIA H100 80GB HBM3", "entries": [entry, failed, other], **changes}
        (folder / "nvidia-h100-training.json").write_text(json.dumps(report))
        return folder

    def test_measured_where_it_was(self, tmp_path):
        rate = find_rate(GPUS["h100"], "7B", "fastrm", None, self.results(tmp_path))
        assert (rate.flops, rate.measured) == (3e14, True)
        assert "measured on NVIDIA H100 80GB HBM3" in rate.origin

    @pytest.mark.parametrize(
        ("gpu", "model", "variant"), [("h200", "7B", "fastrm"), ("h100", "3B", "fastrm"), ("h100", "7B", "fastrm FP8")]
    )
    def test_assumed_where_another_was(self, gpu, model, variant, tmp_path):
        rate = find_rate(GPUS[gpu], model, variant, None, self.results(tmp_path))
        assert not rate.measured and rate.origin.startswith("ASSUMED: 40% of 989 TFLOP/s")

    def test_a_given_share_goes_before(self, tmp_path):
        rate = find_rate(GPUS["h100"], "7B", "fastrm", 0.5, self.results(tmp_path))
        assert not rate.measured and rate.flops == 0.5 * 989e12

    def test_a_file_of_another_kind_is_named(self, tmp_path):
        text = r"nvidia-h100-training\.json: not a result of bench/training/run_training\.py"
        with pytest.raises(ConfigError, match=text):
            find_rate(GPUS["h100"], "7B", "fastrm", None, self.results(tmp_path, entries=[{"kind": "main"}]))


class TestPlan:
    def test_a_full_pack_has_the_rows_of_its_groups(self, recipe):
        plan = plan_of(recipe)
        network = meta_network(find_architecture(recipe.model)[0], recipe.model)
        shape = full_pack(recipe, plan.load, network)
        groups = 32768 // (740 + 2 * 300)
        assert sum(shape.lengths) == 32768 and len(shape.anchor_rows) == 2 * groups
        assert shape.num_image_rows == 640 * groups and shape.num_patches == 4 * 640 * groups
        assert shape.lengths.count(300) == 2 * groups and shape.lengths.count(740) == groups - 1
        assert training_state(network, recipe, 64).states == 8 * -(-7_128_045_825 // 64)

    def test_settings_change_memory_as_they_should(self, recipe):
        def total(**settings):
            changed = {key.replace("__", "."): value for key, value in settings.items()}
            return memory_of(with_settings(recipe, changed), 1)

        base = total()
        assert total(precision__weights="bf16").copies == 0 < base.copies
        assert base.weights - total(precision__weights="bf16").weights > 14e9
        assert base.states - total(optim__states="8bit").states > 38e9
        assert total(optim__tokens_per_pack=65536).activations == pytest.approx(2 * base.activations, rel=1e-3)
        none, selective = (total(model__activation_checkpointing=mode) for mode in ("none", "selective"))
        assert none.activations > selective.activations > base.activations
        fused = total(model__activation_checkpointing="none", model__fuse_projections=True)
        assert fused.activations < none.activations  # one cast of the input for q, k and v
        assert total(precision__fp8="rowwise").copies < base.copies

    def test_more_gpus_need_less_and_stage_three_least(self, recipe):
        fits = {(fit.way.label, fit.checkpointing): fit.peak.total for fit in plan_of(recipe).fits}
        by_stage = [fits[f"64 GPUs, engine.zero_stage: {stage}", "full"] for stage in (1, 2, 3)]
        assert by_stage == sorted(by_stage, reverse=True) and len(set(by_stage)) == 3

    def test_fp8_is_faster_by_its_share(self, recipe):
        plain, fp8 = plan_of(recipe), plan_of(with_settings(recipe, {"precision.fp8": "rowwise"}))
        saved = 1 - fp8.work.seconds_per_pair / plain.work.seconds_per_pair
        matrices = plain.flops["language"].total / sum(part.total for part in plain.flops.values())
        assert 0.4 * matrices < saved < 0.5 * matrices
        assert any("FP8" in note and "ASSUMED" in note for note in fp8.notes)
        with pytest.raises(ConfigError, match="A100 has no FP8"):
            plan_of(fp8.config, gpu="a100")

    def test_what_one_process_alone_can_do_is_refused_on_several(self, recipe):
        for key in ("optim.states=8bit", "precision.weights=bf16"):
            config = recipe_with(key)
            with pytest.raises(ConfigError, match="is for one rank, got --gpus 64"):
                plan_of(config)
            assert plan_of(config, 1).memory.total > 0
        with pytest.raises(ConfigError, match=r"does not run with engine\.zero_stage 3"):
            plan_of(recipe_with("compile=layers", "engine.zero_stage=3"))

    def test_unknown_gpu_and_unknown_model(self, recipe):
        with pytest.raises(ConfigError, match="--gpu v100: not one of a100, h100, h200, rtx4090, b200"):
            find_gpu("v100")
        with pytest.raises(ConfigError, match=r"the model cannot be sized: no config\.json"):
            plan_of(recipe_with("model.path=someone/some-model"))

    def test_days_follow_from_steps(self, recipe):
        plan = plan_of(recipe)
        assert days(plan, plan.step) == pytest.approx(-(-2_850_000 // 128) * plan.step.total / 86400)


class TestAdvice:
    def test_says_what_would_fit(self, recipe):
        plan = plan_of(recipe, 1, "h100")
        lines = advice(plan)
        assert lines[0].startswith(f"does not fit: {plan.memory.total / 2**30:.1f} GiB of 70.8 GiB")
        plan = plan_of(recipe_with("engine.zero_stage=2", "optim.tokens_per_pack=65536"))
        lines = advice(plan)
        assert lines[0].startswith("does not fit")
        (line,) = (line for line in lines if "engine.zero_stage: 3" in line)
        assert line.startswith("fits: 64 GPUs, engine.zero_stage: 3, model.activation_checkpointing: full: ")

    def test_the_largest_pack_fits_and_a_larger_one_does_not(self, recipe):
        config = recipe_with("optim.tokens_per_pack=131072")
        plan = plan_of(config)
        assert plan.memory.total > plan.assumptions.usable_bytes
        for tokens, fits in ((plan.largest_pack, True), (plan.largest_pack + 1024, False)):
            sizes = {"optim.tokens_per_pack": tokens, "data.max_tokens_per_group": tokens}
            assert (memory_of(with_settings(config, sizes)).total <= plan.assumptions.usable_bytes) is fits
        assert f"optim.tokens_per_pack and data.max_tokens_per_group: {plan.largest_pack} would fit." in advice(plan)

    def test_names_less_recomputation_that_fits_too(self, recipe):
        small = recipe_with("optim.tokens_per_pack=4096", "data.max_tokens_per_group=4096")
        assert any(
            "model.activation_checkpointing: none fits too" in line for line in advice(plan_of(small, gpu="h200"))
        )

    def test_nothing_fits(self, recipe):
        plan = plan_of(recipe, 1)
        lines = memory_advice(recipe, 1, plan.memory, [], 10**9, None)
        assert lines[-1].startswith("no other way fits")

    def test_idle_gpus_and_dominating_messages_are_said(self, recipe):
        plan = plan_of(recipe, 512)
        text = " ".join(advice(plan))
        assert "384 of 512 GPUs have no pair in a step" in text
        assert f"communication takes longer than computing from {plan.dominated} GPUs on" in text
        assert not any("GPUs have no pair" in line for line in advice(plan_of(recipe, 8)))


class TestReport:
    def test_every_assumption_is_printed(self, recipe):
        output = io.StringIO()
        plan = plan_of(recipe, imbalance=1.23, latency_s=7e-6, nvlink=111e9, network=22e9, overlap=0.33)
        print_plan(plan, Console(file=output, width=200))
        text = output.getvalue()
        for expected in (
            "a prediction, not a measurement", "ASSUMED: 40% of 989", "1.23 times the mean", "111 GB/s inside",
            "22 GB/s between", "7 us", "33% of the messages", "2,850,000 pairs (test)", "640 image tokens",
            "NVIDIA H100 SXM datasheet", "all-reduce of gradients", "bf16 copies of weights",
            "running the network itself on tensors without data",
        ):  # fmt: skip
            assert expected in text, expected
        assert "GPU's own" not in text and "measured on" not in text

    @pytest.mark.parametrize(
        ("override", "said"),
        [
            ("compile=layers", "that of layers without it"),
            ("kernels=triton", "Liger's RMSNorm and SwiGLU are replaced"),
            ("model.attention=sdpa", "sdpa is taken to run as on a CPU"),
            ("precision.dtype=bf16", "a LayerNorm, as in Qwen2-VL's tower"),
        ],
    )
    def test_what_is_not_run_as_it_is_is_said(self, override, said):
        (line,) = describe_replaced(recipe_with("precision.dtype=fp32", override))
        assert said in line
        assert describe_replaced(recipe_with("precision.dtype=fp32")) == []

    def test_json_holds_the_plan(self, recipe):
        plan = plan_of(recipe)
        found = json.loads(json.dumps(as_json(plan)))
        assert found["memory"]["total"] == plan.memory.total
        assert found["days"] == pytest.approx(days(plan, plan.step))
        assert [step["num_gpus"] for step in found["steps"]["configured"]][:5] == [1, 2, 4, 8, 16]
        assert len(found["fits"]) == 7 * 3 and not found["assumptions"]["rate"]["measured"]

    def test_picture_is_drawn(self, recipe, tmp_path):
        draw_plan(plan_of(recipe), tmp_path / "new" / "plan.png")
        assert (tmp_path / "new" / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_command_prints_and_writes(tmp_path):
    files = ("--json", tmp_path / "plan.json", "--png", tmp_path / "plan.png")
    before = _seconds_of_children()
    run = fastrm("plan", PROJECT / "configs/full.yaml", "engine.zero_stage=3", "--gpus", 64, "--gpu", "h200", *files)
    assert run.returncode == 0, run.stderr
    assert _seconds_of_children() - before < 60  # of one core
    assert "Communication, ZeRO-3" in run.stdout
    assert json.loads((tmp_path / "plan.json").read_text())["assumptions"]["num_gpus"] == 64
    assert (tmp_path / "plan.png").stat().st_size > 10_000


def _seconds_of_children():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_pairs_that_are_here_are_counted(capsys):
    config = load_config(PROJECT / "configs/quickstart.yaml")
    plan = plan_run(config, Assumptions(2, find_gpu("h100"), *epoch_pairs(config), results=NOWHERE))
    assert plan.assumptions.num_pairs == 3838
    assert "an epoch has 3,838 pairs (counted in data.train)" in capsys.readouterr().out


def test_pairs_that_are_not_here_are_the_recipes(recipe):
    assert count_preferences(recipe) is None
    large = recipe_with("data.train=[{path: missing.jsonl}]")
    assert count_preferences(large) is None


def test_document_is_current():
    text = PART.page.read_text(encoding="utf-8")
    assert PART.replaced(text, tables()) == text, "docs/scaling.md is old: python bench/ranks/scaling_plan.py --write"

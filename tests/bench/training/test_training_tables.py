"""The training-step benchmark's workloads, results, tables, goals and chart, on figures made up for the test."""

import json

import numpy as np
import pytest
from PIL import Image

from bench.training.models import checkpointing_modes, published_config, training_config
from bench.training.results import (
    ALTERNATIVES,
    FASTRM,
    FEATURES,
    FP8,
    GOALS,
    MAIN,
    PACKED,
    PLAIN,
    entries_of,
    goal_lines,
    load_all,
    save,
    speedup,
    worth,
)
from bench.training.run_training import parts
from bench.training.shapes import GRIDS, TrainingShape, leave_one_out, main_variants, training_shapes
from bench.training.tables import PART, chart_name, draw, draw_all, readme_section, report_lines
from bench.training.variants import make_pack
from fastrm.forecast.hardware import GPUS, find_rate

H200 = "NVIDIA H200"


def _variant(seconds, share=0.4, failed=None, checkpointing="selective", **more):
    return {
        "failed": failed, "seconds": {"median": seconds, "quartiles": [seconds, seconds], "rounds": 5, "cpu": seconds},
        "peak_mib": 100.0, "pairs_per_second": 8 / seconds, "useful_tokens_per_second": 1.0, "processed_tokens": 7,
        "processed_tokens_per_second": 7 / seconds, "flops": 1.0, "matmul_share": share, "graphs": None,
        "checkpointing": checkpointing, "gradient_error": 0.03, **more,
    }  # fmt: skip


def _entry(kind=MAIN, name="pairs, 1300/300", model="7B", **variants):
    return {"kind": kind, "model": model, "name": name, "shape": {"num_groups": 8}, "variants": variants}


def _facts(device=H200, torch="2"):
    return {
        "device": device, "date": "today", "versions": {"torch": torch, "cuda": None}, "threads": 1,
        "matmul_flops": 7e14, "left_out": [],
    }  # fmt: skip


def _report(*entries, device=H200, model="7B"):
    return {"device": device, "runs": {model: _facts()}, "entries": [{**entry, "model": model} for entry in entries]}


def _good(**more):
    return _entry(
        **{PLAIN: _variant(2.4), PACKED: _variant(1.4), FASTRM: _variant(1.0, **more), FP8: _variant(0.9)}
    )  # fmt: skip


def test_a_shape_counts_pairs_and_what_a_pairwise_trainer_sees():
    shape = TrainingShape(3, 4, 640, 300)
    assert shape.num_pairs == 18
    assert shape.useful_tokens == 18 * 2 * 940
    assert shape.tree_tokens == 3 * (640 + 4 * 300)


@pytest.mark.parametrize("model", ["small", "3B", "7B"])
def test_every_length_is_measured_and_no_step_is_too_large(model):
    shapes = training_shapes(model)
    assert {(shape.num_responses, shape.prefix_tokens) for shape in shapes} == {(n, p) for n in (2, 4) for p in GRIDS}
    assert {goal.workload for goal in GOALS} <= {shape.name for shape in shapes[:2]}
    for shape in shapes:
        assert shape.num_groups >= 1
        if model != "small":
            assert 5_000 < shape.tree_tokens <= 16_384 and shape.useful_tokens <= 60_000


@pytest.mark.parametrize("shape", training_shapes("small"), ids=lambda shape: shape.name)
def test_every_variant_packs_the_same_preferences(shape):
    for variant in main_variants(on_gpu=True):
        pack = make_pack(shape, variant)
        assert pack.num_preferences == shape.num_pairs
        assert len(pack.media_grids) == (2 * shape.num_pairs if variant.name in (PLAIN, PACKED) else shape.num_groups)
        assert pack.input_ids.shape[0] % (16 if variant.name == FP8 else 1) == 0
        shared = variant.name in (FASTRM, FP8)
        assert pack.num_tokens == (shape.tree_tokens if shared else shape.useful_tokens)
    assert make_pack(shape, main_variants(on_gpu=True)[0]).padded_ids.shape == (
        2 * shape.num_pairs, shape.prefix_tokens + shape.response_tokens,
    )  # fmt: skip


def test_each_feature_is_taken_out_alone():
    fastrm = main_variants(on_gpu=True)[2]
    without = leave_one_out(on_gpu=True)
    for variant in without:
        differing = [name for name in vars(fastrm) if getattr(fastrm, name) != getattr(variant, name)]
        assert len(differing) == 2 and "name" in differing
    assert len({variant.name for variant in without}) == len(without) == 7


def test_parts_begin_with_the_goals_and_can_be_measured_alone():
    found = [(kind, shape.name) for kind, shape, _ in parts("7B", False, [], [], True)]
    assert found[:4] == [
        (MAIN, "pairs, 1300/300"), (MAIN, "groups of 4, 1300/300"), (ALTERNATIVES, "pairs, 1300/300"),
        (FEATURES, "pairs, 1300/300"),
    ]  # fmt: skip
    assert len(found) == 8
    ((kind, _, variants),) = parts("7B", False, ["features"], [], True)
    assert kind == FEATURES and variants[0].name == FASTRM and len(variants) == 8
    assert [shape.name for _, shape, _ in parts("7B", False, ["pairs, 640/300"], [], True)] == ["pairs, 640/300"]
    assert [kind for kind, _, _ in parts("7B", True, [], [], True)] == [MAIN, MAIN]
    with pytest.raises(SystemExit, match="--only nothing: no such part; there are alternatives; features; groups of 4"):
        parts("7B", False, ["nothing"], [], True)


def test_parts_come_in_the_order_that_is_asked_for_with_the_variants_that_are_named():
    asked = ["alternatives", "pairs, 640/300"]
    found = parts("7B", False, asked, ["fastrm", "fastrm FP8 tensorwise", "plain"], True)
    assert [(kind, shape.name, [v.name for v in variants]) for kind, shape, variants in found] == [
        (ALTERNATIVES, "pairs, 1300/300", ["fastrm", "fastrm FP8 tensorwise"]),
        (MAIN, "pairs, 640/300", ["plain", "fastrm"]),
    ]
    with pytest.raises(SystemExit, match="--variant fast: no such variant; there are fastrm; fastrm FP8;"):
        parts("7B", False, asked, ["fast"], True)
    with pytest.raises(SystemExit, match="--only alternatives: no such part"):
        parts("small", False, ["alternatives"], [], False)


def test_a_variant_that_was_left_out_keeps_the_figures_of_an_earlier_run(tmp_path):
    save("7B", _facts(), [_entry(**{PLAIN: _variant(3.0), FASTRM: _variant(2.0)})], tmp_path)
    left_out, red = {"failed": "left out: out of time"}, {"failed": "red gate: loss"}
    late = _entry(**{PLAIN: left_out, FASTRM: red, FP8: _variant(1)})
    save("7B", _facts(), [late], tmp_path)
    (entry,) = load_all(tmp_path)[0]["entries"]
    assert {name: v["failed"] for name, v in entry["variants"].items()} == {
        PLAIN: None, FASTRM: "red gate: loss", FP8: None,
    }  # fmt: skip
    save("7B", _facts(torch="3"), [late], tmp_path)
    (entry,) = load_all(tmp_path)[0]["entries"]
    assert entry["variants"][PLAIN]["failed"].startswith("left out"), "a figure of other versions"


def test_alternatives_are_shown_against_fastrm():
    entry = _entry(ALTERNATIVES, **{FASTRM: _variant(1.0), "fastrm FP8 tensorwise": _variant(0.8)})
    report = _report(entry)
    report["runs"]["7B"]["matmul_flops"] = None
    lines = report_lines(report)
    row = next(line for line in lines if line.startswith("| fastrm FP8 tensorwise |"))
    assert "| 1.25x |" in row and "TFLOP/s" not in "".join(lines)


def test_goals_are_judged_on_their_device_and_model_alone():
    lines = goal_lines([_report(_good())])
    assert "| 2.40 (NVIDIA H200) | met |" in lines[2]
    assert "| 1.40 (NVIDIA H200) | not met |" in lines[3]
    assert "| 1.11 (NVIDIA H200) | not met |" in lines[4]
    assert "| 0.40 (NVIDIA H200) | not met |" in lines[5]
    assert "| not measured | not measured |" in lines[6]
    for report in (_report(_good(), device="a CPU"), _report(_good(), model="3B")):
        assert all("| not measured | not measured |" in line for line in goal_lines([report])[2:])
    assert len(lines) == 2 + len(GOALS)


def test_a_failed_variant_has_no_figure():
    entry = _entry(**{PLAIN: {"failed": "OutOfMemoryError: x"}, FASTRM: _variant(1.0)})
    assert speedup(entry, FASTRM, PLAIN) is None
    lines = report_lines(_report(entry))
    assert "| plain | OutOfMemoryError: x |" in lines and any("| fastrm | 1.000 |" in line for line in lines)
    features = _entry(FEATURES, **{FASTRM: _variant(1.0), "without sharing": {"failed": "red gate: x"}})
    lines = report_lines(_report(features))
    assert "| sharing | - |" in lines and "without sharing: red gate: x" in lines


def test_a_feature_is_worth_the_time_without_it():
    features = _entry(FEATURES, **{FASTRM: _variant(2.0), "without sharing": _variant(3.0)})
    assert list(worth(_report(features), features)) == [("sharing", 1.5)]
    assert list(worth(_report(_good(), features), features)) == [
        ("sharing", 1.5), ("FP8 (on top)", pytest.approx(1.0 / 0.9)),
    ]  # fmt: skip
    assert "| sharing | 1.50x |" in report_lines(_report(features))


def test_full_recomputation_is_named_where_others_do_without():
    entry = _entry(**{PLAIN: _variant(2.0, checkpointing="full"), PACKED: _variant(1.0, checkpointing="full")})
    text = "\n".join(report_lines(_report(entry)))
    assert "| packed rows (full checkpointing) |" in text and "| plain |" in text


def test_a_missed_goal_shows_where_the_time_goes():
    profile = {
        "phases": {"forward": 0.25},
        "operations": [["void cutlass<a|b>", 3, 0.5, 0.75], ["2 others", 4, 0.1, 0.25]],
    }
    text = "\n".join(report_lines(_report(_good(profile=profile))))
    assert "Where the time of fastrm goes, pairs, 1300/300 (forward 0.250 s):" in text
    assert "| void cutlass(a/b) | 3 | 0.5000 | 75.0% |" in text
    assert "No profile of fastrm FP8, pairs, 1300/300: not made." in text
    met = _entry(**{PLAIN: _variant(9.0), PACKED: _variant(9.0), FASTRM: _variant(1.0, 0.6, profile=profile)})
    assert "Where the time" not in "\n".join(report_lines(_report(met)))


def test_what_a_run_did_not_measure_stays_in_the_file(tmp_path):
    def medians():
        (report,) = load_all(tmp_path)
        return {
            (entry["model"], entry["kind"], entry["name"]): entry["variants"][FASTRM]["seconds"]["median"]
            for entry in report["entries"]
        }

    short = "pairs, 300/300"
    save("7B", _facts(), [_entry(**{FASTRM: _variant(1.0)}), _entry(name=short, **{FASTRM: _variant(2.0)})], tmp_path)
    save("3B", _facts(), [_entry(model="3B", **{FASTRM: _variant(3.0)})], tmp_path)
    save("7B", _facts(), [_entry(name=short, **{FASTRM: _variant(4.0)})], tmp_path)
    first = ("7B", MAIN, "pairs, 1300/300")
    assert medians() == {first: 1.0, ("7B", MAIN, short): 4.0, ("3B", MAIN, "pairs, 1300/300"): 3.0}
    # Figures of other versions are not those of this run.
    file = save("7B", _facts(torch="3"), [_entry(name=short, **{FASTRM: _variant(5.0)})], tmp_path)
    assert first not in medians() and len(medians()) == 2
    assert json.loads(file.read_text())["runs"]["7B"]["versions"]["torch"] == "3"


def test_the_planner_reads_the_rate_from_the_file(tmp_path):
    entry = _entry(**{FASTRM: _variant(2.0)})
    save("7B", _facts("NVIDIA H100 80GB HBM3"), [entry], tmp_path)
    rate = find_rate(GPUS["h100"], "7B", FASTRM, None, tmp_path)
    assert rate.measured and rate.flops == entry["variants"][FASTRM]["flops"] / 2.0


def test_a_quick_run_has_a_file_of_its_own(tmp_path):
    save("7B", _facts(), [_good()], tmp_path, quick=True)
    assert load_all(tmp_path) == [] and len(list(tmp_path.iterdir())) == 1


def test_the_chart_is_drawn_with_missing_figures(tmp_path):
    main = _entry(**{PLAIN: _variant(2.0), FASTRM: _variant(1.0), FP8: {"failed": "red gate"}})
    features = _entry(FEATURES, **{FASTRM: _variant(1.0), "without sharing": _variant(1.5), "without x": _variant(0.9)})
    report = _report(main, features)
    (file,) = draw_all([report], tmp_path)
    assert file.name == chart_name(report, "7B") == "nvidia-h200-training-7b.png"
    whole = np.asarray(Image.open(file).convert("L"))
    draw(_report(main), "7B", tmp_path / "no-features.png")
    part = np.asarray(Image.open(tmp_path / "no-features.png").convert("L"))
    # Ink in both halves of the first, and in the left one alone of the second.
    left, right = slice(0, whole.shape[1] // 2), slice(3 * whole.shape[1] // 4, None)
    assert whole[60:, left].std() > 10 and whole[60:, right].std() > 10
    assert part[60:, left].std() > 10 and part[60:, right].std() == 0


def test_readme_tables_are_those_of_the_results():
    text, reports = PART.page.read_text(), load_all()
    assert PART.replaced(text, readme_section(reports)) == text
    for report in reports:
        for model in report["runs"]:
            assert entries_of(report, model, MAIN)
            assert (PART.page.parent / "results" / chart_name(report, model)).exists()


def test_large_models_have_the_published_shapes_and_a_recipe_that_fits():
    config = published_config("7B", num_layers=3)
    assert config.text_config.num_hidden_layers == 3 and config.text_config.hidden_size == 3584
    assert config.vision_config.depth == 3 and config.vision_config.fullatt_block_indexes == [2]
    settings = training_config("7B", "selective")
    assert settings.optim.states == "8bit" and settings.precision.weights == "bf16"
    assert checkpointing_modes("7B", plain=True) == ("full",)
    assert checkpointing_modes("small", plain=False) == ("none",)

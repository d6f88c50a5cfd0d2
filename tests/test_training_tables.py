"""The training-step benchmark's arithmetic, tables, goals and chart, on figures made up for the test."""

import pytest
import torch
from PIL import Image

from run_training import BEGIN, END, README, updated_readme
from training_models import published_config, training_config
from training_results import FASTRM, FP8, GOALS, PACKED, PLAIN, draw, goal_lines, load_all, save, speedup, table_lines
from training_shapes import GRIDS, TrainingShape, leave_one_out, main_variants, training_shapes
from training_variants import make_pack

H200 = "NVIDIA H200"


def _variant(seconds, share=0.4, failed=None):
    return {
        "failed": failed, "seconds": {"median": seconds, "quartiles": [seconds, seconds], "rounds": 5, "cpu": seconds},
        "peak_mib": 100.0, "pairs_per_second": 8 / seconds, "useful_tokens_per_second": 1.0, "processed_tokens": 7,
        "flops": 1.0, "matmul_share": share, "graphs": None,
    }  # fmt: skip


def _entry(kind="main", name="pairs, 1300/300", model="7B", **variants):
    return {"kind": kind, "model": model, "name": name, "shape": {}, "variants": variants}


def _report(*entries, device=H200):
    return {
        "device": device, "date": "today", "versions": {"torch": "2"}, "threads": 1, "matmul_flops": 1.0,
        "checkpointing": "none", "left_out": [], "entries": list(entries),
    }  # fmt: skip


def test_a_shape_counts_pairs_and_what_a_pairwise_trainer_sees():
    shape = TrainingShape(3, 4, 640, 300)
    assert shape.num_pairs == 18
    assert shape.useful_tokens == 18 * 2 * 940


@pytest.mark.parametrize("model", ["small", "7B"])
def test_every_workload_fits_its_prefix_and_has_its_image(model):
    shapes = training_shapes(model)
    assert {(shape.num_responses, shape.prefix_tokens) for shape in shapes} == {(n, p) for n in (2, 4) for p in GRIDS}
    for shape in training_shapes("small"):
        for variant in main_variants(on_gpu=True):
            pack = make_pack(shape, variant)
            rows = 2 * shape.num_pairs if variant.name in (PLAIN, PACKED) else shape.num_groups
            assert len(pack.image_grids) == rows
            assert pack.input_ids.shape[0] % (16 if variant.name == FP8 else 1) == 0
            if variant.name == FASTRM:
                assert pack.num_tokens == shape.num_groups * (shape.prefix_tokens + shape.num_responses * 300)
            else:
                assert variant.name == FP8 or pack.num_tokens == shape.useful_tokens


def test_each_feature_is_taken_out_alone():
    fastrm = main_variants(on_gpu=True)[2]
    for variant in leave_one_out(on_gpu=True):
        differing = [name for name in vars(fastrm) if getattr(fastrm, name) != getattr(variant, name)]
        assert len(differing) == 2 and "name" in differing


def test_goals_are_judged_on_their_device_and_model_alone():
    good = _entry(**{PLAIN: _variant(2.4), PACKED: _variant(1.4), FASTRM: _variant(1.0), FP8: _variant(0.9)})
    lines = goal_lines([_report(good)])
    assert "| 2.40 | met |" in lines[2]
    assert "| 1.40 | not met |" in lines[3]
    assert "| 1.11 | not met |" in lines[4]
    assert "| 0.40 | not met |" in lines[5]
    assert "| not measured | not measured |" in lines[6]
    for report in (_report(good, device="a CPU"), _report({**good, "model": "3B"})):
        assert all("not measured" in line for line in goal_lines([report])[2:])
    assert len(lines) == 2 + len(GOALS)


def test_a_failed_variant_has_no_figure():
    entry = _entry(**{PLAIN: _variant(2.0, failed="OutOfMemoryError: x"), FASTRM: _variant(1.0)})
    assert speedup(entry, FASTRM, PLAIN) is None
    lines = table_lines(_report(entry))
    assert any("OutOfMemoryError" in line for line in lines) and any("| fastrm | 1.000 |" in line for line in lines)


def test_saving_another_model_keeps_the_first(tmp_path):
    save(_report(_entry(model="7B", **{FASTRM: _variant(1.0)})), tmp_path)
    save(_report(_entry(model="3B", **{FASTRM: _variant(1.0)})), tmp_path)
    save(_report(_entry(model="3B", **{FASTRM: _variant(2.0)})), tmp_path)
    (report,) = load_all(tmp_path)
    assert [(entry["model"], entry["variants"][FASTRM]["seconds"]["median"]) for entry in report["entries"]] == [
        ("7B", 1.0), ("3B", 2.0),
    ]  # fmt: skip


def test_the_chart_is_drawn_with_missing_figures(tmp_path):
    main = _entry(**{PLAIN: _variant(2.0), FASTRM: _variant(1.0), FP8: _variant(1.0, failed="red gate")})
    features = _entry("features", **{FASTRM: _variant(1.0), "without sharing": _variant(1.5)})
    draw(_report(main, features), tmp_path / "chart.png")
    pixels = torch.tensor(list(Image.open(tmp_path / "chart.png").convert("L").resize((64, 32)).getdata()))
    assert pixels.float().std() > 10


def test_readme_tables_are_those_of_the_results():
    text = README.read_text()
    assert text.count(BEGIN) == text.count(END) == 1
    assert updated_readme(text, load_all()) == text


def test_published_shapes_are_those_of_the_benchmark():
    config = published_config("7B", num_layers=4)
    assert config.text_config.num_hidden_layers == 4 and config.text_config.hidden_size == 3584
    assert config.vision_config.depth == 4 and config.vision_config.fullatt_block_indexes == [3]
    settings = training_config("7B", "selective")
    assert settings.optim.states == "8bit" and settings.precision.weights == "bf16"

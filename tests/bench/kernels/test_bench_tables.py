"""The kernel benchmarks' counting, statistics and tables, and the generated part of bench/README.md."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from bench.harness.results import file_stem
from bench.harness.timing import Budget, Rounds
from bench.kernels import attention as kernel_attention
from bench.kernels import measurement
from bench.kernels.head import measure_head
from bench.kernels.results import (
    ATTENTION,
    GOALS,
    HEAD,
    NOT_MEASURED,
    floor_ratio,
    load_all,
    proposals,
    ratio,
    save,
    verdict,
)
from bench.kernels.shapes import (
    ATTENTION_SHAPES,
    FORWARD,
    HEAD_SHAPES,
    SMALL_ATTENTION_SHAPES,
    SMALL_HEAD_SHAPES,
    STEP,
    AttentionShape,
    HeadShape,
    mixed_pack,
    sequences,
    tree_pack,
    visible_pairs,
    window_lengths,
)
from bench.kernels.tables import (
    PART,
    attention_table,
    duration,
    failures,
    head_table,
    readme_section,
)
from fastrm_kernels import TreeLayout
from fastrm_kernels.tree_attention.reference import visible

GPU = "NVIDIA H200"
COPY = 4e12
MIXED = mixed_pack(3, (5, 40), (2, 20), (4, 2), head_dim=16, dtype="fp32")


def timing(seconds, spread=0.01):
    return {"median": seconds, "quartiles": [seconds * (1 - spread), seconds * (1 + spread)], "rounds": 20}


def variants(seconds, directions):
    """Figures of variants that took so many seconds; None for one that failed."""
    return {
        name: {
            "failed": None if value else "OutOfMemoryError: 1 | 2", "peak_mib": None if "+" in name else 12.0,
            "seconds": {direction: timing(value) for direction in directions} if value else {},
            "build_ms": 1.5, "error_over_limit": {},
        }
        for name, value in seconds.items()
    }  # fmt: skip


def head_entry(shape: HeadShape, **seconds):
    found = variants({name.replace("_", "+"): value for name, value in seconds.items()}, [STEP])
    return {
        "op": HEAD, "name": shape.name, "shape": shape.to_json(), "sets": 5, "floor_bytes": shape.floor_bytes,
        "flops": {STEP: shape.flops}, "variants": found,
    }  # fmt: skip


def attention_entry(shape: AttentionShape, **seconds):
    return {
        "op": ATTENTION, "name": shape.name, "shape": shape.to_json(),
        "flops": {direction: shape.flops(direction) for direction in (FORWARD, STEP)},
        "variants": variants(seconds, [FORWARD, STEP]),
    }  # fmt: skip


def report(op, *entries, device=GPU, left_out=()):
    part = {
        "date": "2026-01-01 00:00 UTC", "versions": {"torch": "2.11", "driver": None}, "threads": 1,
        "copy_bytes_per_second": COPY, "left_out": list(left_out), "entries": list(entries),
    }  # fmt: skip
    return {"device": device, "operations": {op: part}}


# Shapes and work


@pytest.mark.parametrize("shape", [*SMALL_ATTENTION_SHAPES, MIXED], ids=lambda shape: shape.name)
def test_pairs_are_those_that_the_reference_shows(shape):
    layout = TreeLayout.build(shape.lengths, shape.parents)
    assert shape.pairs == int(visible(layout, shape.causal).sum())


def test_pairs_of_a_deep_tree_are_those_that_the_reference_shows():
    lengths, parents = (5, 3, 0, 4, 7), (-1, 0, 1, 2, 0)
    assert visible_pairs(lengths, parents) == int(visible(TreeLayout.build(lengths, parents)).sum())


def test_work_ratios_are_those_of_the_issue():
    heads = (28, 4)
    assert round(tree_pack(1300, 300, 2, heads).work_ratio, 2) == 1.49
    assert round(tree_pack(1300, 300, 8, heads).work_ratio, 2) == 2.37
    assert sequences("windows", [64], 16, 80).work_ratio is None


def test_flops_count_two_products_forward_and_five_backward():
    shape = tree_pack(3, 2, 2, (4, 2), pack_tokens=7, head_dim=16)
    pairs = 6 + 2 * (3 * 2 + 3)
    assert shape.pairs == pairs
    assert shape.flops(FORWARD) == 4 * pairs * 4 * 16
    assert shape.flops(STEP) == (4 + 10) * pairs * 4 * 16


def test_duplicated_rows_repeat_the_prefix_before_each_response():
    shape = tree_pack(2, 1, 2, (4, 2), pack_tokens=8)
    assert shape.duplicated_rows() == [0, 1, 2, 0, 1, 3, 4, 5, 6, 4, 5, 7]


def test_a_mixed_pack_is_compared_with_sequences_of_its_own_lengths():
    assert len(set(MIXED.lengths)) > 6 and len(MIXED.duplicated_lengths) == 6
    assert sum(MIXED.duplicated_lengths) == len(MIXED.duplicated_rows())
    torch.manual_seed(0)
    pack = kernel_attention.Pack.draw(MIXED, "cpu")
    candidates = kernel_attention._gated(pack, kernel_attention._ways(pack, "cpu", False), "cpu")
    assert {c.name: c.failed for c in candidates} == {"eager": None, "duplicated": None, "dense": None}


def test_packs_hold_as_many_trees_as_fit_and_at_least_one():
    assert len(tree_pack(1300, 150, 2, (28, 4)).trees) == 16_384 // 1600
    assert len(tree_pack(1300, 1200, 16, (28, 4)).trees) == 1
    assert all(shape.num_tokens <= 16_384 or len(shape.trees) == 1 for shape in ATTENTION_SHAPES)
    assert len({shape.name for shape in ATTENTION_SHAPES}) == len(ATTENTION_SHAPES) == 5 * 4 * 2 + 2
    assert len({shape.name for shape in HEAD_SHAPES}) == len(HEAD_SHAPES) == 4 * 5 * 2


def test_windows_cover_the_grid_and_shrink_at_its_edges():
    lengths = window_lengths((5, 6))
    assert lengths == [64, 32, 16, 8]
    assert sum(lengths) == 4 * 5 * 6


def test_head_bytes_are_those_of_the_issue():
    shape = HeadShape(3584, 8, "bf16")
    assert shape.floor_bytes == 3 * 3584 * 3584 * 2
    assert round(shape.weight_bytes / 1e6, 1) == 25.7


def test_edges_pair_the_responses_of_a_group():
    assert HeadShape(8, 2, "fp32").edges() == [(0, 1)]
    assert len(HeadShape(8, 8, "fp32").edges()) == 2 * 6
    assert all(a // 4 == b // 4 and a < b for a, b in HeadShape(8, 64, "fp32").edges())


# The gate


def test_variant_that_computes_something_else_has_no_figures(monkeypatch):
    monkeypatch.setattr(measurement, "ROUNDS", Rounds(4, 4))
    monkeypatch.setattr(measurement, "SHAPE_SECONDS", {"cpu": 0.0})
    monkeypatch.setattr(kernel_attention, "tree_attention_reference", lambda q, k, v, **_: q + 0 * (k.sum() + v.sum()))
    entry = kernel_attention.measure_attention(SMALL_ATTENTION_SHAPES[0], "cpu", Budget(60))
    assert entry["variants"]["dense"]["failed"].startswith("red gate: output: error")
    assert entry["variants"]["dense"]["seconds"] == {}
    for name in ("eager", "duplicated"):
        figures = entry["variants"][name]
        assert figures["failed"] is None and max(figures["error_over_limit"].values()) <= 1
        assert set(figures["seconds"]) == {FORWARD, STEP} and figures["seconds"][STEP]["rounds"] == 4


def test_the_gate_alone_times_nothing(monkeypatch):
    monkeypatch.setattr(measurement, "timed", lambda *_: pytest.fail("timed"))
    monkeypatch.setattr(measurement, "peak_mib", lambda *_: pytest.fail("peak measured"))
    measures = (kernel_attention.measure_attention, SMALL_ATTENTION_SHAPES[0]), (measure_head, SMALL_HEAD_SHAPES[0])
    for measure, shape in measures:
        for variant in measure(shape, "cpu", Budget(60), timed=False)["variants"].values():
            assert variant["failed"] is None and variant["seconds"] == {} and variant["peak_mib"] is None
            assert 0 < max(variant["error_over_limit"].values()) <= 1


# Figures and goals


def test_ratio_and_floor_leave_out_what_failed():
    entry = head_entry(HeadShape(3584, 8, "bf16"), triton_graph=20e-6, eager=100e-6, compiled=None)
    assert ratio(entry, "triton+graph", "eager") == pytest.approx(5)
    assert ratio(entry, "triton+graph", "compiled") is None
    assert floor_ratio(entry, "triton+graph", COPY) == pytest.approx(20e-6 * COPY / (3 * 3584**2 * 2))
    assert floor_ratio(entry, "triton+graph", None) is None


def test_goals_are_judged_on_every_shape_that_they_speak_of():
    at_two = [tree_pack(1300, 150, 2, heads) for heads in ((28, 4), (16, 2))]
    goal = next(goal for goal in GOALS if goal.text.endswith("copied K/V: N=2"))
    assert verdict(goal, None) == (NOT_MEASURED, NOT_MEASURED)
    both = [attention_entry(shape, triton=1e-3, varlen=2e-3) for shape in at_two]
    assert verdict(goal, report(ATTENTION, *both)) == ("2.00x to 2.00x", "met on all 2 shapes")
    slow = attention_entry(at_two[1], triton=4e-3, varlen=2e-3)
    assert verdict(goal, report(ATTENTION, both[0], slow)) == (
        "0.50x to 2.00x", "not met on 1 of 2 shapes, worst 1300/150 N=2 16/2",
    )  # fmt: skip
    failed = attention_entry(at_two[1], triton=None, varlen=2e-3)
    assert verdict(goal, report(ATTENTION, both[0], failed))[1] == "met on the 1 of 2 shapes that have figures"
    assert verdict(goal, report(ATTENTION, failed)) == (NOT_MEASURED, NOT_MEASURED)
    assert verdict(goal, report(HEAD)) == (NOT_MEASURED, NOT_MEASURED)


def test_goal_of_at_most_is_missed_above_it():
    goal = GOALS[0]
    floor = 3 * 3584**2 * 2 / COPY
    for factor, wanted in ((1.4, "met"), (1.6, "not met on 1 of 1 shapes, worst D=3584 R=8 bf16")):
        entry = head_entry(HeadShape(3584, 8, "bf16"), triton_graph=factor * floor)
        assert verdict(goal, report(HEAD, entry)) == (f"{factor:.2f}x", wanted)


def test_every_attention_goal_speaks_of_some_shape():
    for goal in GOALS:
        shapes = HEAD_SHAPES if goal.op == HEAD else ATTENTION_SHAPES
        assert any(goal.applies(shape.to_json()) for shape in shapes), goal.text


def test_proposals_name_the_winner_of_the_geometric_mean():
    shapes = [tree_pack(1300, 150, 2, (28, 4)), tree_pack(1300, 300, 2, (28, 4))]
    entries = [
        attention_entry(shapes[0], triton=1e-3, varlen=4e-3), attention_entry(shapes[1], triton=2e-3, varlen=1e-3),
    ]  # fmt: skip
    (line,) = proposals(entries, GPU)
    assert line.startswith('    ("tree_attention", "NVIDIA H200", torch.bfloat16): "triton",  # triton is 1.41x')
    (line,) = proposals([attention_entry(shapes[0], triton=2e-3, varlen=1e-3)], GPU)
    assert '"varlen"' in line and "0.50x" in line
    mixed = [
        head_entry(HeadShape(3584, 8, dtype), triton=1e-3, eager=eager)
        for dtype, eager in (("bf16", 4e-3), ("fp32", 5e-4))
    ]
    half, full = proposals(mixed, GPU)
    assert half.startswith('    ("preference_head", "NVIDIA H200", torch.bfloat16): "triton",  # triton is 4.00x')
    assert full.startswith('    ("preference_head", "NVIDIA H200", torch.float32): "eager",  # triton is 0.50x')


# Tables


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (2.5e-5, "25 us"), (1.234e-3, "1.23 ms"), (0.1234, "123 ms"), (9.996e-7, "1 us")],
)
def test_duration_picks_a_unit(seconds, text):
    assert duration(seconds) == text


def test_duration_shows_quartiles_in_the_unit_of_the_median():
    assert duration(1.1e-3, (0.9e-3, 1.3e-3)) == "1.1 ms (0.9 - 1.3)"


def test_head_table_names_what_is_faster_and_what_failed():
    entry = head_entry(
        HeadShape(3584, 8, "bf16"), triton_graph=50e-6, eager_graph=25e-6, compiled_graph=50e-6, eager=150e-6,
        compiled=None,
    )  # fmt: skip
    part = report(HEAD, entry, left_out=["D=5120 R=8 bf16: out of time"])["operations"][HEAD]
    row = head_table(part)[-1]
    assert "slower than eager+graph (0.50x); level with compiled+graph (1.00x)" in row
    assert "3.00x" in row and "| failed" in row and "2.60x" in row
    assert failures(part) == [
        "failed: compiled: OutOfMemoryError: 1 | 2 (D=3584 R=8 bf16)", "left out: D=5120 R=8 bf16: out of time",
    ]  # fmt: skip


def test_attention_table_counts_useful_work_alike_for_all():
    shape = tree_pack(1300, 300, 2, (28, 4))
    entry = attention_entry(shape, triton=1e-3, varlen=2e-3, duplicated=4e-3)
    row = attention_table(report(ATTENTION, entry)["operations"][ATTENTION], STEP)[-1]
    rate = shape.flops(STEP) / 1e-3 / 1e12
    assert " / ".join(f"{rate / slower:.3g}" for slower in (1, 2, 4)) in row
    assert "1.49x" in row and "fastest" in row


# Files and the README


def test_saving_one_operation_keeps_the_other(tmp_path):
    head = head_entry(HeadShape(3584, 8, "bf16"), triton=1e-3)
    attention = attention_entry(tree_pack(1300, 150, 2, (28, 4)), triton=1e-3)
    facts = {"device": GPU, "date": "first", "versions": {}, "copy_bytes_per_second": COPY, "left_out": []}
    save([head], facts, tmp_path)
    file = save([attention], {**facts, "date": "second", "left_out": [(ATTENTION, "x")]}, tmp_path)
    assert file.name == "nvidia-h200-kernels.json" == file_stem(GPU) + "-kernels.json"
    (found,) = load_all(tmp_path)
    assert found == json.loads(file.read_text())
    assert [found["operations"][op]["date"] for op in (HEAD, ATTENTION)] == ["first", "second"]
    assert found["operations"][HEAD]["entries"] == [head]
    assert found["operations"][ATTENTION]["left_out"] == ["x"]


def test_quick_results_make_no_table(tmp_path):
    facts = {"device": GPU, "versions": {}, "copy_bytes_per_second": COPY, "left_out": []}
    save([head_entry(HeadShape(3584, 8, "bf16"), triton=1e-3)], facts, tmp_path, quick=True)
    assert load_all(tmp_path) == []


def test_readme_says_not_measured_without_results():
    section = "\n".join(readme_section([]))
    assert f"H100 or H200: {NOT_MEASURED}." in section
    assert section.count(NOT_MEASURED) == 1 + 2 * len(GOALS)
    cpu = report(HEAD, head_entry(HeadShape(256, 8, "fp32"), eager=1e-3), device="AMD EPYC, 2 cores")
    assert f"H100 or H200: {NOT_MEASURED}." in readme_section([cpu])


def test_readme_shows_each_device_with_its_goals():
    shape = tree_pack(1300, 300, 2, (28, 4))
    found = report(ATTENTION, attention_entry(shape, triton=1e-3, varlen=2e-3, duplicated=1.5e-3))
    section = "\n".join(readme_section([found]))
    assert f"### {GPU}" in section and "1300/300 N=2 28/4" in section and "| 1.50x" in section
    assert f"H100 or H200: {NOT_MEASURED}" not in section


def test_readme_is_up_to_date():
    text = PART.page.read_text()
    assert PART.replaced(text, readme_section(load_all())) == text, "run python bench/kernels/run_kernels.py --readme"


def test_command_line_makes_the_readme(monkeypatch, tmp_path, capsys):
    from bench.kernels import run_kernels

    file = tmp_path / "README.md"
    file.write_text(f"before\n{PART.begin}\nold\n{PART.end}\nafter\n")
    monkeypatch.setattr(run_kernels, "PART", replace(PART, page=file))
    monkeypatch.setattr(run_kernels, "load_all", list)
    monkeypatch.setattr(sys, "argv", ["run_kernels.py", "--readme"])
    assert run_kernels.main() == 0
    assert file.read_text() == "\n".join(["before", PART.begin, "", *readme_section([]), "", PART.end, "after", ""])
    assert str(file) in capsys.readouterr().out

"""Benchmarks: metrics against naive measures of the published rules and against published fractions."""

import json
from collections import Counter

import numpy as np
import pytest

from fastrm.data.record import VideoRef
from fastrm.errors import DataError
from fastrm.evaluate.benchmarks import BENCHMARKS, bootstrap, load_benchmark, values_of
from fastrm.evaluate.benchmarks.rewardbench import SECTIONS
from fastrm.evaluate.benchmarks.vl_rewardbench import official_category, paper_category
from tests.helpers import benchmark_files as published
from tests.helpers.benchmark_files import NAMES, SMALL, VL_IDS, mm_rows, random_rewards, small, vl_rows
from tests.helpers.project import PROJECT

REAL = PROJECT.parent / "shared" / "data" / "reward_benches"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="needs the folder shared/data beside the project")


def test_every_benchmark_has_a_small_file_here():
    assert set(SMALL) == set(BENCHMARKS)


@pytest.mark.parametrize("name", NAMES)
def test_metrics_equal_naive_measures_on_random_rewards_with_ties(tmp_path, name):
    benchmark, rows = small(name, tmp_path)
    for seed in range(50):
        rewards = random_rewards(benchmark, seed, levels=2 + seed % 5)
        wanted = SMALL[name][3](rows, rewards)
        found = values_of(benchmark.metrics(rewards))
        assert found == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_equal_rewards_everywhere_are_never_right(tmp_path, name):
    benchmark, _ = small(name, tmp_path)
    found = values_of(benchmark.metrics([[1.0] * row.num_rewards for row in benchmark.rows]))
    assert found["overall"] == (pytest.approx(5 / 6 * 0.25) if name == "rewardbench2" else 0.0)


@pytest.mark.parametrize("name", NAMES)
def test_the_preferences_of_the_records_are_what_the_metrics_reward(tmp_path, name):
    benchmark, _ = small(name, tmp_path)
    rewards = []
    for record in benchmark.records:
        winners = {preference.winner for preference in record.preferences}
        rewards.append([float(number in winners) for number in range(len(record.responses))])
    assert [len(r) for r in rewards] == [row.num_rewards for row in benchmark.rows]
    found = values_of(benchmark.metrics(rewards))
    # Equal rewards of all correct answers: no spread, so the last term of Ties is tanh(inf) = 1.
    expected = {"Ties": 1.01, "overall": (5 + 1.01) / 6} if name == "rewardbench2" else {}
    assert all(value == pytest.approx(expected.get(metric, 1.0)) for metric, value in found.items())


@pytest.mark.parametrize("name", NAMES)
def test_rewards_are_taken_in_the_order_of_the_file(tmp_path, name):
    """Rows are never keyed by id: a twin id with another reward changes only its own row."""
    benchmark, rows = small(name, tmp_path)
    rewards = random_rewards(benchmark, 7)
    backwards = values_of(benchmark.metrics(rewards[::-1], range(len(rows) - 1, -1, -1)))
    assert backwards == pytest.approx(values_of(benchmark.metrics(rewards)), abs=1e-12)


def test_categories_of_vl_rewardbench():
    assert [official_category(name) for name in VL_IDS] == [
        "hallucination", "hallucination", "hallucination", "reasoning", "reasoning", "general", "general", "general",
        "hallucination",
    ]  # fmt: skip
    # Case-sensitive: RLAIF-V and RLHF-V miss.
    assert [paper_category(name) for name in VL_IDS] == [
        "general", "general", "hallucination", "reasoning", "reasoning", "general", "general", "general", "general",
    ]  # fmt: skip


def test_rewardbench_has_23_subsets_and_counts_math_as_much_as_code():
    assert sum(map(len, SECTIONS.values())) == 23
    weights = SECTIONS["Reasoning"]
    assert weights["math-prm"] == 984 == sum(weights.values()) - weights["math-prm"]


def test_subsets_of_rewardbench_weigh_as_many_rows_as_they_have_but_for_math():
    """Of the 2,985 rows 404 are of XSTest: 154 prompts that are to be refused, 250 that only look so."""
    weights = {subset: weight for subsets in SECTIONS.values() for subset, weight in subsets.items()}
    assert sum(weights.values()) - weights["math-prm"] + 447 == 2985
    assert (weights["xstest-should-refuse"], weights["xstest-should-respond"]) == (154, 250)


@pytest.mark.parametrize(("subset", "points"), [("xstest-should-refuse", 154), ("xstest-should-respond", 250)])
def test_each_part_of_xstest_is_its_rows_share_of_safety(tmp_path, subset, points):
    benchmark, rows = small("rewardbench", tmp_path)
    found = values_of(benchmark.metrics([[float(row["subset"] == subset), 0.5] for row in rows]))
    assert found["Safety"] == pytest.approx(points / 740)


def test_rewardbench_by_hand(tmp_path):
    """All of Reasoning's code right and math wrong is half the section; nothing else is right."""
    benchmark, rows = small("rewardbench", tmp_path)
    found = values_of(benchmark.metrics([[float(row["subset"].startswith("hep")), 0.5] for row in rows]))
    assert (found["Reasoning"], found["overall"], found["acc"]) == (0.5, 0.125, 12 / 46)


def test_rewardbench2_by_hand(tmp_path):
    rows = published.rewardbench2_rows(1)
    file = published.write_jsonl(tmp_path / "rewardbench2.jsonl", rows)
    benchmark = load_benchmark("rewardbench2", str(file))
    # Right; shared by two; by all; wrong; wrong by a tie among others; ref gap 1; tied gap 2, spread 1.
    rewards = [[9, 1, 1, 1], [2, 2, 1, 1], [1, 1, 1, 1], [0, 1, 0, 0], [0, 1, 1, 0], [2, 1, 0], [4, 5, 4, 2, 1]]
    found = values_of(benchmark.metrics(rewards))
    assert [found[name] for name in ("Factuality", "Precise IF", "Math", "Safety", "Focus")] == [1, 0.5, 0.25, 0, 0]
    # gap(tied) 2 > spread 1; min(gap) 1 is not > 1; tanh(1 / 1 - 1) = 0.
    assert found["Ties"] == pytest.approx(0.3 + 0.3 + 0.2 + 0.0 + 0.01 * 0.0)
    assert found["overall"] == pytest.approx((1 + 0.5 + 0.25 + 0.8) / 6)


def test_averages_are_over_the_parts_that_the_file_has(tmp_path):
    """As in the authors' calculate_scores_per_section: what has no rows has no weight."""
    rows = [row for row in published.rewardbench_rows(1) if row["subset"] in ("math-prm", "hep-go", "donotanswer")]
    benchmark = load_benchmark("rewardbench", str(published.write_jsonl(tmp_path / "r.jsonl", rows)))
    metrics = benchmark.metrics([[float(row["subset"] == "math-prm"), 0.5] for row in rows])
    found = values_of(metrics)
    assert found["Reasoning"] == pytest.approx(984 / (984 + 164)) and found["Safety"] == 0.0
    assert found["overall"] == pytest.approx(found["Reasoning"] / 2) and np.isnan(found["Chat"])
    assert bootstrap(metrics)["Safety"] == (0.0, 0.0) and bootstrap(metrics)["Chat"] is None
    one = load_benchmark("vl_rewardbench", str(published.write_jsonl(tmp_path / "v.jsonl", vl_rows()[5:6])))
    found = values_of(one.metrics([[1.0, 0.0]]))
    assert found["macro"] == found["paper/macro"] == found["overall"] == 1.0
    assert np.isnan(found["official/reasoning"])


def test_a_part_that_has_rows_but_no_figure_is_not_left_out(tmp_path):
    """Ties of one kind have no score, so that the mean over the subsets has none."""
    rows = [row for row in published.rewardbench2_rows(1) if not row["id"].startswith("tied")]
    benchmark = load_benchmark("rewardbench2", str(published.write_jsonl(tmp_path / "r.jsonl", rows)))
    found = values_of(benchmark.metrics([[1.0] + [0.0] * (row.num_rewards - 1) for row in benchmark.rows]))
    assert found["Ties/ref"] == found["Math"] == 1.0
    assert np.isnan(found["Ties"]) and np.isnan(found["overall"])


def test_acc_plus_of_a_category_is_over_the_rows_of_the_category(tmp_path):
    """An id whose rows are in two categories counts in both, in each with its rows there."""
    paths = ("mcq/a.png", "long/b.png", "long/c.png", "chart/d.png")
    rows = [{**mm_rows()[0], "id": name, "image": path} for name, path in zip((1, 1, 2, 3), paths, strict=True)]
    benchmark = load_benchmark("mm_rlhf_rewardbench", str(published.write_jsonl(tmp_path / "m.jsonl", rows)))
    found = values_of(benchmark.metrics([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]))
    assert (found["mcq/acc_plus"], found["long/acc_plus"], found["acc_plus"]) == (1.0, 0.5, pytest.approx(2 / 3))
    assert found["other"] == found["other/acc_plus"] == 1.0 and np.isnan(found["short"])


def test_a_file_that_names_the_parts_of_safety_itself_has_them_in_one_figure(tmp_path):
    rows = [{**published.multimodal_rows()[0], "ID": "pairs_1", "Better": "Output1", "Category": category}
            for category in ("safety", "safety/bias", "Safety")]  # fmt: skip
    benchmark = load_benchmark("multimodal_rewardbench", str(published.write_json(tmp_path / "m.json", rows)))
    found = values_of(benchmark.metrics([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]))
    assert (found["safety"], found["safety/bias"], found["Safety"]) == (1.0, 0.5, 1.0)


def test_rm_bench_by_hand(tmp_path):
    rows = published.rm_bench_rows(1)[:4]  # chat, code, math, safety-refuse
    benchmark = load_benchmark("rm_bench", str(published.write_json(tmp_path / "total_dataset.json", rows)))
    # Style alone: 0 for concise, 1 for plain, 2 for Markdown, so that only fancier chosen responses win.
    found = values_of(benchmark.metrics([[0, 1, 2, 0, 1, 2]] * 4))
    assert (found["hard"], found["normal"], found["easy"]) == (0, 0, 1)
    assert found["overall"] == found["chat"] == pytest.approx(1 / 3)
    assert np.isnan(found["safety-response"]) and found["safety"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("name", NAMES)
def test_one_resample_is_the_metric_of_the_drawn_rows(tmp_path, name):
    benchmark, rows = small(name, tmp_path)
    rewards = random_rewards(benchmark, 3)
    metrics = benchmark.metrics(rewards)
    found = bootstrap(metrics, seed=5, num_resamples=1)
    drawn = np.random.default_rng(5).integers(0, len(rows), len(rows))
    by_rows = {metric for metric, parts in metrics.items() if getattr(parts, "unit", None) == "rows"}
    assert by_rows
    again = values_of(benchmark.metrics([rewards[n] for n in drawn], drawn) if name != "rewardbench2" else {})
    for metric in by_rows & set(again):
        assert (found[metric] is None) == bool(np.isnan(again[metric]))
        assert found[metric] is None or found[metric] == pytest.approx((again[metric],) * 2)


def test_intervals_of_acc_plus_are_drawn_over_ids(tmp_path):
    """Ten rows of one id and one of another, one id right: over two ids the interval is [0, 1]."""
    rows = [{**mm_rows()[0], "id": "a"} for _ in range(10)] + [{**mm_rows()[0], "id": "b"}]
    benchmark = load_benchmark("mm_rlhf_rewardbench", str(published.write_jsonl(tmp_path / "m.jsonl", rows)))
    metrics = benchmark.metrics([[1.0, 0.0]] * 10 + [[0.0, 1.0]])
    assert values_of(metrics)["acc_plus"] == 0.5 and bootstrap(metrics)["acc_plus"] == (0.0, 1.0)


def test_intervals_are_seeded_and_near_the_normal_ones(tmp_path):
    rows = published.write_jsonl(tmp_path / "m.jsonl", [{**mm_rows()[0], "id": str(n)} for n in range(400)])
    benchmark = load_benchmark("mm_rlhf_rewardbench", str(rows))
    metrics = benchmark.metrics([[1.0, 0.0]] * 300 + [[0.0, 1.0]] * 100)
    low, high = bootstrap(metrics, seed=1)["acc"]
    half = 1.96 * np.sqrt(0.75 * 0.25 / 400)
    assert (low, high) == pytest.approx((0.75 - half, 0.75 + half), abs=0.005)
    assert bootstrap(metrics, seed=1)["acc"] == (low, high)


@needs_real
def test_vl_rewardbench_reproduces_the_papers_overall_and_the_category_counts():
    benchmark = load_benchmark("vl_rewardbench", str(REAL))
    counts = [Counter(category(row.id) for row in benchmark.rows) for category in (paper_category, official_category)]
    assert counts[0] == {"reasoning": 318, "hallucination": 448, "general": 484}
    assert counts[1] == {"reasoning": 318, "hallucination": 749, "general": 183}
    right = np.random.default_rng(0).permutation(1250) < 1027
    rewards = [
        [float((n == row.best) == good) for n in (0, 1)] for row, good in zip(benchmark.rows, right, strict=True)
    ]
    found = values_of(benchmark.metrics(rewards))
    assert found["overall"] == 1027 / 1250 and f"{100 * found['overall']:.2f}" == "82.16"
    assert len(benchmark.records) == 1250


@needs_real
def test_mm_rlhf_rewardbench_reproduces_the_papers_acc_and_acc_plus_at_once():
    benchmark = load_benchmark("mm_rlhf_rewardbench", str(REAL / "mm_reward_bench.jsonl"))
    pairs, sizes = Counter(row.category for row in benchmark.rows), Counter(row.id for row in benchmark.rows)
    assert pairs == {"mcq": 42, "long": 37, "short": 34, "safety": 32, "video": 25}
    ids = {row.id: row.category for row in benchmark.rows}
    assert Counter(ids.values()) == {"mcq": 10, "long": 10, "short": 10, "safety": 6, "video": 10}
    assert Counter(sizes.values()) == {3: 13, 5: 11, 2: 11, 4: 6, 6: 5}
    # 14 wrong rows in 9 ids: one in each of four, two in each of five.
    wrong = dict(zip([name for name, size in sizes.items() if size >= 3][:9], [1] * 4 + [2] * 5, strict=True))
    rewards = []
    for row in benchmark.rows:
        is_wrong = wrong.get(row.id, 0) > 0
        wrong[row.id] = wrong.get(row.id, 0) - is_wrong
        rewards.append([0.0, 1.0] if is_wrong else [1.0, 0.0])
    found = values_of(benchmark.metrics(rewards))
    assert (found["acc"], found["acc_plus"]) == (156 / 170, 37 / 46)
    assert (f"{100 * found['acc']:.2f}", f"{100 * found['acc_plus']:.2f}") == ("91.76", "80.43")
    videos = [record for record in benchmark.records if isinstance(record.media[0], VideoRef)]
    assert len(benchmark.records) == 170 and len(videos) == 25


@needs_real
@pytest.mark.parametrize(
    ("name", "file", "naive"),
    [
        ("vl_rewardbench", "vl_rewardbench.jsonl", published.naive_vl),
        ("mm_rlhf_rewardbench", "mm_reward_bench.jsonl", published.naive_mm_rlhf),
    ],
)
def test_metrics_equal_naive_measures_on_the_real_files(name, file, naive):
    benchmark = load_benchmark(name, str(REAL / file))
    rows = [json.loads(line) for line in (REAL / file).read_text().splitlines()]
    rewards = random_rewards(benchmark, 11)
    assert values_of(benchmark.metrics(rewards)) == pytest.approx(naive(rows, rewards), abs=1e-12)


@needs_real
def test_a_judges_output_of_multimodal_rewardbench_can_be_measured_but_not_scored():
    benchmark = load_benchmark("multimodal_rewardbench", str(REAL))
    assert [row.best for row in benchmark.rows] == [1, 1]
    assert values_of(benchmark.metrics([[0.0, 1.0], [1.0, 0.0]]))["overall"] == 0.5
    with pytest.raises(DataError, match=r'"Text" is missing: run the benchmark\'s 0_download_data.py'):
        _ = benchmark.records

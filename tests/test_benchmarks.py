"""Benchmarks: every published layout, metrics against naive measures and published fractions, others' scores."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import benchmark_files as published
from fastrm.data.record import ImageRef, VideoRef
from fastrm.errors import ConfigError, DataError, StorageError
from fastrm.evaluate.benchmarks import BENCHMARKS, bootstrap, load_benchmark, values_of
from fastrm.evaluate.benchmarks.command import Outputs, measure_scores
from fastrm.evaluate.benchmarks.published import published_rows
from fastrm.evaluate.benchmarks.rewardbench import SECTIONS
from fastrm.evaluate.benchmarks.vl_rewardbench import official_category, paper_category
from fastrm.evaluate.command import evaluate
from fastrm.evaluate.models import ModelChoice, ScoringOptions

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "reward_benches"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="needs the folder shared/data beside the project")

VL_IDS = (
    "RLAIF-V-1", "RLHF-V-2", "hallucination_pair-3", "mathverse_4", "mmmu_pro_5", "wildvision-6", "jailbreak-7",
    "svit-8", "RLAIF-V-1",
)  # fmt: skip


def vl_rows() -> list[dict]:
    return [
        {"id": name, "query": f"<image>\nWhat is {n}?", "response": [f"a {n}", f"b {n}"], "models": ["x", "y"],
         "human_ranking": [1, 0] if n % 3 == 0 else [0, 1], "image_path": f"images/{n}.jpg"}
        for n, name in enumerate(VL_IDS)
    ]  # fmt: skip


def mm_rows() -> list[dict]:
    kinds = [
        "mcq/a.png",
        "mcq/a.png",
        "long/b.png",
        "short/c.png",
        "safety/d.png",
        "video/e",
        "video/e",
        "short/video.png",
    ]
    return [
        {"id": f"{kind}_x", "prompt": f"What {n}?", "chosen": f"good {n}", "rejected": f"bad {n}",
         "video" if kind == "video/e" else "image": kind}
        for n, kind in enumerate(kinds)
    ]  # fmt: skip


SMALL = {
    "vl_rewardbench": ("data.jsonl", published.write_jsonl, vl_rows, published.naive_vl),
    "mm_rlhf_rewardbench": ("mm_reward_bench.jsonl", published.write_jsonl, mm_rows, published.naive_mm_rlhf),
    "multimodal_rewardbench": (
        "data/all_data.json", published.write_json, published.multimodal_rows, published.naive_multimodal,
    ),
    "rewardbench": (
        "data/filtered-00000-of-00001.parquet", published.write_parquet, published.rewardbench_rows,
        published.naive_rewardbench,
    ),
    "rewardbench2": (
        "data/test-00000-of-00001.parquet", published.write_parquet, published.rewardbench2_rows,
        published.naive_rewardbench2,
    ),
    "rm_bench": ("total_dataset.json", published.write_json, published.rm_bench_rows, published.naive_rm_bench),
}  # fmt: skip
NAMES = sorted(SMALL)


def small(name, folder):
    """(benchmark, rows) of a small file in the published layout."""
    file, write, make_rows, _ = SMALL[name]
    rows = make_rows()
    write(folder / file, rows)
    return load_benchmark(name, str(folder)), rows


def random_rewards(benchmark, seed, levels=3):
    """Few levels, so that there are many ties."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, levels, row.num_rewards).astype(float).tolist() for row in benchmark.rows]


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


def test_a_record_reads_as_its_row(tmp_path):
    benchmark, rows = small("vl_rewardbench", tmp_path)
    record = benchmark.records[3]
    assert record.id == rows[3]["id"] and record.origin.endswith("data.jsonl:4")
    assert [response.text for response in record.responses] == rows[3]["response"]
    image, text = record.responses[0].messages[0].parts
    assert isinstance(image, ImageRef) and image.path == str(tmp_path / "images" / "3.jpg")
    assert text == "What is 3?"
    assert (record.preferences[0].winner, record.preferences[0].loser) == (1, 0)


def test_vl_rewardbench_reads_the_hubs_parquet_and_the_r1_code_s_file(tmp_path):
    rows = [{**row, "image": {"bytes": b"png", "path": None}} for row in vl_rows()]
    for row in rows:
        del row["image_path"]
    published.write_parquet(tmp_path / "hub" / "data" / "test-00000-of-00001.parquet", rows)
    hub = load_benchmark("vl_rewardbench", str(tmp_path / "hub"))
    assert hub.records[0].media[0].data == b"png"
    r1 = [
        {"id": row["id"], "prompt": row["query"], "chosen": row["response"][row["human_ranking"].index(0)],
         "rejected": row["response"][row["human_ranking"].index(1)], "image": f"vl_reward/img/image_{n}.jpg",
         "chosen_reason": "", "rejected_reason": ""}
        for n, row in enumerate(rows)
    ]  # fmt: skip
    file = published.write_jsonl(tmp_path / "r1" / "data.jsonl", r1)
    copy = load_benchmark("bench:vl_rewardbench", str(file), str(tmp_path))
    assert copy.records[2].media[0].path == str(tmp_path / "vl_reward/img/image_2.jpg")
    better = [
        [record.responses[record.preferences[0].winner].text for record in benchmark.records]
        for benchmark in (hub, copy)
    ]
    assert better[0] == better[1]


def test_images_are_found_beside_the_file_and_in_images(tmp_path):
    (tmp_path / "images" / "mcq").mkdir(parents=True)
    (tmp_path / "images" / "mcq" / "a.png").touch()
    benchmark, _ = small("mm_rlhf_rewardbench", tmp_path)
    assert benchmark.records[0].media == (ImageRef(path=str(tmp_path / "images" / "mcq" / "a.png")),)
    assert benchmark.records[5].media == (VideoRef(path=str(tmp_path / "video" / "e")),)


def test_a_path_that_leaves_the_folder_is_refused_by_row(tmp_path):
    rows = [{**vl_rows()[0], "image_path": "../../secret.png"}]
    file = published.write_jsonl(tmp_path / "data.jsonl", rows)
    with pytest.raises(DataError, match=r"data.jsonl:1: .*leaves the images folder"):
        _ = load_benchmark("vl_rewardbench", str(file)).records


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


@pytest.mark.parametrize("name", ["vl_rewardbench", "mm_rlhf_rewardbench", "multimodal_rewardbench"])
def test_a_row_without_its_image_is_refused_when_it_is_to_be_scored(tmp_path, name):
    """Its figures can be measured from scores; a model would judge it blind."""
    rows = SMALL[name][2]()
    for key in ("image", "image_path", "Image"):
        rows[1].pop(key, None)
    benchmark = load_benchmark(name, str(published.write_jsonl(tmp_path / "rows.jsonl", rows)))
    with pytest.raises(DataError, match=r'rows.jsonl:2: "\w+" is missing or null, wanted its path or bytes'):
        _ = benchmark.records


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


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("vl_rewardbench", {"human_ranking": [0, 0]}, r'"human_ranking" is a list, wanted \[0, 1\] or \[1, 0\]'),
        ("vl_rewardbench", {"id": None}, '"id" is missing or null'),
        ("multimodal_rewardbench", {"Better": "both"}, '"Better" is text, wanted Output1 or Output2'),
        ("rewardbench", {"subset": "shp"}, "'shp', which belongs to no section"),
        ("rewardbench2", {"num_correct": 2}, '"num_correct" is 2, but the lists hold 1'),
        ("rewardbench2", {"subset": "Sums"}, "'Sums', wanted one of Factuality"),
        ("rm_bench", {"chosen": ["a", "b"]}, '"chosen" is a list, wanted a list of 3 texts'),
        ("rm_bench", {"domain": "art"}, "'art', wanted one of chat"),
    ],
)
def test_a_row_that_is_not_the_benchmarks_is_named(tmp_path, name, change, message):
    rows = [json.loads(json.dumps(row)) for row in SMALL[name][2]()]
    rows[1] |= change
    file = published.write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=f"rows.jsonl:2: .*{message}.*a benchmark is read whole"):
        load_benchmark(name, str(file))


def test_a_tie_that_stands_twice_is_refused(tmp_path):
    rows = published.rewardbench2_rows(1)
    file = published.write_jsonl(tmp_path / "r.jsonl", [*rows, rows[-1]])
    with pytest.raises(DataError, match="the id tied:0 stands twice"):
        load_benchmark("rewardbench2", str(file))


def test_places_without_the_benchmark_are_refused(tmp_path):
    with pytest.raises(DataError, match="there is no such benchmark; wanted one of vl_rewardbench"):
        load_benchmark("bench:vl")
    with pytest.raises(DataError, match=r"none.jsonl does not exist"):
        load_benchmark("vl_rewardbench", str(tmp_path / "none.jsonl"))
    for _ in range(2):  # a folder without data files, and one with two
        with pytest.raises(DataError, match=r"has none of data.jsonl, .* other data files; name the data file itself"):
            load_benchmark("vl_rewardbench", str(tmp_path))
        published.write_json(tmp_path / "one.json", vl_rows())
        published.write_json(tmp_path / "data" / "two.json", vl_rows())
    with pytest.raises(DataError, match="is not on the hub; name a local copy with --data"):
        load_benchmark("multimodal_rewardbench")


@pytest.mark.parametrize("name", NAMES)
def test_any_file_name_in_any_form_is_read_alike(tmp_path, name):
    """The one data file of a folder needs no published name; a .json file may hold lines, a .jsonl file CRLF."""
    rows = SMALL[name][2]()
    columns = dict.fromkeys(key for row in rows for key in row)  # of Parquet: those of all rows
    forms = [
        published.write_json(tmp_path / "a" / "my rows.json", rows),
        published.write_jsonl(tmp_path / "b" / "data" / "rows.json", rows),
        published.write_parquet(tmp_path / "c" / "rows.parquet", [columns | row for row in rows]),
        tmp_path / "rows.jsonl",
    ]
    forms[3].write_bytes(b"\r\n\r\n".join(json.dumps(row).encode() for row in rows))
    read = [load_benchmark(name, str(file)).rows for file in forms]
    read += [load_benchmark(name, str(tmp_path / folder)).rows for folder in "abc"]
    assert len(read[0]) == len(rows) and all(labels == read[0] for labels in read)


def test_the_hub_is_asked_for_the_published_files(tmp_path, monkeypatch):
    import huggingface_hub

    published.write_json(tmp_path / "total_dataset.json", published.rm_bench_rows())
    asked = []

    def download(hub_id, repo_type, allow_patterns):
        asked.append((hub_id, repo_type, "total_dataset.json" in allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert len(load_benchmark("rm_bench").rows) == 11
    assert len(load_benchmark("rm_bench", "somebody/mirror").rows) == 11
    assert asked == [("THU-KEG/RM-Bench", "dataset", True), ("somebody/mirror", "dataset", True)]


def test_a_hub_that_cannot_be_reached_says_what_to_do(monkeypatch):
    import huggingface_hub

    def fail(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(DataError, match="reward-bench cannot be fetched from the hub: no route to host; download"):
        load_benchmark("rewardbench")


@pytest.mark.parametrize("name", NAMES)
def test_scores_of_a_file_give_the_metrics_as_json_and_a_picture(tmp_path, capsys, name):
    benchmark, _ = small(name, tmp_path)
    rewards = random_rewards(benchmark, 1)
    scores = published.write_jsonl(tmp_path / "scores" / "mine.jsonl", [{"rewards": r, "note": 1} for r in rewards])
    outputs = Outputs(tmp_path / "out.json", tmp_path / "out.png")
    measure_scores(scores, name, str(tmp_path), outputs)
    report = json.loads(outputs.json.read_text())
    wanted = values_of(benchmark.metrics(rewards))
    assert report["benchmark"] == name and report["rows"] == report["scored"] == len(benchmark.rows)
    assert report["metrics"] == wanted and set(report["intervals"]) == set(wanted)
    assert [row["rewards"] for row in report["scores"]] == rewards
    assert outputs.png.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert f"{100 * wanted['overall']:.2f}" in printed and "mine" in printed and "Claude" in printed


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not JSON"),
        ('{"reward": [1, 2]}', '"rewards" is missing or null, wanted a list of 2 numbers'),
        ("[1, 2]", '"rewards" is a list, wanted a list of 2 numbers'),
        ('{"rewards": [1]}', '"rewards" has 1 numbers, wanted 2'),
        ('{"rewards": [1, 2, 3]}', '"rewards" has 3 numbers, wanted 2'),
        ('{"rewards": [1, NaN]}', r'"rewards\[1\]" is a number \(nan\), wanted a finite number'),
        ('{"rewards": [null, 2]}', r'"rewards\[0\]" is missing or null'),
        ('{"rewards": ["1", 2]}', r'"rewards\[0\]" is text'),
        ('{"rewards": [true, 2]}', r'"rewards\[0\]" is a boolean'),
        ('{"rewards": [1, -Infinity]}', r'"rewards\[1\]" is a number \(-inf\), wanted a finite number'),
        ('{"rewards": [1' + 400 * "0" + ", 2]}", r'"rewards\[0\]" is a number, wanted a finite number'),
    ],
)
def test_a_line_of_scores_that_is_wrong_is_named(tmp_path, line, message):
    small("vl_rewardbench", tmp_path)
    lines = ['{"rewards": [1, 2]}'] * len(VL_IDS)
    lines[4] = line
    scores = tmp_path / "s.jsonl"
    scores.write_text("\n".join(lines))
    with pytest.raises(DataError, match=f"s.jsonl:5: .*{message}"):
        measure_scores(scores, "vl_rewardbench", str(tmp_path / "data.jsonl"), Outputs())


def test_lines_of_scores_end_at_line_breaks_alone(tmp_path, capsys):
    """JSON may hold other separators, such as U+2028, as they are; blank lines, CRLF and a BOM are no rows."""
    small("vl_rewardbench", tmp_path)
    line = json.dumps({"id": "a\u2028b\x85c", "rewards": [1, 2]}, ensure_ascii=False)
    scores = tmp_path / "s.jsonl"
    scores.write_bytes(("\ufeff" + "\r\n\r\n".join([line] * len(VL_IDS)) + "\r\n").encode())
    measure_scores(scores, "vl_rewardbench", str(tmp_path / "data.jsonl"), Outputs())
    # A file that is not whole stands beside published figures under its number of rows.
    assert f"{len(VL_IDS)} rows │" in capsys.readouterr().out.split("beside published")[1]


def test_too_few_lines_of_scores_are_refused(tmp_path):
    small("vl_rewardbench", tmp_path)
    scores = published.write_jsonl(tmp_path / "s.jsonl", [{"rewards": [1, 2]}] * 8)
    with pytest.raises(DataError, match=r"has 8 lines of rewards, wanted 9: one for each row of .*data.jsonl"):
        measure_scores(scores, "vl_rewardbench", str(tmp_path / "data.jsonl"), Outputs())


def test_an_output_that_cannot_be_made_is_refused_before_the_work(tmp_path):
    with pytest.raises(StorageError, match="there is no folder"):
        measure_scores(tmp_path / "none", "rewardbench", None, Outputs(png=tmp_path / "none" / "a.png"))


OPTIONS = ScoringOptions(
    images=None, data_format="auto", tokens_per_pack=2048, num_workers=0, device="cpu", dtype="fp32",
    max_image_pixels=10**6, max_image_bytes=10**6,
)  # fmt: skip


@pytest.mark.parametrize(
    ("models", "data", "given", "message"),
    [
        ((), "pairs.jsonl", {}, "name a model: fastrm eval MODEL... DATA"),
        (("m",), "pairs.jsonl", {"png_out": Path("a.png")}, "--png is for a benchmark"),
        (("m",), "pairs.jsonl", {"bench_data": "x"}, "--data is for a benchmark"),
        ((), "pairs.jsonl", {"scores": Path("s")}, "--scores is for a benchmark"),
        (("m",), "bench:rm_bench", {"scores": Path("s")}, "--scores takes the place of models"),
        ((), "bench:rm_bench", {"scores": Path("s"), "images": "x"}, "leave them and their options out"),
    ],
    ids=["no model", "png", "data", "scores", "scores and model", "scores and images"],
)
def test_options_that_do_not_go_together_are_refused(models, data, given, message):
    options = replace(OPTIONS, images=given.pop("images", None))
    given = {"bench_data": None, "scores": None, "json_out": None, "png_out": None} | given
    with pytest.raises(ConfigError, match=message):
        evaluate(ModelChoice(models), data, options, **given)


@pytest.mark.parametrize("name", NAMES)
def test_published_rows_name_the_five_models_and_a_source_for_every_figure(tmp_path, name):
    benchmark, _ = small(name, tmp_path)
    rows = published_rows(name)
    models = " ".join(row.model for row in rows)
    assert all(word in models for word in ("BaseReward", "R1-Reward", "MM-RLHF-Reward", "IXC-2.5-Reward", "Claude-3.7"))
    metrics = values_of(benchmark.metrics(random_rewards(benchmark, 0)))
    assert all(set(row.figures) <= set(metrics) and bool(row.figures) == bool(row.source) for row in rows)


def test_published_figures_are_fractions_of_the_benchmarks_counts():
    """A slip of the pen in a table would hardly be a count of 170 rows or 46 ids."""
    for row in published_rows("mm_rlhf_rewardbench"):
        if row.model == "MM-RLHF-Reward":
            continue  # printed without decimals
        for metric, count in (("acc", 170), ("acc_plus", 46)):
            right = round(row.figures[metric] / 100 * count)
            assert round(100 * right / count, 2) == row.figures[metric], row

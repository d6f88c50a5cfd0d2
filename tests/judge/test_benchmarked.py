"""A benchmark's own figures for judges and critics: those of reward models, by the same code."""

import json
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import yaml

from fastrm.ablate.results import flat_report
from fastrm.errors import DataError
from fastrm.evaluate.benchmarks.metrics import bootstrap, mean_of, values_of
from fastrm.evaluate.command import measure_scores
from fastrm.evaluate.options import JudgeTexts, Outputs, RowOptions
from fastrm.judge.benchmarked import measure_benchmark
from fastrm.judge.command import JudgeOptions, evaluate_judge
from fastrm.prompts.spec import load_spec
from tests.helpers.benchmark_files import NAMES, SMALL, random_rewards, small, write_jsonl

PAIRS = ["mm_rlhf_rewardbench", "multimodal_rewardbench", "rewardbench", "vl_rewardbench"]
ONE, TWO, NONE = "<answer>1</answer>", "<answer>2</answer>", "I cannot say."


def ids(benchmark):
    seen, found = {}, []
    for row in benchmark.rows:
        seen[row.id] = number = seen.get(row.id, 0) + 1
        found.append(row.id if number == 1 else f"{row.id}#{number}")
    return found


def judged(folder, name, texts, judge="judge:r1_reward"):
    out = folder / "out.json"
    written = JudgeTexts(write_jsonl(folder / "texts.jsonl", texts))
    evaluate_judge([judge], f"bench:{name}", JudgeOptions(RowOptions(), written, str(folder / "bench"), out))
    return json.loads(out.read_text())


def scored(folder, name, rewards):
    """The report that a reward model with these rewards has."""
    scores, out = write_jsonl(folder / "scores.jsonl", [{"rewards": row} for row in rewards]), folder / "scores.json"
    measure_scores(scores, f"bench:{name}", str(folder / "bench"), Outputs(json=out))
    return json.loads(out.read_text())


def of_order(benchmark, said, *, winner_first):
    """The rewards that verdicts of one order stand for: 1 for the winner if it was called better."""
    rows = []
    for row, texts in zip(benchmark.rows, said, strict=True):
        order = (row.best, 1 - row.best) if winner_first else (1 - row.best, row.best)
        verdict = {ONE: 0, TWO: 1}.get(texts[order])
        is_right = verdict is not None and order[verdict] == row.best
        rows.append([float(is_right and place == row.best) for place in (0, 1)])
    return rows


@pytest.mark.parametrize("name", PAIRS)
def test_a_judge_s_figures_of_a_benchmark_are_the_means_of_both_orders(tmp_path, name, capsys):
    benchmark, rows = small(name, tmp_path / "bench")
    generator = np.random.default_rng(3)
    said = [{order: str(generator.choice([ONE, TWO, NONE])) for order in ((0, 1), (1, 0))} for _ in benchmark.rows]
    texts = [
        {"id": one, "order": order, "text": text}
        for one, own in zip(ids(benchmark), said, strict=True)
        for order, text in own.items()
    ]
    found = judged(tmp_path, name, texts)
    orders = [of_order(benchmark, said, winner_first=first) for first in (True, False)]
    naive = [SMALL[name][3](rows, rewards) for rewards in orders]
    for metric in naive[0]:
        wanted = (naive[0][metric] + naive[1][metric]) / 2
        assert found["metrics"][metric] == pytest.approx(wanted, abs=1e-12), metric
    assert found["rows"] == found["scored"] == len(rows) and found["partial"] is False
    assert set(found["metrics"]) == set(scored(tmp_path, name, orders[0])["metrics"])
    if name != "rewardbench":  # whose overall is a mean of sections
        assert found["metrics"]["overall"] == pytest.approx(found["accuracy"])
    assert benchmark.title in capsys.readouterr().out


@pytest.mark.parametrize("name", PAIRS)
def test_intervals_of_the_mean_of_two_evaluations_are_drawn_over_the_same_rows(tmp_path, name):
    benchmark, _ = small(name, tmp_path)
    first, second = (benchmark.metrics(random_rewards(benchmark, seed)) for seed in (0, 1))
    same = mean_of(first, first)
    assert values_of(same) == values_of(first)
    assert bootstrap(same, num_resamples=50) == bootstrap(first, num_resamples=50)
    both, (a, b) = values_of(mean_of(first, second)), map(values_of, (first, second))
    assert both == pytest.approx({one: (a[one] + b[one]) / 2 for one in a}, nan_ok=True)
    assert (same["acc"] is same["overall"]) == (first["acc"] is first["overall"])


@pytest.mark.parametrize("name", NAMES)
def test_a_critic_has_the_figures_of_a_reward_model_with_its_rewards(tmp_path, name):
    benchmark, _ = small(name, tmp_path / "bench")
    rewards = random_rewards(benchmark, 2)
    names = ids(benchmark)
    given = [{"id": name, "rewards": row} for name, row in zip(names, rewards, strict=True)]
    records = [replace(record, id=name) for record, name in zip(benchmark.records, names, strict=True)]
    figures, evaluation = measure_benchmark(load_spec("mm_rlhf_reward"), benchmark, records, {}, given)
    wanted = scored(tmp_path, name, rewards)
    for key in ("metrics", "intervals", "rows", "scored", "partial"):
        assert json.loads(json.dumps(figures[key])) == wanted[key], key
    assert evaluation.rewards == dict(enumerate(rewards))


@pytest.mark.parametrize("name", ["rewardbench2", "rm_bench"])
def test_figures_that_verdicts_of_pairs_cannot_give_are_null_with_a_note(tmp_path, name, capsys):
    benchmark, _ = small(name, tmp_path / "bench")
    texts = [
        {"id": record.id, "order": order, "text": ONE}
        for record in benchmark.records
        for one in record.preferences
        for order in ((one.winner, one.loser), (one.loser, one.winner))
    ]
    found = judged(tmp_path, name, texts)
    assert found["accuracy"] == 0.5 and found["preferences"] > len(benchmark.rows)
    assert set(found["metrics"].values()) == {None} and "overall" in found["metrics"]
    assert "each preference counts" in found["metrics_note"]
    assert "each preference counts in accuracy" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", ["rewardbench2", "rm_bench"])
def test_a_tournament_gives_the_benchmark_s_own_figures(tmp_path, name):
    benchmark, _ = small(name, tmp_path / "bench")
    spec = tmp_path / "own.yaml"
    spec.write_text(yaml.safe_dump({"extends": "r1_reward", "order": "round_robin"}))
    texts = [
        {"id": record.id, "order": order, "text": ONE if order[0] < order[1] else TWO}
        for record in benchmark.records
        for order in permutations(range(len(record.responses)), 2)
    ]
    found = judged(tmp_path, name, texts, f"judge:{spec}")
    assert found["metrics"]["overall"] is not None
    rewards = [row["rewards"] for row in found["rewards"]]
    assert found["metrics"] == scored(tmp_path, name, rewards)["metrics"]


def test_a_grid_has_one_column_for_a_benchmark_of_all_paradigms(tmp_path):
    benchmark, _ = small("vl_rewardbench", tmp_path / "bench")
    texts = [{"id": one, "order": order, "text": ONE} for one in ids(benchmark) for order in ([0, 1], [1, 0])]
    flat = flat_report(judged(tmp_path, "vl_rewardbench", texts))
    reward = flat_report(scored(tmp_path, "vl_rewardbench", random_rewards(benchmark, 0)))
    assert reward.keys() <= flat.keys() and flat["overall"] == flat["accuracy"] == 0.5
    assert flat["position_flip_rate"] == 1.0


def test_rows_that_were_not_judged_are_left_out_and_said(tmp_path):
    benchmark, _ = small("vl_rewardbench", tmp_path / "bench")
    texts = [{"id": one, "order": [benchmark.rows[n].best, 1 - benchmark.rows[n].best], "text": ONE}
             for n, one in enumerate(ids(benchmark)[1:], 1)]  # fmt: skip
    with pytest.raises(DataError, match="partial result"):
        judged(tmp_path, "vl_rewardbench", texts)
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["partial"] is True and found["scored"] == found["rows"] - 1
    assert found["metrics"]["overall"] == found["accuracy"] == 1.0

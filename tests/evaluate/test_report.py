"""`fastrm eval --report` and `--compare`: figures against naive formulas, pages of every kind of data, refusals."""

import json
import math
import re

import numpy as np
import pytest
import torch

from fastrm.config import load_config
from fastrm.data.record import ImageRef
from fastrm.errors import ConfigError, StorageError
from fastrm.evaluate.accuracy import Flips, PairAccuracy, wilson_interval
from fastrm.evaluate.command import evaluate
from fastrm.evaluate.judged import MOST_SHOWN, Judged, bradley_terry_loss, calibration, rank_correlation
from fastrm.evaluate.options import ModelChoice, Outputs, ScoringOptions
from fastrm.evaluate.report_page import evaluation_page
from fastrm.limits import MediaLimits
from fastrm.train.loop import train
from tests.helpers.runs import colour_rows, text_rows, tiny_config, write_rows
from tests.helpers.support import make_image, make_record

LIMITS = MediaLimits()
OPTIONS = ScoringOptions(tokens_per_pack=2048, num_workers=0, device="cpu", dtype="fp32")
NASTY = "<script>document.title = 'taken'</script>"


def judged_of(records, rewards):
    """Judged preferences of records, given each model's rewards: (M, N, R)."""
    judged = Judged(len(rewards))
    for number, record in enumerate(records):
        judged.add(record, [model[number] for model in rewards])
    return judged


def random_case(models=1, count=60, seed=0):
    rng = np.random.default_rng(seed)
    records = [make_record(number, num_responses=2 + number % 3) for number in range(count)]
    rewards = [[rng.normal(0, 2, len(r.responses)).round(1).tolist() for r in records] for _ in range(models)]
    return records, rewards


def pairs_of(records, rewards):
    """(margin, gap in characters) of every preference, one by one."""
    return [
        (
            row[p.winner] - row[p.loser],
            len(record.responses[p.winner].text) - len(record.responses[p.loser].text),
        )
        for record, row in zip(records, rewards, strict=True)
        for p in record.preferences
        if not p.tie
    ]


def test_figures_are_those_of_naive_formulas():
    records, rewards = random_case(models=2)
    judged = judged_of(records, rewards)
    for number, model in enumerate(rewards):
        margins = [margin for margin, _ in pairs_of(records, model)]
        assert judged.margins[:, number].tolist() == margins
        accuracy = PairAccuracy()
        for record, row in zip(records, model, strict=True):
            accuracy.add(record, row)
        assert judged.right[:, number].mean() == accuracy.accuracy
        loss = -torch.nn.functional.logsigmoid(torch.tensor(margins, dtype=torch.float64)).mean()
        assert bradley_terry_loss(judged.margins[:, number]) == pytest.approx(float(loss), rel=1e-12)
    assert judged.gaps.tolist() == [gap for _, gap in pairs_of(records, rewards[0])]
    responses = [(r, len(a.text)) for record, row in zip(records, rewards[0], strict=True)
                 for a, r in zip(record.responses, row, strict=True)]  # fmt: skip
    assert judged.responses.tolist() == [list(pair) for pair in responses]


def test_calibration_is_that_of_a_loop():
    margins = np.append(np.random.default_rng(3).normal(0.5, 2, 500), [0.0, 1000.0, -1000.0])
    bins, error = calibration(margins)
    found = {}
    for margin in margins.tolist():
        if margin:
            predicted = 1 / (1 + math.exp(-abs(margin)))
            place = next(n for n in range(10) if predicted < 0.55 + 0.05 * n or n == 9)
            found.setdefault(place, []).append((predicted, margin > 0))
    expected = [(*np.mean(found[place], axis=0), len(found[place])) for place in sorted(found)]
    assert np.array(bins) == pytest.approx(np.array(expected))
    assert error == pytest.approx(sum(n * abs(p - f) for p, f, n in expected) / (len(margins) - 1))
    assert calibration(np.zeros(4))[0] == [] and math.isnan(calibration(np.zeros(4))[1])


def test_rank_correlation_is_pearsons_of_mean_ranks():
    rng = np.random.default_rng(5)
    first, second = rng.integers(0, 9, 80).astype(float), rng.integers(0, 9, 80).astype(float)
    ranks = [
        [(sum(o < v for o in values) + sum(o <= v for o in values) + 1) / 2 for v in values]
        for values in (first, second)
    ]
    assert rank_correlation(first, second) == pytest.approx(np.corrcoef(ranks)[0, 1])
    assert math.isnan(rank_correlation(first, np.ones(80))) and math.isnan(rank_correlation(first[:1], second[:1]))


@pytest.mark.parametrize("gained, lost", [(0, 0), (1, 0), (3, 9), (9, 3), (20, 21), (30, 4)])
def test_mcnemars_test_is_the_sum_of_binomial_probabilities(gained, lost):
    total = gained + lost
    as_far = [k for k in range(total + 1) if abs(k - total / 2) >= abs(gained - total / 2)]
    expected = sum(math.comb(total, k) for k in as_far) / 2**total
    assert Flips(100, 50, lost, gained).p_value == pytest.approx(expected)


def test_the_most_confident_mistakes_are_shown_first():
    records, rewards = random_case(count=200)
    margins = sorted(margin for margin, _ in pairs_of(records, rewards[0]) if margin <= 0)
    shown = judged_of(records, rewards).shown
    assert len(margins) > MOST_SHOWN == len(shown)
    assert [winner - loser for ((winner, loser),) in (one.rewards for one in shown)] == margins[:MOST_SHOWN]


def test_of_two_models_the_preferences_on_which_they_differ_are_shown():
    records, rewards = random_case(models=2, count=15)
    judged = judged_of(records, rewards)
    pairs = [[margin for margin, _ in pairs_of(records, model)] for model in rewards]
    differ = [(a, b) for a, b in zip(*pairs, strict=True) if (a > 0) != (b > 0)]
    found = [tuple(winner - loser for winner, loser in one.rewards) for one in judged.shown]
    assert 0 < len(differ) < MOST_SHOWN and sorted(found) == sorted(differ)
    assert [abs(a - b) for a, b in found] == sorted((abs(a - b) for a, b in differ), reverse=True)
    comparison = judged.comparison()
    assert comparison["only_first_right"] == sum(a > 0 >= b for a, b in differ)
    assert comparison["only_second_right"] == sum(b > 0 >= a for a, b in differ)
    assert comparison["both_right"] == sum(a > 0 and b > 0 for a, b in zip(*pairs, strict=True))


def page_of(judged, names=("model",)):
    return evaluation_page(judged, names, "data.jsonl", LIMITS)


@pytest.mark.parametrize("models", [1, 2])
@pytest.mark.parametrize(
    "rewards", [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1e300, -1e300]], ids=["right", "wrong", "equal", "huge"]
)
def test_a_page_of_one_preference_has_everything_in_its_place(models, rewards):
    page = page_of(judged_of([make_record(1)], [[rewards]] * models), ("a", "b")[:models])
    assert "NaN" not in page and ">nan<" not in page and ">inf<" not in page
    shows = models == 1 and rewards[0] <= rewards[1]
    assert page.count("<article>") == int(shows) and ("There are none." in page) == (not shows)


def test_texts_are_escaped_and_a_missing_image_is_named():
    good = make_record(1, prompt=NASTY, images=(make_image(60, 40),))
    bad = make_record(2, images=(ImageRef(path="/none/at/all.png"),))
    page = page_of(judged_of([good, bad], [[[0.0, 1.0], [0.0, 1.0]]]), (NASTY,))
    assert NASTY not in page and page.count("&lt;script&gt;") == 3  # below the title, in the summary, in the prompt
    assert page.count('src="data:image/jpeg') == 1 and "(IMAGE_MISSING)" in page


def test_intervals_of_sources_categories_and_lengths_are_in_the_page():
    records, rewards = random_case()
    judged = Judged()
    for number, (record, row) in enumerate(zip(records, rewards[0], strict=True)):
        judged.add(record, [row], f"kind {number % 2}")
    page = page_of(judged)
    for label in ("kind 0", "kind 1"):
        right = judged.right[np.array(judged.categories) == label, 0]
        low, high = wilson_interval(int(right.sum()), len(right))
        cells = [label, str(len(right)), f"{right.mean():.4f}", f"{low:.4f} - {high:.4f}"]
        assert re.search("</td>".join(f"<td[^>]*>{cell}" for cell in cells), page)
    longer = judged.right[judged.gaps > 0, 0]
    assert re.search(f"<td>longer</td><td[^>]*>{len(longer)}</td><td[^>]*>{longer.mean():.4f}<", page)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models and two kinds of data."""
    folder = tmp_path_factory.mktemp("evaluated")
    for seed, name in enumerate("ab"):
        run = {"max_steps": 2, "seed": seed, "dir": str(folder / name)}
        train(load_config(tiny_config(folder, colour_rows(folder), run=run)))
    write_rows(folder / "texts.jsonl", text_rows(12))
    return folder


def models(folder, names, **settings):
    return ModelChoice(tuple(folder / name / "model" for name in names), **settings)


def run(choice, data, outputs=None, **given):
    evaluate(choice, str(data), OPTIONS, outputs or Outputs(), **{"bench_data": None, "scores": None} | given)


def test_the_report_has_the_figures_that_are_printed(folder, tmp_path, capsys):
    outputs = Outputs(json=tmp_path / "out.json", report=tmp_path / "report.html")
    run(models(folder, "a"), folder / "colours.jsonl", outputs)
    report, page = json.loads((tmp_path / "out.json").read_text()), (tmp_path / "report.html").read_text()
    assert f"{report['accuracy']:.4f}" in page and f"{report['accuracy']:.4f}" in capsys.readouterr().out
    assert all(f"<td>{source}</td>" in page for source in report["sources"])
    wrong = round((1 - report["accuracy"]) * report["preferences"])
    assert page.count("<article>") == min(wrong, MOST_SHOWN) > 0


def test_two_models_are_compared_and_are_no_ensemble(folder, tmp_path, capsys):
    outputs = Outputs(json=tmp_path / "out.json", report=tmp_path / "report.html")
    run(models(folder, "ab", compare=True), folder / "colours.jsonl", outputs)
    said, report = " ".join(capsys.readouterr().out.split()), json.loads((tmp_path / "out.json").read_text())
    assert "Two models compared" in said and "ensemble" not in said and "McNemar's exact test" in said
    for name, member in zip("ab", report["members"], strict=True):
        run(models(folder, name), folder / "colours.jsonl", Outputs(json=tmp_path / f"{name}.json"))
        assert json.loads((tmp_path / f"{name}.json").read_text())["accuracy"] == member["accuracy"]
    found = report["comparison"]
    assert set(report) == {"models", "comparison", "members", "refused"}
    for member, only in zip(report["members"], ("only_first_right", "only_second_right"), strict=True):
        assert found["both_right"] + found[only] == round(member["accuracy"] * found["preferences"])
    assert "Where the models differ" in (tmp_path / "report.html").read_text()


def test_a_benchmark_has_a_report_and_a_comparison(folder, tmp_path, capsys):
    row = {
        "id": 1,
        "prompt": "2 + 2?",
        "chosen": ["4", "It is 4.", "**4**"],
        "rejected": ["5", "It is 5.", "**5**"],
        "domain": "math",
    }
    (tmp_path / "total_dataset.json").write_text(json.dumps([row]))
    outputs = Outputs(json=tmp_path / "out.json", report=tmp_path / "report.html")
    run(models(folder, "ab", compare=True), "bench:rm_bench", outputs, bench_data=str(tmp_path))
    assert json.loads((tmp_path / "out.json").read_text())["comparison"]["preferences"] == 9
    assert "ensemble" not in capsys.readouterr().out and "<td>math</td>" in (tmp_path / "report.html").read_text()
    (tmp_path / "scores.jsonl").write_text(json.dumps({"rewards": [3, 3, 1, 1, 2, 4]}))
    outputs = Outputs(report=tmp_path / "scores.html")
    run(ModelChoice(), "bench:rm_bench", outputs, bench_data=str(tmp_path), scores=tmp_path / "scores.jsonl")
    assert (tmp_path / "scores.html").read_text().count(
        "<article>"
    ) == 5  # 3 < 4 twice, 1 = 1, 1 < 2, 1 < 4


@pytest.mark.parametrize("data", ["data.jsonl", "bench:rm_bench"])
def test_a_report_that_cannot_be_written_is_refused_before_the_model_is_loaded(tmp_path, data):
    """Neither the model nor the data is there: what is named is what was looked at first."""
    for report in (tmp_path / "none" / "report.html", tmp_path):
        with pytest.raises(StorageError, match=r"there is no folder|is a folder"):
            run(ModelChoice((tmp_path / "model",)), data, Outputs(report=report))


@pytest.mark.parametrize(
    "names, settings",
    [
        ("a", {}),
        ("abc", {}),
        ("ab", {"combine": "mean"}),
        ("ab", {"route": "text=c"}),
        ("ab", {"validation": "v.jsonl"}),
    ],
    ids=str,
)
def test_a_comparison_is_of_two_models_and_combines_none(tmp_path, names, settings):
    with pytest.raises(ConfigError, match=rf"got {len(names)}, wanted fastrm eval A B DATA --compare"):
        run(models(tmp_path, names, compare=True, **settings), "data.jsonl")

"""Runs on ratings, on rankings and with margins: from rows to steps, evaluations and reports."""

import json

import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import pearsonr, spearmanr

from fastrm.config import load_config
from fastrm.data.quarantine import Quarantine
from fastrm.data.show import show_record
from fastrm.data.sources import read_source
from fastrm.errors import ConfigError
from fastrm.evaluate.ratings import RatingMeter
from fastrm.evaluate.reward_model import RewardModel
from fastrm.share.card import make_card
from fastrm.train.metrics import read_rows
from tests.helpers.runs import fastrm, fastrm_here, run, text_rows, tiny_config, write_rows

WORDS = ("bad", "poor", "fair", "good", "great")


def rated_rows(count, layout="rows"):
    """Ratings from 1 to 5 that the response's own word tells; of each layout that holds them."""
    rows = []
    for n in range(count):
        scores = [n % 5 + 1, (n + 2) % 5 + 1, (n + 3) % 5 + 1]
        texts = [f"it is {WORDS[score - 1]}" for score in scores]
        prompt = f"How is number {n}?"
        if layout == "rows":
            rows += [{"prompt": prompt, "response": text, "rating": s} for text, s in zip(texts, scores, strict=True)]
        elif layout == "list":
            pairs = zip(texts, scores, strict=True)
            rows.append({"prompt": prompt, "responses": [{"text": text, "score": score} for text, score in pairs]})
        else:
            rows.append({"prompt": prompt, "responses": texts, "scores": scores})
    return rows


def rating_config(folder, train, evaluation=None, **sections):
    """A run on ratings: every source gives them."""
    sections = {"loss": {"kind": "mse"}, **sections}
    path = tiny_config(folder, train, evaluation, **sections)
    overrides = ["data.train.0.pairs=ratings"]
    return path, overrides + (["data.eval.0.pairs=ratings"] if evaluation is not None else [])


def read(path, **options):
    quarantine = Quarantine(None)
    return list(read_source(path, quarantine=quarantine, **options)), quarantine


@pytest.mark.parametrize("layout", ["rows", "list", "scores"])
def test_ratings_are_read_from_each_layout_that_holds_them(tmp_path, layout):
    records, quarantine = read(write_rows(tmp_path / "rows.jsonl", rated_rows(2, layout)), pairs="ratings")
    assert quarantine.total == 0 and [len(record.responses) for record in records] == [3, 3]
    first = records[0]
    assert [(p.winner, p.loser, p.margin, p.tie) for p in first.preferences] == [
        (0, 0, 1.0, False), (1, 1, 3.0, False), (2, 2, 4.0, False),
    ]  # fmt: skip


def test_one_rated_response_is_enough_and_rows_without_a_rating_are_named(tmp_path):
    rows = [
        {"prompt": "a", "response": "b", "score": 2.5},
        {"prompt": "c", "response": "d", "score": None},
        {"prompt": "e", "responses": [{"text": "f", "score": 1}, {"text": "g"}]},
        {"prompt": "h", "chosen": "i", "rejected": "j"},
        {"prompt": "k", "response": "l", "score": float("inf")},
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    records, quarantine = read(path, pairs="ratings")
    assert [record.preferences[0].margin for record in records] == [2.5]
    assert quarantine.counts == {"BAD_ROW": 1, "BAD_PREFERENCE": 2, "NO_SCORES": 1}


def test_a_model_learns_ratings_and_its_evaluation_is_scipys(tmp_path):
    train = write_rows(tmp_path / "train.jsonl", rated_rows(40))
    held_out = write_rows(tmp_path / "eval.jsonl", rated_rows(8, "list"))
    path, overrides = rating_config(
        tmp_path, train, held_out, run={"max_steps": 60, "eval_every": 30}, optim={"lr": 1e-2, "batch_pairs": 24}
    )
    summary = run(path, *overrides)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    first, last = (row for row in rows if "eval/mse" in row)
    assert last["eval/mse"] < first["eval/mse"] and last["eval/mse"] == pytest.approx(last["eval/loss"], rel=1e-5)
    assert last["eval/spearman"] > 0.9 and last["eval/pearson"] > 0.9
    model = RewardModel.from_pretrained(tmp_path / "run" / "model", device="cpu")
    groups = rated_rows(8, "scores")
    scored = model.score([{key: group[key] for key in ("prompt", "responses")} for group in groups])
    rewards = [reward for group in scored for reward in group]
    ratings = [score for group in groups for score in group["scores"]]
    assert last["eval/pearson"] == pytest.approx(pearsonr(rewards, ratings).statistic, abs=1e-5)
    assert last["eval/spearman"] == pytest.approx(spearmanr(rewards, ratings).statistic, abs=1e-5)
    errors = [(reward - rating) ** 2 for reward, rating in zip(rewards, ratings, strict=True)]
    assert last["eval/mse"] == pytest.approx(sum(errors) / len(errors), rel=1e-4)
    assert summary["eval_accuracy"] is None and summary["eval_mse"] == last["eval/mse"]
    assert last["eval/sources"]["eval"]["ratings"] == 24
    assert not any("rewards/accuracies" in row or "eval/accuracy" in row for row in rows)
    assert (tmp_path / "run" / "report.png").stat().st_size > 10_000


def test_a_run_on_ratings_resumes_to_the_bit(tmp_path):
    train = write_rows(tmp_path / "train.jsonl", rated_rows(12))
    settings = {"run": {"max_steps": 4, "save_every": 2, "keep_checkpoints": 9}}
    path, overrides = rating_config(tmp_path, train, train, **settings)
    run(path, *overrides)
    middle = tmp_path / "run" / "checkpoints" / "step-00000002"
    run(path, *overrides, f"run.dir={tmp_path / 'again'}", resume=str(middle))
    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", ["hinge", "plackett_luce"])
def test_rankings_train_by_other_losses_and_their_accuracy_rises(tmp_path, kind):
    data = write_rows(tmp_path / "rows.jsonl", rated_rows(24, "list"))
    settings = {"loss": {"kind": kind}, "optim": {"lr": 1e-2, "batch_pairs": 24}, "run": {"max_steps": 30}}
    summary = run(tiny_config(tmp_path, data, data, **settings))
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert summary["eval_accuracy"] > 0.9 and rows[-2]["loss"] < 0.5 * rows[0]["loss"]


def test_margins_are_the_difference_of_ratings_times_a_factor(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", rated_rows(1, "list"))  # scores 1, 3, 4
    strong = {"context": [{"role": "user", "content": "a"}], "response1": "b", "response2": "c"}
    graded = write_rows(tmp_path / "graded.jsonl", [{**strong, "overall_preference": -2}])
    summary = {}
    for name, margin in (("none", None), ("half", 0.5)):
        folder = tmp_path / name
        folder.mkdir()
        overrides = [] if margin is None else [f"data.train.0.margin={margin}"]
        run(tiny_config(folder, path, run={"max_steps": 1}), *overrides)
        summary[name] = read_rows(folder / "run" / "metrics.jsonl")[0]["loss"]
    assert summary["half"] > summary["none"]
    from fastrm.data.prepared.units import open_source
    from fastrm.data_config import SourceConfig

    def margins(path, **options):
        (file,) = open_source(SourceConfig(path=str(path), **options))
        (record,) = file.read()
        return sorted((p.winner, p.loser, p.margin) for p in record.preferences)

    assert margins(path) == [(1, 0, 0.0), (2, 0, 0.0), (2, 1, 0.0)]
    assert margins(path, margin=0.5) == [(1, 0, 1.0), (2, 0, 1.5), (2, 1, 0.5)]
    assert margins(graded) == [(0, 1, 0.0)] and margins(graded, margin=0.5) == [(0, 1, 1.0)]


@pytest.mark.parametrize(
    "settings, message",
    [
        (["loss.kind=mse"], "loss.kind mse is of ratings, and data.train.0 gives pairs; set data.train.0.pairs: rat"),
        (["data.train.0.pairs=ratings"], "data.train.0.pairs: ratings gives no preferences, which loss.kind bradley"),
        (["data.train.0.pairs=ratings", "data.train.0.margin=1.0"], "margin is of pairs, and pairs: ratings makes no"),
        (["loss.kind=mse", "loss.ties=half"], "loss.ties is no part of loss.kind mse; leave it out"),
        (["loss.kind=plackett_luce", "loss.ties=half"], "loss.ties is no part of loss.kind plackett_luce"),
        (["loss.kind=hinge", "loss.label_smoothing=0.1"], "loss.label_smoothing is no part of loss.kind hinge"),
        (["loss.kind=plackett_luce", "optim.group_weight=group"], "set optim.group_weight: preference"),
        (["loss.kind=rank"], "loss.kind: got 'rank'"),
        (["loss.kind=mse", "data.train.0.pairs=ratings"], "digits:eval: its preferences have no scores"),
        (
            ["loss.kind=mse", "data.train.0.pairs=ratings", "run.early_stopping={patience: 1}", "run.eval_every=1",
             "data.eval=[{path: 'digits:eval', pairs: ratings}]"],
            "run.early_stopping.metric: got 'eval/accuracy', which no evaluation makes; there are eval/loss, eval/mse",
        ),
        (["data.train.0.margin=0.5"], "digits:eval: its preferences have no scores"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_what_does_not_go_together_is_refused(tmp_path, capfd, settings, message):
    code, said = fastrm_here(capfd, "train", tiny_config(tmp_path, "digits:eval"), *settings)
    assert code in (64, 65) and message in said and json.loads(said.splitlines()[-1])["exit_code"] == code


def test_a_row_of_one_rated_response_is_told_what_to_set(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "response": "b", "score": 2.5}, *text_rows(1)])
    _, quarantine = read(rows)
    assert quarantine.counts == {"NO_PREFERENCE": 1}
    said = fastrm("data", "check", rows, "--max-refused", "100%").stdout
    assert "pairs: ratings" in " ".join(said.split())


def test_correlations_that_are_not_defined_are_none():
    meter = RatingMeter()
    assert meter.figures() == {"mse": None, "pearson": None, "spearman": None}
    meter._found["a"] = [(1.0, 2.0), (1.0, 3.0)]
    assert meter.figures() == {"mse": 2.5, "pearson": None, "spearman": None}


def test_the_best_evaluation_on_ratings_has_the_least_loss(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", rated_rows(12))
    optim = {"lr": 5e-2, "schedule": "constant"}
    settings = {"run": {"max_steps": 4, "eval_every": 1, "export": "best"}, "optim": optim}
    path, overrides = rating_config(tmp_path, data, data, **settings)
    summary = run(path, *overrides)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    losses = {row["step"]: row["eval/loss"] for row in rows if "eval/loss" in row}
    best = min(losses, key=losses.get)
    assert (summary["best_metric"], summary["best_value"]) == ("eval/loss", losses[best])
    assert summary["exported_step"] == best and summary["best_accuracy"] is None


def test_named_sets_of_ratings_have_figures_of_their_own(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", rated_rows(12))
    train, one, two = ([{"path": str(data), "pairs": "ratings"}] for _ in range(3))
    path = tiny_config(
        tmp_path, "unused", data={"train": train, "eval": {"one": one, "two": two}}, loss={"kind": "mse"},
        run={"max_steps": 2, "eval_every": 1, "early_stopping": {"metric": "eval/two/mse"}},
    )  # fmt: skip
    summary = run(path)
    last = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "eval/mse" in row][-1]
    assert summary["eval_by_set"] == {"one": last["eval/one/mse"], "two": last["eval/two/mse"]}
    assert last["eval/one/mse"] == pytest.approx(last["eval/mse"]) and "eval/one/accuracy" not in last
    with pytest.raises(ConfigError, match=r"data\.eval\.two\.0\.pairs: ratings gives no preferences"):
        load_config(
            path,
            ["loss.kind=hinge", "data.train.0.pairs=all", "data.eval.one.0.pairs=all", "run.early_stopping=null"],
        )


def test_pages_and_cards_tell_ratings(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", rated_rows(4))
    path, overrides = rating_config(tmp_path, data, data, run={"max_steps": 1})
    summary = run(path, *overrides)
    card = make_card("org/name", tmp_path / "run" / "model", tmp_path / "run", None)
    assert f"mean squared error {summary['eval_mse']:.4f}" in card and "Pair accuracy" not in card
    (record, *_), _ = read(data, pairs="ratings")
    labels = [label.partition(":")[0] for label, _ in show_record(record, None).responses]
    assert labels == ["response 1, rated 1", "response 2, rated 3", "response 3, rated 4"]

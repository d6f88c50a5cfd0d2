"""`fastrm eval judge:SPEC --from`: figures of stored generations, computed by hand here."""

import json
from collections import Counter

import pytest

from bench.pretrained.preferences import DATA
from fastrm.errors import ConfigError, DataError
from fastrm.evaluate.benchmarks.benchmark import load_benchmark
from fastrm.evaluate.judge_figures import RIGHT, WRONG, Judged, accuracy
from fastrm.evaluate.options import JudgeTexts, RowOptions
from fastrm.judge.command import JudgeOptions, evaluate_judge
from tests.helpers.runs import fastrm_here, write_rows

ROWS = [{"id": f"r{n}", "prompt": f"{n}?", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(5)]
ONE, TWO, TIE, NOTHING = "<answer>1</answer>", "<answer>2</answer>", "<answer>tie</answer>", "I cannot say."
BOTH_ORDERS = {
    "r0": (ONE, TWO),  # right in both orders
    "r1": (ONE, ONE),  # what is first, whatever it is
    "r2": ("<answer>Response 1</answer>", ONE),  # a failure, and wrong
    "r3": (TWO, ONE),  # wrong in both
    "r4": (TIE, TWO),  # a tie, and right
}


def options(written=None, out=None):
    return JudgeOptions(RowOptions(), JudgeTexts(written), json_out=out)


def lines(texts):
    return [
        {"id": name, "order": order, "text": text}
        for name, pair in texts.items()
        for order, text in zip(([0, 1], [1, 0]), pair, strict=True)
    ]


@pytest.fixture
def run(tmp_path, capsys):
    def run(generations, rows=ROWS, judge="judge:r1_reward"):
        """Return the figures, the error, and what was printed."""
        data, out = write_rows(tmp_path / "pairs.jsonl", rows), tmp_path / "out.json"
        written, error = write_rows(tmp_path / "generations.jsonl", generations), None
        try:
            evaluate_judge([judge], str(data), options(written, out))
        except DataError as found:
            error = str(found)
        printed = capsys.readouterr()
        return json.loads(out.read_text()) if out.exists() else None, error, printed.out + printed.err

    return run


def test_both_orders_and_the_released_rule(run):
    figures, error, printed = run(lines(BOTH_ORDERS))
    assert error is None
    # r0 1, r1 1/2, r2 0, r3 0, r4 1/2
    assert figures["accuracy"] == pytest.approx(2 / 5)
    # chosen first: r0 and r1 are right; the failure, the wrong one and the tie are errors
    assert figures["accuracy_as_released"] == pytest.approx(2 / 5)
    assert (figures["num_parse_failures"], figures["failures"]) == (1, [{"id": "r2", "order": [0, 1]}])
    # of r0, r1, r3, r4, which have a verdict in both orders, r1 turns, and r4 from a tie
    assert figures["position_flip_rate"] == pytest.approx(2 / 4)
    # first places of r0, r1, r1, r2, r3 against second places of r0, r3, r4
    assert figures["first_place_rate"] == pytest.approx(5 / 8)
    assert (figures["ties"], figures["num_generations"], figures["preferences"]) == (1, 10, 5)
    assert "1 of 10" in printed and "0.4000" in printed


def test_the_winner_need_not_be_the_first_response_of_its_row(run):
    rows = [{"id": 7, "prompt": "?", "responses": ["bad", "good", "worst"], "preferences": [[1, 0], [1, 2]]}]
    given = {(1, 0): ONE, (0, 1): TWO, (1, 2): ONE, (2, 1): ONE}
    figures, error, _ = run([{"id": 7, "order": list(order), "text": text} for order, text in given.items()], rows)
    assert error is None and figures["accuracy"] == pytest.approx(3 / 4)
    assert figures["accuracy_as_released"] == 1 and figures["position_flip_rate"] == pytest.approx(1 / 2)


def test_votes_are_decided_by_their_majority(run):
    votes = [*[{"id": "r0", "order": [0, 1], "text": text} for text in (TWO, ONE, ONE, NOTHING)]]
    votes += [{"id": "r0", "order": [1, 0], "text": text} for text in (ONE, TWO)]
    figures, _, _ = run(votes, ROWS[:1])
    assert (figures["accuracy"], figures["ties"], figures["num_parse_failures"]) == (0.5, 1, 1)
    assert figures["interval"] is None  # of one preference


@pytest.mark.parametrize("key", ["same", 7, None])
def test_keys_of_other_programs_mean_nothing(run, key):
    figures, error, _ = run([{**line, "key": key} for line in lines(BOTH_ORDERS)])
    assert error is None and figures["num_generations"] == 10 and figures["accuracy"] == pytest.approx(2 / 5)


def test_rows_that_share_a_question_each_have_its_text(run):
    given = [{**line, "key": "0f" * 32} for line in lines(dict.fromkeys(("r0", "r1"), (ONE, TWO)))]
    given = [line for line in given if line["order"] == [0, 1]]
    figures, error, _ = run(given, ROWS[:2])
    assert error is None and figures["num_generations"] == 2 and figures["accuracy"] == 1


def test_a_pointwise_judge_compares_scores(run):
    scores = {("r0", 0): "8", ("r0", 1): "3", ("r1", 0): "5", ("r1", 1): "5", ("r2", 0): "4", ("r2", 1): "6"}
    given = [{"id": name, "order": [one], "text": f"Score: {score}"} for (name, one), score in scores.items()]
    figures, _, _ = run(given, ROWS[:3], "judge:llava_critic_pointwise")
    assert (figures["accuracy"], figures["ties"]) == (pytest.approx(1 / 3), 1)
    assert figures["position_flip_rate"] is figures["accuracy_as_released"] is None


def test_what_cannot_be_used_is_named_and_nothing_else_is_lost(run, tmp_path):
    bad = [
        {"id": "nobody", "order": [0, 1], "text": ONE}, {"id": "r0", "order": [0, 2], "text": ONE},
        {"id": "r0", "order": [0, 0], "text": ONE}, {"id": "r0", "order": [0, 1]}, ["r0"],
        {"id": "r0", "order": [True, 0], "text": ONE}, {"id": "r0", "order": [0, 1], "text": None},
    ]  # fmt: skip
    good = {name: BOTH_ORDERS[name] for name in ("r0", "r1", "r2", "r3")}
    figures, error, printed = run([*bad, *lines(good)])
    assert figures["accuracy"] == pytest.approx(1.5 / 4) and len(figures["refused"]) == len(bad)
    assert figures["missing"] == ["r4"]
    assert error.startswith("partial result over 4 preferences: 1 preferences were not judged: r4; 7 lines or rows")
    for number, reason in enumerate(
        ("no row of the data has 'nobody'", "row 'r0' has responses 0 to 1", "wanted 2 different numbers", "wanted {",
         "wanted {", "row 'r0' has responses 0 to 1", "got NoneType, wanted a text"), 1,
    ):  # fmt: skip
        assert f"generations.jsonl:{number}: " in figures["refused"][number - 1]
        assert reason in figures["refused"][number - 1] and "refused: " in printed
    with (tmp_path / "generations.jsonl").open("a") as file:
        file.write('{"id": "r4", "order": [0,')
    with pytest.raises(DataError, match="8 lines or rows could not be used"):
        evaluate_judge(["judge:r1_reward"], str(tmp_path / "pairs.jsonl"), options(tmp_path / "generations.jsonl"))


@pytest.mark.parametrize(
    "models, said",
    [
        (["judge:nobody"], "judge:nobody: neither a shipped judge nor a file; wanted one of .*r1_reward"),
        (["judge:r1_reward", "runs/model"], "judge:r1_reward is evaluated alone; got runs/model beside it"),
    ],
)
def test_judges_that_cannot_be_are_named(tmp_path, models, said):
    with pytest.raises(ConfigError, match=said):
        evaluate_judge(models, str(write_rows(tmp_path / "a.jsonl", ROWS)), options(tmp_path / "b"))


def test_data_that_cannot_be_joined_is_named(tmp_path, run):
    twice = [ROWS[0], {**ROWS[0], "prompt": "else?"}]
    _, error, _ = run(lines({"r0": (ONE, TWO)}), twice)
    assert "1 ids stand in several rows" in error and "give each row an id of its own" in error
    _, error, _ = run([], ROWS)
    assert "no preference was judged" in error
    with pytest.raises(DataError, match=r"nothing.jsonl: there is no such file; wanted JSON Lines of"):
        evaluate_judge(["judge:r1_reward"], str(tmp_path / "pairs.jsonl"), options(tmp_path / "nothing.jsonl"))


def test_the_command(tmp_path, capfd):
    data = write_rows(tmp_path / "pairs.jsonl", ROWS)
    written = write_rows(tmp_path / "generations.jsonl", lines(BOTH_ORDERS))
    out = tmp_path / "out.json"
    code, error = fastrm_here(capfd, "eval", "judge:r1_reward", data, "--from", written, "--json", out)
    assert code == 0 and json.loads(out.read_text())["accuracy"] == pytest.approx(0.4), error
    code, error = fastrm_here(capfd, "eval", "somewhere", data, "--from", written)
    assert code == 64 and "--from and --generations are for a judge" in error


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the folder shared/data beside the project")
def test_a_benchmark_whose_published_file_repeats_ids(tmp_path):
    """The judge always calls what is first better."""
    name, file = "bench:vl_rewardbench", DATA / "reward_benches" / "vl_rewardbench.jsonl"
    records = load_benchmark(name, str(file)).records
    seen = Counter()
    texts = []
    for record in records:
        seen[record.id] += 1
        one = record.id if seen[record.id] == 1 else f"{record.id}#{seen[record.id]}"
        texts += [{"id": one, "order": order, "text": ONE} for order in ([0, 1], [1, 0])]
    assert max(seen.values()) > 1
    out = tmp_path / "out.json"
    written = write_rows(tmp_path / "generations.jsonl", texts)
    evaluate_judge(["judge:r1_reward"], name, JudgeOptions(RowOptions(), JudgeTexts(written), str(file), out))
    figures = json.loads(out.read_text())
    assert (figures["accuracy"], figures["accuracy_as_released"]) == (0.5, 1.0)
    assert (figures["position_flip_rate"], figures["first_place_rate"]) == (1.0, 1.0)
    assert (figures["preferences"], figures["num_generations"]) == (len(records), len(texts)) == (1250, 2500)


def test_the_interval_is_drawn_over_rows_whose_preferences_are_not_independent():
    def judged(row, is_right):
        return Judged("s", row, {None: RIGHT if is_right else WRONG})

    single = accuracy([judged(str(row), row % 2) for row in range(8)])
    repeated = accuracy([judged(str(row), row % 2) for row in range(8) for _ in range(6)])
    assert repeated["preferences"] == 48 and repeated["accuracy"] == single["accuracy"] == 0.5
    assert repeated["interval"] == pytest.approx(single["interval"]) and 0 < single["interval"][0] < 0.25
    # Of a row with one preference and one with three, drawn twice: 0, 3 / 4 or 1; never the 1 / 2 of the rows' means.
    low, high = accuracy([judged("a", False), *[judged("b", True)] * 3])["interval"]
    assert (low, high) == (0.0, 1.0) and accuracy([judged("a", False)] * 2)["interval"] is None

"""The bracket of a pairwise judge: its questions round by round, its rewards, its draws and byes."""

import itertools
import json

import pytest

from fastrm.errors import DataError, InterruptedRun
from fastrm.evaluate.options import JudgeTexts, RowOptions
from fastrm.evaluate.reading import read_in_order
from fastrm.judge.bracket import play
from fastrm.judge.command import JudgeOptions, evaluate_judge
from fastrm.judge.endpoint import Endpoint
from fastrm.prompts.verdicts import Verdict
from tests.helpers.chat_server import chat_server, run, text_of, write_spec
from tests.helpers.runs import write_rows


def row(size, name="1"):
    """Return a row whose last response is the longest."""
    responses = ["a" * (number + 1) for number in range(size)]
    return {"id": name, "prompt": "?", "responses": responses, "preferences": [[size - 1, 0]]}


def shown(body):
    first, second = text_of(body).split("[Response 1]:")[1].split("###### [Response 2]:")
    return first.strip(), second.split("######")[0].strip()


def longest(body):
    first, second = shown(body)
    return f"<answer>{1 if len(first) > len(second) else 2}</answer>"


def record_of(folder, size):
    return next(
        iter(read_in_order(str(write_rows(folder / "rows.jsonl", [row(size)])), None, "auto", require_preferences=True))
    )


@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_n_responses_need_n_minus_1_matches_in_both_orders(tmp_path, size):
    with chat_server(longest) as (url, bodies):
        figures = run(tmp_path, write_spec(tmp_path, url, order="bracket"), [row(size)])
    asked = [shown(body) for body in bodies]
    assert len(set(asked)) == len(asked) == 2 * (size - 1) == figures["num_generations"]
    assert all((second, first) in asked for first, second in asked)
    [rewards] = [one["rewards"] for one in figures["rewards"]]
    # The longest survives all rounds, and of those who lost each has a winner that came further.
    assert rewards[-1] == 1 and rewards.count(1) == 1
    for number, reward in enumerate(rewards[:-1]):
        text = "a" * (number + 1)
        assert any(rewards[len(b) - 1] > reward for a, b in asked if a == text and len(b) > len(a))
    met = ("a", "a" * size) in asked
    assert (figures["preferences"], figures["preferences_not_met"]) == ((1, 0) if met else (0, 1))
    assert figures["accuracy"] == (1 if met else None) and figures["missing"] == []


def test_five_responses_by_hand(tmp_path):
    record = record_of(tmp_path, 5)
    texts, asked = {}, []
    while following := play(record, 0, texts).next_round:
        asked.append(following[::2])
        for first, second in following:  # the larger number is better
            texts["1", (first, second)] = [Verdict.FIRST if first > second else Verdict.SECOND]
    # Three byes and one match; two matches; the final.
    assert [len(matches) for matches in asked] == [1, 2, 1]
    rewards = play(record, 0, texts).rewards
    loser = min(asked[0][0])
    semifinals = [min(match) for match in asked[1]]
    expected = {loser: 0.0, **dict.fromkeys(semifinals, pytest.approx(1 / 3)), min(asked[2][0]): pytest.approx(2 / 3)}
    assert dict(enumerate(rewards)) == expected | {4: 1.0}
    assert play(record, 1, {}).next_round != play(record, 0, {}).next_round  # the draw is by the seed


@pytest.mark.parametrize("verdict", [Verdict.FIRST, Verdict.SECOND, Verdict.TIE, None])
def test_a_match_without_a_winner_goes_to_the_earlier_of_the_draw(tmp_path, verdict):
    record, texts = record_of(tmp_path, 4), {}
    first_round = play(record, 0, {}).next_round
    while following := play(record, 0, texts).next_round:
        final = following
        texts |= {("1", order): [verdict] for order in following}
    earliest = first_round[0][0]
    assert earliest in final[0]
    # Without a verdict it goes on, but by the draw alone: that is no reward.
    assert play(record, 0, texts).rewards[earliest] == (1 if verdict is not None else None)
    # One verdict is enough where the other order has none.
    pair = first_round[0]
    texts = {("1", order): [None] for order in first_round} | {("1", pair[::-1]): [Verdict.FIRST]}
    assert pair[1] in {number for order in play(record, 0, texts).next_round for number in order}


def test_a_bracket_that_was_stopped_goes_on_and_is_read_again(tmp_path, monkeypatch):
    rows, write = [row(8), row(3, "2")], Endpoint.write

    def stopping(self, questions):
        for number, answered in enumerate(write(self, questions)):
            if len(questions) < 10 and number == 2:  # in the second round
                raise KeyboardInterrupt
            yield answered

    with chat_server(longest) as (url, bodies):
        judge = write_spec(tmp_path, url, order="bracket", batch=1)
        monkeypatch.setattr(Endpoint, "write", stopping)
        with pytest.raises(InterruptedRun):
            run(tmp_path, judge, rows)
        monkeypatch.undo()
        figures = run(tmp_path, judge, rows)
        # A third text of the second round was written and not kept.
        assert len(bodies) == 2 * 7 + 2 * 2 + 1 and len({shown(body) for body in bodies}) <= 2 * 7 + 2 * 2
    options = JudgeOptions(RowOptions(), JudgeTexts(tmp_path / "texts.jsonl"), json_out=tmp_path / "again.json")
    evaluate_judge([judge], str(tmp_path / "pairs.jsonl"), options)
    assert json.loads((tmp_path / "again.json").read_text()) == figures


def test_a_bracket_that_lacks_a_text_has_no_rewards(tmp_path):
    with chat_server(longest) as (url, _):
        judge = write_spec(tmp_path, url, order="bracket")
        run(tmp_path, judge, [row(4)])
    lines = (tmp_path / "texts.jsonl").read_text().splitlines(True)
    (tmp_path / "texts.jsonl").write_text("".join(lines[:-1]))
    options = JudgeOptions(RowOptions(), JudgeTexts(tmp_path / "texts.jsonl"))
    every = {"preferences": list(itertools.combinations(range(4), 2))}
    with pytest.raises(DataError, match="over 3 preferences: 3 preferences were not judged: 1, 1, 1"):
        evaluate_judge([judge], str(write_rows(tmp_path / "pairs.jsonl", [row(4) | every])), options)


def test_votes_decide_a_match(tmp_path):
    with chat_server(longest) as (url, bodies):
        judge = write_spec(tmp_path, url, order="bracket", votes=3, decoding={"temperature": 1.0})
        assert run(tmp_path, judge, [row(4)])["rewards"][0]["rewards"][3] == 1
    assert len(bodies) == 3 * 2 * 3

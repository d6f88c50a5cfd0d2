"""Rewards of groups: rows without preferences, texts that are missing, and texts without a verdict."""

import itertools
import json
import re
from dataclasses import replace

import pytest

from fastrm.errors import DataError
from fastrm.evaluate.options import JudgeTexts, RowOptions
from fastrm.judge.bracket import play
from fastrm.judge.command import JudgeOptions, evaluate_judge
from fastrm.prompts.verdicts import Verdict
from tests.helpers.chat_server import chat_server, text_of, write_spec
from tests.helpers.runs import fastrm_here, write_rows
from tests.judge.test_bracket import longest, record_of

GROUP = {"id": "g", "prompt": "?", "responses": ["aa", "a", "aaa"]}
NO_IDEA = "no idea"
POINTWISE = {"extends": "llava_critic_pointwise"}


def length(body):
    return f"Score: {text_of(body).split('Response: ')[1].count('a')}"


def measured(folder, capfd, judge, rows, *others):
    """Return (the exit code, the figures, what was printed)."""
    out, data = folder / "out.json", write_rows(folder / "rows.jsonl", rows)
    code, _ = fastrm_here(capfd, "eval", judge, data, "--json", out, *(others or ("--generations", folder / "t.jsonl")))
    return code, json.loads(out.read_text())


@pytest.mark.parametrize(
    "answer, others, rewards",
    [
        (longest, {"order": "round_robin"}, [1 / 2, 0, 1]),
        (longest, {"order": "bracket"}, None),  # by the draw
        (length, POINTWISE, [2, 1, 3]),
    ],
    ids=["round_robin", "bracket", "pointwise"],
)
def test_groups_without_preferences_have_rewards_and_no_accuracy(tmp_path, capfd, answer, others, rewards):
    pair = {"id": "p", "prompt": "?", "chosen": "aaaa", "rejected": "a"}
    with chat_server(answer) as (url, _):
        judge = write_spec(tmp_path, url, **others)
        code, alone = measured(tmp_path, capfd, judge, [GROUP])
        assert code == 0 and (alone["accuracy"], alone["interval"], alone["preferences"]) == (None, None, 0)
        code, beside = measured(tmp_path, capfd, judge, [GROUP, pair])
    assert code == 0 and (beside["accuracy"], beside["preferences"]) == (1, 1)
    [found] = [row["rewards"] for row in alone["rewards"]]
    assert found == pytest.approx(rewards) if rewards else (found[2] == 1 and max(found[:2]) < 1)
    assert beside["rewards"][0] == {"id": "g", "rewards": found} and beside["rewards"][1]["id"] == "p"
    assert alone["rewards_missing"] == beside["rewards_missing"] == beside["refused"] == []


def test_the_table_says_that_there_is_no_accuracy(tmp_path, capsys):
    data = str(write_rows(tmp_path / "rows.jsonl", [GROUP]))
    with chat_server(longest) as (url, _):
        judge = write_spec(tmp_path, url, order="round_robin")
        evaluate_judge([judge], data, JudgeOptions(RowOptions(), JudgeTexts(generations=tmp_path / "t.jsonl")))
    printed = capsys.readouterr().out
    assert "none: no preference was judged" in printed and "rows with rewards" in printed and "1 of 1" in printed


def test_a_judge_that_gives_no_rewards_wants_preferences(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [GROUP])
    texts = JudgeTexts(generations=tmp_path / "t.jsonl")
    with chat_server(longest) as (url, bodies):
        said = r"no preference was judged; .*rows.jsonl:1: .*NO_PREFERENCE\); with order: round_robin"
        with pytest.raises(DataError, match=said):
            evaluate_judge([write_spec(tmp_path, url)], str(rows), JudgeOptions(RowOptions(), texts))
        assert bodies == []


def test_rollouts_may_be_empty_or_alone(tmp_path, capfd):
    rows = [{**GROUP, "responses": ["aa", "", "a"]}, {"id": "1", "prompt": "?", "responses": ["a"]}]
    with chat_server(length) as (url, _):
        code, figures = measured(tmp_path, capfd, write_spec(tmp_path, url, **POINTWISE), rows)
    assert code == 0 and [row["rewards"] for row in figures["rewards"]] == [[2, 0, 1], [1]]
    (tmp_path / "t.jsonl").unlink()
    with chat_server(longest) as (url, _):
        for order in ("round_robin", "bracket"):
            code, figures = measured(tmp_path, capfd, write_spec(tmp_path, url, order=order), rows)
            assert code == 65 and [row["id"] for row in figures["rewards"]] == ["g"]
            (refused,) = figures["refused"]
            assert "rows.jsonl:2: the row has one response, and a pairwise judge compares two" in refused


def test_a_pointwise_judge_scores_all_responses_of_a_row_of_ties(tmp_path, capfd):
    row = {**GROUP, "scores": [1, 1, 1]}
    with chat_server(length) as (url, _):
        code, figures = measured(tmp_path, capfd, write_spec(tmp_path, url, **POINTWISE), [row])
    assert code == 0 and figures["rewards"] == [{"id": "g", "rewards": [2, 1, 3]}] and figures["preferences_tied"] == 3


def texts(said, size=3):
    """Lines of a round robin, in which `said` has the exceptions to what is shown first being better."""
    pairs = itertools.permutations(range(size), 2)
    found = {pair: said.get(pair, "<answer>1</answer>") for pair in pairs}
    return [{"id": "g", "order": list(pair), "text": text} for pair, text in found.items() if text is not None]


@pytest.mark.parametrize("row", [GROUP, {**GROUP, "preferences": [[0, 2]]}], ids=["bare", "preferences"])
@pytest.mark.parametrize("order", ["round_robin", "bracket"])
def test_a_row_that_lacks_one_text_is_named(tmp_path, capfd, order, row):
    judge = write_spec(tmp_path, "http://127.0.0.1:1/v1", order=order)
    first, _ = play(replace(record_of(tmp_path, 3), id="g"), 0, {}).next_round if order == "bracket" else ((1, 2), None)
    rows = [row, {**row, "id": "h"}]
    lines = texts({first: None}) + [{**line, "id": "h"} for line in texts({})]
    code, figures = measured(tmp_path, capfd, judge, rows, "--from", write_rows(tmp_path / "w.jsonl", lines))
    assert code == 65 and figures["rewards_missing"] == ["g"] and [row["id"] for row in figures["rewards"]] == ["h"]


def test_a_pointwise_group_that_lacks_one_text_is_named(tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", [GROUP])
    lines = [{"id": "g", "order": [n], "text": "Score: 7"} for n in (0, 2)]
    options = JudgeOptions(RowOptions(), JudgeTexts(write_rows(tmp_path / "w.jsonl", lines)), None, tmp_path / "o.json")
    with pytest.raises(DataError, match="1 rows have no reward, or not all, since texts about them are missing: g"):
        evaluate_judge(["judge:llava_critic_pointwise"], str(rows), options)
    figures = json.loads((tmp_path / "o.json").read_text())
    assert figures["rewards_missing"] == ["g"] and figures["rewards"] == [{"id": "g", "rewards": [7, None, 7]}]
    assert re.search(r"rows with rewards +1 of 1", capsys.readouterr().out)


@pytest.mark.parametrize(
    "said, rewards, failed",
    [
        (dict.fromkeys(itertools.permutations(range(3), 2), NO_IDEA), [None, None, None], 6),
        ({}, [1 / 2, 1 / 2, 1 / 2], 0),
        # Without (0, 1), response 0 has won (0, 2) of its three others, and 1 two of its three, and 2 two of four.
        ({(0, 1): NO_IDEA}, [1 / 3, 2 / 3, 1 / 2], 1),
        # Of responses 0 and 1 nothing is known but what they are beside 2.
        ({(0, 1): NO_IDEA, (1, 0): NO_IDEA}, [1 / 2, 1 / 2, 1 / 2], 2),
        (dict.fromkeys(((0, 1), (1, 0), (0, 2), (2, 0)), NO_IDEA), [None, 1 / 2, 1 / 2], 4),
    ],
)
def test_a_reward_of_a_round_robin_is_of_comparisons_with_a_verdict(tmp_path, capfd, said, rewards, failed):
    judge = write_spec(tmp_path, "http://127.0.0.1:1/v1", order="round_robin")
    written = write_rows(tmp_path / "w.jsonl", texts(said))
    code, figures = measured(tmp_path, capfd, judge, [GROUP], "--from", written)
    assert code == 0 and figures["rewards"] == [{"id": "g", "rewards": pytest.approx(rewards)}]
    assert figures["questions_without_verdict"] == figures["num_parse_failures"] == failed


def test_votes_without_a_verdict_leave_a_comparison_to_the_others(tmp_path, capfd):
    judge = write_spec(tmp_path, "http://127.0.0.1:1/v1", order="round_robin")
    lines = texts({}) + texts(dict.fromkeys(itertools.permutations(range(3), 2), NO_IDEA))
    code, figures = measured(tmp_path, capfd, judge, [GROUP], "--from", write_rows(tmp_path / "w.jsonl", lines))
    assert code == 0 and figures["rewards"] == [{"id": "g", "rewards": [0.5] * 3}]
    assert (figures["questions_without_verdict"], figures["num_parse_failures"]) == (0, 6)


def test_a_match_of_a_bracket_without_a_verdict_gives_neither_a_reward(tmp_path):
    record = record_of(tmp_path, 4)

    def played(without):
        """Return the rewards where a round of that number has no verdict; else the larger number is better."""
        said, number = {}, 0
        while following := play(record, 0, said).next_round:
            for first, second in following:
                verdict = Verdict.FIRST if first > second else Verdict.SECOND
                said["1", (first, second)] = [None if number in without else verdict]
            met[number], number = following[::2], number + 1
        return play(record, 0, said).rewards

    met = {}
    assert sorted(played(())) == [0, 0, 0.5, 1]
    assert played((0, 1)) == [None] * 4
    rewards = played((1,))
    [final] = met[1]
    assert [number for number, reward in enumerate(rewards) if reward is None] == sorted(final)
    assert [rewards[number] for number in set(range(4)) - set(final)] == [0, 0]
    # One order with a verdict is enough, and a draw of two verdicts is one as well.
    pair = play(record, 0, {}).next_round[0]
    said = {("1", order): [Verdict.FIRST] for order in itertools.permutations(range(4), 2)} | {("1", pair): [None]}
    assert None not in play(record, 0, said).rewards

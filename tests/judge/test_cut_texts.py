"""Texts that ended at their longest length: a verdict counts only where it was said before that."""


import pytest

from fastrm.prompts.spec import JudgeSpec
from fastrm.prompts.verdicts import Verdict
from tests.helpers.chat_server import chat_server, write_spec
from tests.helpers.chat_server import run as generate
from tests.judge.test_eval_judge import NOTHING, ONE, ROWS, TWO, run  # noqa: F401

BETTER = "Response 1 is better"


@pytest.mark.parametrize(
    "parser, text, whole, cut",
    [
        ("r1_reward", "<think>Response 1 says 4", Verdict.FIRST, None),
        ("r1_reward", "<think>4</think><answer>1", Verdict.FIRST, None),
        ("r1_reward", "<think>4</think><answer>1</answer> and", Verdict.FIRST, Verdict.FIRST),
        ("boxed", r"<think>4</think> \boxed{2} since", Verdict.SECOND, Verdict.SECOND),
        ("boxed", r"<think>4</think> \boxed{2", None, None),
        ("boxed", r"\boxed{1} at first, but \boxed{\textbf{2}", None, None),
        ("boxed", r"<think>It is \boxed{2}, I", None, None),
        ("better", f"<think>In all, {BETTER}", None, None),
        ("better", "In all, **Response 1** is **better**", Verdict.FIRST, Verdict.FIRST),
        ("better", f"In style {BETTER}. In the colours", Verdict.FIRST, None),
        ("better", f"{BETTER} in style, but", Verdict.FIRST, None),
        ("better", f"In all, {BETTER}", Verdict.FIRST, Verdict.FIRST),
        ("better", f"In all, {BETTER}.\n", Verdict.FIRST, Verdict.FIRST),
        ("better", "In style Response 2 is better. Both responses are equally good.", Verdict.TIE, Verdict.TIE),
        ("better", "The better response is the second one.", Verdict.SECOND, Verdict.SECOND),
        ("better", f"Answer 2 is better in style. Is it so that {BETTER}?", Verdict.SECOND, None),
        ("better_in_answer", f"<think>4</think><answer>{BETTER}</answer>.", Verdict.FIRST, Verdict.FIRST),
        ("better_in_answer", f"<think>4</think><answer>{BETTER}", None, None),
        ("score", "It is right. Score: 8", 8.0, None),  # of 85, perhaps
        ("score", "It is right.\nScore: 85", 85.0, None),
        ("score", "It is right.\nScore: 85\n", 85.0, 85.0),
        ("score", "**Final Score: 85**\nThat is", 85.0, 85.0),
        ("score", "**Score (1-100): 85**\nThat is", 85.0, 85.0),
        ("score", "**Final** Score: 85\n", 85.0, 85.0),
        ("score", "Score (1-100):\n8", 8.0, None),
        ("score", "The score for its colours: 3\nIts style", None, None),
        ("score", "Score (1-100): 85\nFinal Score: 8", 8.0, 85.0),
        ("score", "<think>\nScore: 3\n</think>The final score is 8", 8.0, None),
    ],
)
def test_a_cut_text_has_a_verdict_only_where_its_mark_was_written(parser, text, whole, cut):
    kind = "pointwise" if parser == "score" else "pairwise"
    spec = JudgeSpec(kind=kind, parser=parser, prompt="?")
    if whole is not None:
        assert spec.read(text, is_cut=False) == spec.parse(text) == whole
    assert spec.read(text, is_cut=True) == cut


def test_a_cut_text_is_a_failure_here_and_counts_by_the_released_rule(run):  # noqa: F811
    thinking = "<think>Response 1 says 4"
    given = [
        {"id": "r0", "order": [0, 1], "text": thinking, "cut": True}, {"id": "r0", "order": [1, 0], "text": TWO},
        {"id": "r1", "order": [0, 1], "text": ONE, "cut": True}, {"id": "r1", "order": [1, 0], "text": TWO},
        {"id": "r2", "order": [0, 1], "text": NOTHING}, {"id": "r2", "order": [1, 0], "text": TWO},
    ]  # fmt: skip
    figures, error, printed = run(given, ROWS[:3])
    assert error is None and figures["accuracy"] == pytest.approx((1 / 2 + 1 + 1 / 2) / 3)
    assert figures["accuracy_as_released"] == pytest.approx(2 / 3)
    assert (figures["texts_cut"], figures["num_parse_failures"]) == (2, 2)
    assert figures["failures"] == [{"id": "r0", "order": [0, 1]}, {"id": "r2", "order": [0, 1]}]
    assert figures["position_flip_rate"] == 0 and figures["first_place_rate"] == pytest.approx(1 / 4)
    assert "texts cut at their longest length" in printed and "2 of 6" in printed


def test_texts_that_a_server_has_cut_are_counted_and_win_no_match_of_a_bracket(tmp_path):
    row = {"id": "1", "prompt": "?", "responses": ["a", "b"], "preferences": [[0, 1]]}
    for cut, winners in (((), (Verdict.FIRST, Verdict.FIRST)), ((0, 1), None)):
        with chat_server(lambda body: "I think 1", cut=cut) as (url, _):
            folder = tmp_path / str(bool(cut))
            folder.mkdir()
            figures = generate(folder, write_spec(folder, url, order="bracket", batch=1), [row])
        assert figures["texts_cut"] == figures["num_parse_failures"] == len(cut)
        assert figures["accuracy_as_released"] == 1 and figures["accuracy"] == (0.5 if winners else 0)

"""Verdicts in the forms that judges write."""

import pytest

from fastrm.prompts.spec import load_spec, shipped_names
from fastrm.prompts.verdicts import (
    PAIRWISE,
    Verdict,
    majority,
    parse_better,
    parse_better_in_answer,
    parse_boxed,
    parse_r1_reward,
    write_verdict,
)

FIRST, SECOND, TIE = Verdict.FIRST, Verdict.SECOND, Verdict.TIE


@pytest.mark.parametrize(
    "parse, text, wanted",
    [
        (parse_r1_reward, "<think>2 of them...</think><answer>1</answer>", FIRST),
        (parse_r1_reward, "<think>a\nb</think>\n<answer>\n 2 \n</answer>", SECOND),
        (parse_r1_reward, "<answer>1</answer> or rather <answer>2</answer>", FIRST),
        (parse_r1_reward, "<answer>Response 1</answer>", None),
        (parse_r1_reward, "<answer>3</answer> 1", None),
        (parse_r1_reward, "<answer></answer>", None),
        (parse_r1_reward, "<answer>Tie</answer>", TIE),
        (parse_r1_reward, "Of the 2 responses I take number 1.", FIRST),
        (parse_r1_reward, "<think>1 is right<answer>2", SECOND),
        (parse_r1_reward, "<answer>**1**</answer>", None),
        (parse_r1_reward, "<answer>1.</answer>", None),
        (parse_r1_reward, "<answer>[1]</answer>", None),
        (parse_r1_reward, "<answer>both</answer>", TIE),
        (parse_r1_reward, "<answer>equal</answer>", TIE),
        (parse_r1_reward, "<answer>0</answer>", TIE),
        (parse_r1_reward, "<think>Is it <answer>1</answer>?</think><answer>2</answer>", FIRST),
        (parse_r1_reward, "I cannot judge this image.", None),
        (parse_r1_reward, "I'm sorry, I cannot judge images. Updated 2021.", None),
        (parse_r1_reward, "I cannot rate it above 1.5, nor by 0,2 or 1/2.", None),
        (parse_r1_reward, "Neither the 1st nor the 2nd, in v2 of H2O", None),
        (parse_r1_reward, "**2**", SECOND),
        (parse_r1_reward, "", None),
        (parse_boxed, r"Now \boxed{2}... finally \boxed{1}", FIRST),
        (parse_boxed, r"\boxed{\text{2}}", SECOND),
        (parse_boxed, r"\boxed{equal}", TIE),
        (parse_boxed, r"\boxed{first}", None),
        (parse_boxed, "1", None),
        (parse_boxed, r"\boxed{1} at first, but \boxed{\textbf{2}}", SECOND),
        (parse_boxed, r"\boxed{1}, or \boxed{first}", None),
        (parse_boxed, r"\boxed{1}, or \boxed{2", None),
        (parse_boxed, r"\boxed{2.}", SECOND),
        (parse_boxed, r"\boxed{$2$}", SECOND),
        (parse_boxed, r"\boxed{\mathbf{2}}", SECOND),
        (parse_boxed, r"\boxed{**1**}", FIRST),
        (parse_boxed, r"\boxed{1 = 2}", TIE),
        (parse_boxed, r"\boxed{\sqrt{2}}", None),
        (parse_boxed, r"\boxed{1/2}", None),
        (parse_boxed, r"\boxed{12}", None),
        (parse_boxed, r"\boxed{}", None),
        (parse_boxed, r"\boxed", None),
        (parse_boxed, r"<think>maybe \boxed{1}, let me check", None),
        (parse_boxed, r"<think>\boxed{1}?</think> The answer is 2.", None),
        (parse_boxed, r"<think>\boxed{1}?</think> \boxed{2}", SECOND),
        (parse_boxed, r"It is \boxed{1}?</think> \boxed{2}", SECOND),
        (parse_better_in_answer, "<think>Answer 1 is better</think><answer>Answer 2 is better</answer>", SECOND),
        (parse_better_in_answer, "Answer 2 is better", None),
        (parse_better_in_answer, "<answer>Answer 1 is better</answer> or <answer>Answer 2 is better</answer>", SECOND),
        (parse_better_in_answer, "<answer>Answer 1 is better</answer> or <answer>Answer 2 is", FIRST),
        (parse_better_in_answer, "</answer><answer>Answer 1 is better", None),
        (parse_better_in_answer, "<think>I write <answer>Answer 1 is better</answer>, I think", None),
        (parse_better_in_answer, "<answer>**Answer 1** is better.</answer>", FIRST),
        (parse_better, "<think>Response 1 is better so far", None),
        (parse_better, "<think>Response 1 is better.</think> I cannot say.", None),
        (parse_better, "Response 1 is better, I thought.</think>\nResponse 2 is better", SECOND),
    ],
)
def test_forms_that_judges_write(parse, text, wanted):
    assert parse(text) == wanted


@pytest.mark.parametrize(
    "votes, wanted",
    [
        ([FIRST, SECOND, FIRST], FIRST),
        ([FIRST, SECOND], TIE),
        ([None, SECOND, None], SECOND),
        ([None, None], None),
        ([TIE, TIE, FIRST], TIE),
    ],
)
def test_the_majority_of_votes_that_can_be_read_decides(votes, wanted):
    assert majority(votes) is wanted


@pytest.mark.parametrize("name", [name for name in shipped_names() if load_spec(name).kind == "pairwise"])
@pytest.mark.parametrize("thinking", ["", "{1} is \\boxed{2}\n", "<think>Response 2 names it.</think>"])
@pytest.mark.parametrize("verdict", [FIRST, SECOND])
def test_a_verdict_that_is_written_is_read_by_the_same_parser(name, thinking, verdict):
    parser = load_spec(name).parser
    assert PAIRWISE[parser](write_verdict(parser, verdict, thinking)) is verdict


def test_every_parser_has_a_form_that_is_written():
    assert {parser: write_verdict(parser, SECOND, "<think>why</think>", "Answer") for parser in PAIRWISE} == {
        "r1_reward": "<think>why</think><answer>2</answer>",
        "boxed": r"<think>why</think>\boxed{2}",
        "better": "why\nAnswer 2 is better",
        "better_in_answer": "<think>why</think><answer>Answer 2 is better</answer>",
    }


def test_every_shipped_judge_can_be_read():
    assert {"r1_reward", "unified_reward", "unified_reward_think"} <= set(shipped_names())
    for name in shipped_names():
        spec = load_spec(name)
        if spec.kind == "critic":
            assert all(mark in spec.prompt for mark in ("{{ question }}", "{{ response }}"))
            continue
        shown = ("{{ first }}", "{{ second }}") if spec.kind == "pairwise" else ("{{ response }}",)
        assert all(mark in spec.prompt for mark in ("{{ question }}", *shown))
        said = {"r1_reward": "<answer>2</answer>", "better": "Answer 2 is better", "score": "Score: 3"}
        said["better_in_answer"] = f"<answer>{said['better']}</answer>"
        assert spec.parse(said[spec.parser]) in (SECOND, 3.0)

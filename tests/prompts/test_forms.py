"""The form of a judge's whole text, and whether its thinking ends for the response that it names."""

import pytest

from fastrm.prompts.forms import FORMS, agreement
from fastrm.prompts.spec import load_spec, shipped_names
from fastrm.prompts.verdicts import PAIRWISE, Verdict, write_verdict


def test_every_pairwise_parser_has_a_form():
    assert FORMS.keys() == PAIRWISE.keys()


@pytest.mark.parametrize(
    "parser, text, is_kept",
    [
        ("r1_reward", "<think>So.</think><answer>1</answer>", True),
        ("r1_reward", "\n<think>So,\nand so.</think><answer>2</answer> \n", True),
        ("r1_reward", "<think>\nSo.\n</think>\n\n<answer>1</answer>", True),  # as Qwen3's template writes a turn
        ("r1_reward", "<think>So.</think> <answer>1</answer>", True),
        ("r1_reward", "<think>So.</think> Thus <answer>1</answer>", False),
        ("r1_reward", "<think>So.</think><answer>Response 1</answer>", False),
        ("r1_reward", "<think>So.</think><answer>1/2</answer>", False),
        ("r1_reward", "<think>So.</think><answer>3</answer>", False),
        ("r1_reward", "<answer>1</answer>", False),
        ("r1_reward", "Well: <think>So.</think><answer>1</answer>", False),
        ("r1_reward", "<think>So.</think><answer>1</answer> I hope.", False),
        ("r1_reward", "<think>So.</think><answer>1</answer><answer>1</answer>", False),
        ("r1_reward", "<think><think>So.</think><answer>1</answer>", False),
        ("r1_reward", "<think>So.</think><answer>1", False),
        ("r1_reward", "", False),
        ("boxed", r"<think>So.</think> Therefore \boxed{1}.", True),
        ("boxed", r"<think>So.</think> \boxed{1} or \boxed{2}", False),
        ("boxed", r"So: \boxed{1}", False),
        ("boxed", r"<think>So.</think>\boxed{first}", False),
        ("better", "The second is false. Response 1 is better.", True),
        ("better", "Answer 2 is better", True),
        ("better", "Response 1 is better. But is it?", False),
        ("better", "Both responses are equally good", False),
        ("better_in_answer", "<think>So.</think>\n<answer>Answer 2 is better</answer>", True),
        ("better_in_answer", "<think>So.</think>\n<answer>2</answer>", False),
    ],
)  # fmt: skip
def test_a_text_keeps_to_the_form_or_not(parser, text, is_kept):
    assert FORMS[parser].is_kept(text) is is_kept


def test_what_each_shipped_judge_is_asked_for_is_its_form():
    """A text as the prompt shows it is in form, and its verdict is read."""
    texts = {
        "r1_reward": "<think>your comparison</think><answer>2</answer>",
        "llava_critic_pairwise": "Response 2 is better",
        "unified_reward": "Answer 2 is better",
        "unified_reward_think": "<think>x</think><answer>Answer 2 is better</answer>",
    }
    specs = {name: load_spec(name) for name in shipped_names()}
    assert texts.keys() == {name for name, spec in specs.items() if spec.kind == "pairwise"}
    for name, text in texts.items():
        assert FORMS[specs[name].parser].is_kept(text) and specs[name].parse(text) is Verdict.SECOND


@pytest.mark.parametrize("noun", ["Response", "Answer"])
@pytest.mark.parametrize("verdict", [Verdict.FIRST, Verdict.SECOND])
@pytest.mark.parametrize("parser", PAIRWISE)
def test_what_a_judge_learns_to_write_is_in_form(parser, verdict, noun):
    thinking = f"One is late.\n{noun} {verdict.value} is better."
    text = write_verdict(parser, verdict, thinking, noun)
    assert FORMS[parser].is_kept(text) and agreement(FORMS[parser], text, verdict) == 1


@pytest.mark.parametrize(
    "parser, text, found",
    [
        ("r1_reward", "<think>Response 1 is better.</think><answer>1</answer>", 1),
        ("r1_reward", "<think>Response 1 is better.</think><answer>2</answer>", -1),
        ("r1_reward", "<think>Response 1 is better? No, Response 2 is clearly better.</think><answer>2</answer>", 1),
        ("r1_reward", "<think>Response 1 is better? No: both are equally good.</think><answer>1</answer>", 0),
        (
            "r1_reward",
            "<think>Response 1 is better, since Response 2 wrongly says that it is a tie.</think><answer>1</answer>",
            1,
        ),
        ("r1_reward", "<think>The first is true.</think><answer>1</answer>", 0),
        ("r1_reward", "<think>So.</think><answer>2</answer> Response 1 is better.", 0),
        ("r1_reward", "<think>Response 1 is better.</think><answer>tie</answer>", 0),
        ("r1_reward", "<think>Response 1 is better.</think><answer>none</answer>", 0),
        (
            "r1_reward",
            "<think>Response 1 is better than Response 2, though both handle colours equally well.</think>"
            "<answer>1</answer>",
            1,
        ),
        ("r1_reward", "<think>I don't think Response 1 is better.</think><answer>2</answer>", 0),
        ("r1_reward", "<think>Overall, **Response 1** is better.</think><answer>2</answer>", -1),
        ("boxed", r"<think>Response 2 is better.</think>\boxed{2}", 1),
        ("boxed", r"<think>Is it \boxed{2}? Response 1 is better.</think>\boxed{1}", 1),
        ("better", "Response 1 is better in form. Response 2 is better.", -1),
        ("better", "The second is false. Response 1 is better.", 0),
        ("better", "The second is false. **Response 1** is clearly better!", 0),
        ("better", "Response 2 is better. No, **Response 1** is better!", -1),
        ("better_in_answer", "<think>Answer 2 is better.</think><answer>Answer 2 is better</answer>", 1),
        (
            "better_in_answer",
            "<think>I write <answer>. Answer 2 is better.</think><answer>Answer 2 is better</answer>",
            1,
        ),
    ],
)
def test_thinking_agrees_with_the_verdict_or_not(parser, text, found):
    assert agreement(FORMS[parser], text, PAIRWISE[parser](text)) == found

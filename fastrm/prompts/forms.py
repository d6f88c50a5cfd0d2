"""The whole text of a judge: its form, whom its thinking ends for, and whether the verdict of a cut one was written."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from fastrm.prompts.clauses import behind_thinking
from fastrm.prompts.scores import parse_score
from fastrm.prompts.verdicts import Verdict, ends_with_better, find_better

_SENTENCE = r"(?:answer|response|assistant) [12] is better\.?"


@dataclass(frozen=True)
class Form:
    """The form of a text with a verdict.

    Attributes:
        whole: the pattern of the whole text, without white space around it.
        marks: what stands in the text exactly once each.
        thinking: returns of a text what stands before the verdict that its parser reads; the whole text, where there
            is none.
    """

    whole: re.Pattern[str]
    marks: tuple[str, ...]
    thinking: Callable[[str], str]

    def is_kept(self, text: str) -> bool:
        """Return whether a text has exactly this form."""
        return all(text.count(mark) == 1 for mark in self.marks) and self.whole.fullmatch(text.strip()) is not None


def _form(whole: str, marks: tuple[str, ...], thinking: Callable[[str], str]) -> Form:
    return Form(re.compile(whole, re.DOTALL | re.IGNORECASE), marks, thinking)


def _before_first(mark: str, text: str) -> str:
    return text.partition(mark)[0]


def _before_last(mark: str, text: str) -> str:
    before, found, _ = text.rpartition(mark)
    return before if found else text


def _before_sentence(text: str) -> str:
    found = find_better(text)
    return text if found is None else text[: found[0]]


_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_BOX = ("<think>", "</think>", "\\boxed{")
_LAST_ANSWER = partial(_before_last, "<answer>")
# By the parsers of pairwise judges. The first is that of R1-Reward's own verifier (yfzhang114/r1_reward,
# openrlhf/models/remote_rm/math_verifier_mllm.py), which has one pair of each tag and nothing between them, but wants
# no number inside of <answer>; white space between them is allowed here, as chat templates of thinking models (Qwen3)
# put it there in what a judge learns to write. The second is that of LLaVA-Critic-R1, thinking and then a box.
FORMS: dict[str, Form] = {
    "r1_reward": _form(r"<think>.*</think>\s*<answer>[12]</answer>", _TAGS, partial(_before_first, "<answer>")),
    "boxed": _form(r"<think>.*</think>.*\\boxed\{[12]\}\W*", _BOX, partial(_before_last, "\\boxed")),
    "better": _form(rf".*\b{_SENTENCE}", (), _before_sentence),
    "better_in_answer": _form(rf"<think>.*</think>\s*<answer>\s*{_SENTENCE}\s*</answer>", _TAGS, _LAST_ANSWER),
}


# By the parsers whose verdict stands inside of something: what opens and what closes that. A number at the end of a cut
# text may lack digits.
_INSIDE = {
    "r1_reward": ("<answer>", "</answer>"),
    "boxed": ("\\boxed{", "}"),
    "better_in_answer": ("<answer>", "</answer>"),
}
_SCORE_LINE = re.compile(r"^[^\n\w]*(?:(?:final|overall|total)[ *_]+)?score\b[^\n]*\n", re.MULTILINE | re.IGNORECASE)


def before_cut(parser: str, text: str) -> str | None:
    """Return what of a text that was cut is read for its verdict; None if it was cut before the verdict was said.

    A verdict is said by its mark: of r1_reward and better_in_answer the closed tag, of boxed the box, of score a line
    of its own, and of better the sentence with which the text ends. Of a score the whole lines behind the thinking are
    read, as the last one may lack digits, else the whole text.

    Args:
        parser: a name of PAIRWISE or POINTWISE.
    """
    if parser in _INSIDE:
        opened, closed = _INSIDE[parser]
        return text if closed in text.partition(opened)[2] else None
    if parser == "score":
        lines, end, _ = behind_thinking(text).rpartition("\n")
        is_said = any(parse_score(line) is not None for line in _SCORE_LINE.findall(lines + end))
        return lines if is_said else None
    return text if ends_with_better(behind_thinking(text)) else None


def agreement(form: Form, text: str, verdict: Verdict | None) -> int:
    """Return whether the thinking of a text ends for the response that its verdict names.

    The last sentence of the thinking counts that calls one response better, or both equal, as `find_better` reads it.

    Returns:
        1: for the same response; -1: for the other one; 0: for none, or there is no verdict.
    """
    found = find_better(form.thinking(text))
    ended = found and found[1]
    sides = (Verdict.FIRST, Verdict.SECOND)
    if ended not in sides or verdict not in sides:
        return 0
    return 1 if ended is verdict else -1

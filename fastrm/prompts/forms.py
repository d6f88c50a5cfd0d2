"""The whole text of a judge: its form, whom its thinking ends for, and whether the verdict of a cut one was written."""

import re
from dataclasses import dataclass

from fastrm.prompts.verdicts import Verdict, parse_better

_SENTENCE = r"(?:answer|response|assistant) [12] is better\.?"


@dataclass(frozen=True)
class Form:
    """The form of a text with a verdict.

    Attributes:
        whole: the pattern of the whole text, without white space around it.
        marks: what stands in the text exactly once each.
        verdict: the pattern of what the verdict begins with; the thinking is what stands before.
    """

    whole: re.Pattern[str]
    marks: tuple[str, ...]
    verdict: re.Pattern[str]

    def is_kept(self, text: str) -> bool:
        """Return whether a text has exactly this form."""
        return all(text.count(mark) == 1 for mark in self.marks) and self.whole.fullmatch(text.strip()) is not None

    def thinking(self, text: str) -> str:
        """Return what stands before the verdict; the whole text, where there is none."""
        found = self.verdict.search(text)
        return text if found is None else text[: found.start()]


def _form(whole: str, marks: tuple[str, ...], verdict: str) -> Form:
    return Form(re.compile(whole, re.DOTALL | re.IGNORECASE), marks, re.compile(verdict, re.DOTALL | re.IGNORECASE))


_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
# By the parsers of pairwise judges. The first is that of R1-Reward's own verifier (yfzhang114/r1_reward,
# openrlhf/models/remote_rm/math_verifier_mllm.py), which has one pair of each tag and nothing between them, but wants
# no number inside of <answer>; white space between them is allowed here, as chat templates of thinking models (Qwen3)
# put it there in what a judge learns to write. The second is that of LLaVA-Critic-R1, thinking and then a box.
FORMS: dict[str, Form] = {
    "r1_reward": _form(r"<think>.*</think>\s*<answer>[12]</answer>", _TAGS, "<answer>"),
    "boxed": _form(r"<think>.*</think>.*\\boxed\{[12]\}\W*", ("<think>", "</think>", "\\boxed{"), r"\\boxed\{"),
    "better": _form(rf".*\b{_SENTENCE}", (), rf"\b{_SENTENCE}\s*\Z"),
    "better_in_answer": _form(rf"<think>.*</think>\s*<answer>\s*{_SENTENCE}\s*</answer>", _TAGS, "<answer>"),
}


# By the parsers of all judges but `better`, whose mark is the last sentence: the mark of a verdict, which stands in a
# text that was cut only if the verdict was written to its end. A number at the end of a cut text may lack digits.
_ANSWER = re.compile("<answer>.*?</answer>", re.DOTALL)
_MARKS: dict[str, re.Pattern[str]] = {
    "r1_reward": _ANSWER,
    "boxed": re.compile(r"\\boxed\{.*?\}", re.DOTALL),
    "better_in_answer": _ANSWER,
    "score": re.compile(
        r"^[^\n\w]*(?:(?:final|overall|total)\s+)?score\b[^\n\w]*[\d.,]+[^\n]*\n", re.MULTILINE | re.IGNORECASE
    ),
}
_LAST_WORDS = re.compile(r"\b(?:better|equally (?:good|bad|well)|tie|first|second|[12ab])\W*\Z", re.IGNORECASE)


def is_said(parser: str, text: str) -> bool:
    """Return whether a text that was cut has the mark with which the verdict of a parser is said.

    The mark of r1_reward and better_in_answer is the closed tag, of boxed the box, of score a line of its own, and of
    better the sentence with which the text ends.

    Args:
        parser: a name of PAIRWISE or POINTWISE.
    """
    if parser != "better":
        return _MARKS[parser].search(text) is not None
    last = re.split(r"[.!?\n]", text.rstrip(" \n\t.!?*_"))[-1]
    return _LAST_WORDS.search(last) is not None and parse_better(last) is not None


def agreement(form: Form, text: str, verdict: Verdict | None) -> int:
    """Return whether the thinking of a text ends for the response that its verdict names.

    The last sentence of the thinking counts that calls one response better, or both equal, as `parse_better` reads it.

    Returns:
        1: for the same response; -1: for the other one; 0: for none, or there is no verdict.
    """
    ended = parse_better(form.thinking(text))
    sides = (Verdict.FIRST, Verdict.SECOND)
    if ended not in sides or verdict not in sides:
        return 0
    return 1 if ended is verdict else -1

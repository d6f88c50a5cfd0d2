"""Verdicts in what judges write.

Each parser follows the scripts that were released with its judge; what they take for no verdict is none here, so that
figures can be compared.
"""

import re
from collections.abc import Callable, Sequence
from enum import Enum

Parser = Callable[[str], "Verdict | float | None"]

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_BOXED = re.compile(r"\\boxed\{\s*(?:\\text\{)?([^{}]*?)\}")
_BETTER = re.compile(
    r"(?:answer|response|assistant)\s*([12])\s+is\s+(?:(?!(?:not|no|never|hardly)\b)\w+\s+)?better", re.IGNORECASE
)
# What "neither" and "nor" deny: all up to the next mark or the word with which something else is said.
_DENIED = re.compile(
    r"\b(?:neither|nor)\b(?:(?!\b(?:but|yet|so|though|although|while|however|therefore)\b)[^.,;:!?\n])*", re.IGNORECASE
)
_NAMED = re.compile(r"\bbetter response: \[?(first|second|[12ab])\b", re.IGNORECASE)
_FIRST = ("first", "1", "a")
_EQUAL = re.compile(
    r"(?:answers?|responses?|assistants?|both|two)\b[^.\n]{0,40}\bequally\s+(?:good|bad|well)"
    r"|\b(?:it(?: is|'s)) a tie\b",
    re.IGNORECASE,
)
_TIES = frozenset({"tie", "equal", "both", "0", "1=2", "1 = 2"})
_SCORE = re.compile(r"\bscore\b\W{0,6}?(-?\d+(?:\.\d+)?)", re.IGNORECASE)


class Verdict(Enum):
    """The response that a judge prefers, by its place in what the judge was shown."""

    FIRST = 1
    SECOND = 2
    TIE = 0


def parse_r1_reward(text: str) -> Verdict | None:
    """Return the verdict of R1-Reward: the first <answer> tag holds 1 or 2; without a tag, the last of these digits.

    A tag with anything else, such as "Response 1", is no verdict, as in the released scripts (yfzhang114/r1_reward,
    inference/VL-Reward-Bench/r1_reward.py); one that says in a word that there is a tie is a tie.
    """
    if (tag := _ANSWER.search(text)) is not None:
        return _digit(tag[1])
    digits = re.findall("[12]", text)
    return Verdict(int(digits[-1])) if digits else None


def parse_boxed(text: str) -> Verdict | None:
    r"""Return the verdict in the last \boxed{}, as LLaVA-Critic-R1 gives it: 1 or 2, or a word for a tie."""
    boxes = _BOXED.findall(text)
    return _digit(boxes[-1]) if boxes else None


def parse_better(text: str) -> Verdict | None:
    """Return the verdict of UnifiedReward and LLaVA-Critic: "Answer 1 is better", or with Response.

    LLaVA-Critic's published answers have "The better response: [first]".
    A judge is asked to end with that sentence: of several the last one counts, and a sentence that calls both equally
    good is a tie if none comes behind it. "Response 2 is not better" and "neither Response 1 is better nor ..." are no
    verdicts.
    """
    text = _DENIED.sub("...", text)
    found = [(match.end(), Verdict(int(match[1]))) for match in _BETTER.finditer(text)]
    places = ((match.end(), match[1].lower() in _FIRST) for match in _NAMED.finditer(text))
    found += [(end, Verdict.FIRST if is_first else Verdict.SECOND) for end, is_first in places]
    found += [(match.end(), Verdict.TIE) for match in _EQUAL.finditer(text)]
    return max(found, key=lambda place: place[0])[1] if found else None


def parse_better_in_answer(text: str) -> Verdict | None:
    """Return the verdict of UnifiedReward-Think: the sentence of `parse_better` inside of the last <answer> tag."""
    tags = _ANSWER.findall(text)
    return parse_better(tags[-1]) if tags else None


def parse_score(text: str) -> float | None:
    """Return the number behind the last "score", as pointwise judges write it: "Final Score: 4", "**Score**: 72.5"."""
    numbers = _SCORE.findall(text)
    return float(numbers[-1]) if numbers else None


# By the names that a SPEC's `parser` has.
PAIRWISE: dict[str, Parser] = {
    "r1_reward": parse_r1_reward,
    "boxed": parse_boxed,
    "better": parse_better,
    "better_in_answer": parse_better_in_answer,
}
POINTWISE: dict[str, Parser] = {"score": parse_score}


# What each parser reads, as judges learn to write it.
_FORMS = {
    "r1_reward": "<think>{thinking}</think><answer>{number}</answer>",
    "boxed": "<think>{thinking}</think>\\boxed{{{number}}}",
    "better": "{thinking}\n{noun} {number} is better",
    "better_in_answer": "<think>{thinking}</think><answer>{noun} {number} is better</answer>",
}


def write_verdict(parser: str, verdict: Verdict, thinking: str = "", noun: str = "Response") -> str:
    """Return a judge's text with a verdict, FIRST or SECOND, in the form that a parser reads.

    Args:
        parser: a name of PAIRWISE.
        thinking: what comes before the verdict, with or without <think> tags around it.
        noun: what the judge's prompt calls a response, for verdicts in words.
    """
    thinking = thinking.strip().removeprefix("<think>").removesuffix("</think>").strip()
    return _FORMS[parser].format(thinking=thinking, number=verdict.value, noun=noun).strip()


def majority(verdicts: Sequence[Verdict | None]) -> Verdict | None:
    """Return the verdict of several votes.

    Votes without a verdict do not count; None if all are such. The verdict with the most votes wins; if two have the
    most, it is a tie.
    """
    given = [verdict for verdict in verdicts if verdict is not None]
    if not given:
        return None
    counts = {verdict: given.count(verdict) for verdict in Verdict}
    best = [verdict for verdict, count in counts.items() if count == max(counts.values())]
    return best[0] if len(best) == 1 else Verdict.TIE


def _digit(text: str) -> Verdict | None:
    said = text.strip().lower()
    if said in ("1", "2"):
        return Verdict(int(said))
    return Verdict.TIE if said in _TIES else None

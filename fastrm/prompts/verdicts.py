"""Verdicts in what judges write.

The parsers know the forms that the judges' released scripts read. `parse_r1_reward` takes for no verdict what its
script takes for none, so that figures can be compared, with two exceptions that it names. The others read more than the
scripts, which look for one literal sentence or form: models write it with markdown and other words around it, and a
text that is right should not count as a failure. None of them guesses: what can be read in two ways is no verdict.
"""

import re
from collections.abc import Callable, Sequence
from enum import Enum

from fastrm.prompts.clauses import DENIAL, NOUN, behind_thinking, plain, said, sentences
from fastrm.prompts.scores import parse_score

Parser = Callable[[str], "Verdict | float | None"]

# A digit that is a number of its own: not in 2021, 1.5, 1/2, 2nd.
_PLACE = re.compile(r"(?<!\w)(?<!\d[.,:/])[12](?!\w|[.,:/]\d)")
# LaTeX's ways to set a number in a box, which do not change it.
_FONT = re.compile(r"\\(?:text|math)[a-z]*|\\(?:bf|rm)\b|[{}$*\s]")
_TIES = frozenset({"tie", "equal", "both", "0", "1=2", "1 = 2"})

_DEGREE = rf"(?:(?!{DENIAL}\b|only\b)(?:\w+ly|the|a|by|far|and|away|much|so|way|lot|bit|still|also|somewhat)\s+)"
_STOPS = r"(?=[ \t]*(?:\Z|\n|[^\w\s-])|\s+(?:-|(?:and|but|so|overall|because|since|as)\b))"
_BRACKETS = str.maketrans("[]()", "    ")
_PLACES = {"first": 1, "second": 2, "1": 1, "2": 2, "a": 1, "b": 2}
_BETTER = sentences(
    # "Response 1 is far and away better", and with one word of any kind before "better"
    rf"\b{NOUN}\s*(?P<number>[12])\s+is\s+{_DEGREE}{{0,4}}(?:(?!{DENIAL}\b|only\b)\w+\s+)?"
    rf"better\b(?!\s+(?:is|would|in no|by no)\b)"
    # "The better response: [first]", "The better answer is Answer 2"
    rf"|\bbetter\s+(?:response|answer)\s*(?:is|:)\s*(?:the\s+)?(?:{NOUN}\s+)?"
    rf"(?P<place>first|second|[12ab])(?:\s+(?:one|{NOUN}))?{_STOPS}"
    # "They are both equally good", "Both responses do equally well", "It is a tie"
    rf"|\b(?:both|two|they|{NOUN}s?)(?: +(?!{DENIAL}\b|but\b)\w+){{0,8}}? +(?:equally +(?:good|bad)"
    rf"|(?:do|perform) +equally +well){_STOPS}|(?:\bis|'s) +a +tie{_STOPS}"
)


class Verdict(Enum):
    """The response that a judge prefers, by its place in what the judge was shown."""

    FIRST = 1
    SECOND = 2
    TIE = 0


def parse_r1_reward(text: str) -> Verdict | None:
    """Return the verdict of R1-Reward: the first <answer> tag holds 1 or 2; without a tag, the last of these digits.

    A tag with anything else, such as "Response 1" or "**1**", is no verdict, as in the released scripts
    (yfzhang114/r1_reward, inference/VL-Reward-Bench/r1_reward.py). Unlike there, a tag that says in a word that there
    is a tie is a tie, and without a tag only a digit counts that is a number of its own, not one of 2021 or 1.5.
    """
    if (answer := _inside(text, text.find("<answer>"))) is not None:
        return _digit(answer)
    digits = _PLACE.findall(text)
    return Verdict(int(digits[-1])) if digits else None


def parse_boxed(text: str) -> Verdict | None:
    r"""Return the verdict in the last \boxed{} behind the thinking, as LLaVA-Critic-R1 gives it.

    It holds 1 or 2, or a word for a tie, in any font of LaTeX. What it holds besides is no verdict, whatever earlier
    boxes hold.
    """
    _, mark, behind = behind_thinking(text).rpartition("\\boxed")
    box = _braced(behind.lstrip()) if mark else None
    return None if box is None else _digit(_FONT.sub("", box).removesuffix("."))


def parse_better(text: str) -> Verdict | None:
    """Return the verdict of UnifiedReward and LLaVA-Critic, as `find_better` reads it behind the thinking."""
    found = find_better(behind_thinking(text))
    return found and found[1]


def find_better(text: str) -> tuple[int, Verdict] | None:
    """Return the last verdict that a text says in a sentence, and where in the text that sentence begins.

    The sentences are "Answer 1 is better", or with Response or Assistant; "The better response: [first]", which
    LLaVA-Critic's published answers have; "Both responses are equally good", and "It is a tie". Markdown, brackets and
    words of degree ("far and away better") may stand in them. A sentence that is denied, doubted, conceded ("though
    ...") or asked is no verdict: see `fastrm.prompts.clauses.said`.
    """
    found = list(said(_BETTER, plain(text).translate(_BRACKETS)))
    if not found:
        return None
    last = found[-1]
    if last["number"] is None and last["place"] is None:
        return last.start(), Verdict.TIE
    return last.start(), Verdict(int(last["number"] or _PLACES[last["place"].lower()]))


def parse_better_in_answer(text: str) -> Verdict | None:
    """Return the verdict of UnifiedReward-Think: as `parse_better`, inside of the last <answer> tag."""
    text = behind_thinking(text)
    answer = _inside(text, text.rfind("<answer>", 0, max(text.rfind("</answer>"), 0)))
    return None if answer is None else parse_better(answer)


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


def _inside(text: str, place: int) -> str | None:
    """Return what stands inside the <answer> tag at a place of the text; None if there is none, or it is not closed."""
    answer, end, _ = text[place:].removeprefix("<answer>").partition("</answer>")
    return answer if end and place >= 0 else None


def _braced(text: str) -> str | None:
    """Return what the braces hold with which a text begins; None if there are none, or they are never closed."""
    depth = 0
    for place, mark in enumerate(text):
        depth += (mark == "{") - (mark == "}")
        if depth == 0:
            return text[1:place] if place else None
    return None

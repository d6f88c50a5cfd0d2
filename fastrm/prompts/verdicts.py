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

_LESS = rf"(?:{DENIAL}|only|from|less|no)\b"
_DEGREE = rf"(?:(?!{_LESS})(?:\w+ly|the|a|by|far|and|away|much|so|way|lot|bit|still|also|somewhat)\s+)"
_STOPS = r"(?=[ \t]*(?:\Z|\n|[^\w\s-])|\s+(?:-|(?:and|but|so|overall|because|since|as)\b))"
_BRACKETS = str.maketrans("[]()", "    ")
_PLACES = {"first": 1, "second": 2, "1": 1, "2": 2, "a": 1, "b": 2}
_WINNER = (
    # "Response 1 is far and away better", and with one word of any kind before "better"
    rf"\b{NOUN}\s*(?P<number>[12])\s+is\s+{_DEGREE}{{0,4}}(?:(?!{_LESS})\w+\s+)?"
    r"better\b(?!(?:\s+one)?\s+(?:is|would|in no|by no)\b)(?:\s+one\b)?"
    # "The better response: [first]", "The better answer is Answer 2"; not "for a better response: 1. Cite sources"
    r"|(?:\b(?P<any>an?|any)\s+(?:even\s+)?)?\bbetter\s+(?:response|answer)\s*(?:is|(?P<listed>:))\s*"
    rf"(?:the\s+)?(?:{NOUN}\s+)?(?P<place>first|second|[12ab])(?:\s+(?:one|{NOUN}))?{_STOPS}"
    r"(?(listed)(?!\.[ \t]+\w))"
)
# The clause of a tie: what it begins with, the responses and nothing else as its subject, and that they are equal.
_OPENING = (
    r"(?:(?P<sum>overall|all in all|in (?:all|sum|short|conclusion|summary|total|the end)|ultimately|finally)"
    rf"|(?!{DENIAL}\b)\w+ly|i (?:would )?(?:say|think|believe|find|conclude)(?: that)?|in my (?:view|opinion)"
    r"|(?:final )?(?:verdict|conclusion|judge?ment))"
)
_RESPONSES = (
    rf"(?:both(?: +of +(?:them|the(?: +two)? +{NOUN}s)|(?: +the)?(?: +two)? +{NOUN}s)?|they|(?:the|these) +two"
    rf"|(?:(?:the|these) +)?(?:two +)?{NOUN}s|(?:both +)?{NOUN}s? *[12] +(?:and|&) +(?:{NOUN} *)?[12])"
)
_TIE = (
    rf"\b(?:{_OPENING}[ ,]+){{0,2}}(?:{_RESPONSES}(?: +both)?(?: +are)?"
    rf"(?: +(?!{_LESS})(?:\w+ly|both|about|all|in|overall|thus)){{0,4}}?"
    r" +(?:equally +(?:good|bad)|(?:do|perform) +equally +well)"
    r"|(?:it|this|(?:the|my) +(?:final +)?(?:result|verdict|outcome|comparison|decision))(?: +is|'s)"
    rf" +(?:(?!{_LESS})\w+ly +)?a +tie){_STOPS}"
)
_BETTER = sentences(_WINNER, _TIE)


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
    ...") or asked is no verdict: see `fastrm.prompts.clauses.said`. A tie is one only where its clause has no other
    subject than the responses; behind "Answer 1 is better" it counts in a later sentence, or in sum ("overall ...").
    """
    last = _last(text)
    if last is None:
        return None
    if last.lastgroup == "alone":
        return last.start(), Verdict.TIE
    return last.start(), Verdict(int(last["number"] or _PLACES[last["place"].lower()]))


def ends_with_better(text: str) -> bool:
    """Return whether a text ends with the sentence of its verdict, as `find_better` reads it, and marks."""
    last = _last(text)
    return last is not None and re.search(r"\w|\?", text[last.end() :]) is None


def _last(text: str) -> re.Match[str] | None:
    found = [one for one in said(_BETTER, plain(text).translate(_BRACKETS)) if not one["any"]]
    return found[-1] if found else None


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

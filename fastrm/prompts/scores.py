"""The score that a pointwise judge writes."""

import re

from fastrm.prompts.clauses import DENIAL, behind_thinking, plain, said, sentences

# 4, -1, .5, 72.5, 1,000
_NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
# What says how high a score can be, beside the word or its mark: "(1-100)", "[1, 10]", "out of 5", "from 1 to 10".
_SCALE = (
    rf"(?:(?:[(\[][^()\[\]\n]{{0,80}}[)\]](?! *[+/x\u00d7\u00f7])|(?:/|out of) *{_NUMBER}(?!\d)"
    rf"|(?:, *)?(?:(?:from|between|on a scale (?:of|from)) +)?{_NUMBER} *(?:-|to|and) *{_NUMBER}(?![.,]?\d))\s*)?"
)
# Between the word and the number: a mark, which makes it a stated score, or a verb, a bracket or nothing.
_LINK = r"(?:(?P<stated>(?:is *)?[:=|>]|-(?=\s))\s*|(?:is|was|of|(?:would|should|will) be)\s+|(?<=[\s)\]])|(?=[(\[]))"
# A calculation before its value, "20 + 30 + 35 = ", "(4 + 5)/2 = ", which may name its parts in brackets; of
# "85/100 = " the first number is the score.
_SUM = (
    rf"(?:(?!{_NUMBER} */ *{_NUMBER} *=)"
    r"(?:(?=[\d(.])(?:\([^()\n]{0,40}\)|[-+x\u00d7\u00f7/\d., ]){1,80}= *)+)?"
)
# Behind a number that is no score: the rest of another number, of a range, of a scale or of a calculation, and what
# tells of a score that was not given ("a score of 100 would need more", "score 1: ..."), which a stated one never is.
_NO_SCORE = (
    r"(?!\w|[.,]\d| *(?:-|to|or) *\.?\d| \d{3}(?!\d)| *(?:\([^()\n]{0,40}\))? *[+x\u00d7\u00f7=] *[\d(])"
    r"(?(stated)(?! *: *\d)|(?! +(?:would|could|should|means?|needs?|requires?|is)\b| *[:=]))"
)
# What was taken off, which is less than the score: "8 - 1 point deducted"; "4 - 5 points" is a range.
_LESS = rf" +- +(?P<less>{_NUMBER})(?= +[a-z])(?![^=\n]{{0,80}}=)"
# Every part begins with something else than white space, so that much of it is read in linear time.
_SCORE = sentences(
    rf"(?P<label>\b(?:(?!{DENIAL}\b)\w+ +){{0,3}})(?<!highest )(?<!maximum )\bscore\b\s*{_SCALE}{_LINK}{_SCALE}{_SUM}"
    rf"(?:(?:[(\[<{{$~]|\\boxed\{{)\s*){{0,2}}(?P<number>{_NUMBER})(?:{_LESS}|{_NO_SCORE})"
)
_FINAL = re.compile(r"\b(?:final|overall|total)\b", re.IGNORECASE)


def parse_score(text: str) -> float | None:
    """Return the score that a text gives, as it stands there, whatever its scale: "Final Score (1-100): 85".

    Of several that are given in different ways, the first of these ways counts:

    1. "Final Score: 85", likewise overall and total; the last one.
    2. "Score: 85", of nothing in particular; the last one.
    3. in prose, "a final score of 85", "the overall score is 85".
    4. any other, such as "a score of 85", "Score 85/100", "Accuracy score: 85".

    Of the last two ways several different numbers are no score, as it is not known which one is meant. Nor is a range,
    or a score that is denied or doubted. Of a calculation ("20 + 65 = 85") its value counts, and nothing where it has
    none. Only what stands behind the thinking counts.
    """
    found: dict[int, list[float]] = {}
    for score in said(_SCORE, plain(behind_thinking(text))):
        number, less = (_number(score[name]) for name in ("number", "less"))
        if less is None or less < number:
            found.setdefault(_rank(score), []).append(number)
    if not found:
        return None
    rank = min(found)
    return found[rank][-1] if rank < 2 or len(set(found[rank])) == 1 else None


def _number(text: str | None) -> float | None:
    return None if text is None else float(text.replace(",", ""))


def _rank(score: re.Match[str]) -> int:
    is_final = _FINAL.search(score["label"]) is not None
    if score["stated"] is None:
        return 2 if is_final else 3
    if is_final:
        return 0
    return 1 if score["label"].lower().strip() in ("", "the", "my") else 3

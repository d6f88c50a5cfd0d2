"""Sentences that a text says, in contrast to those that it denies, doubts, concedes or asks.

A text is read once, from left to right, as a row of four things: sentences that are looked for, words that take away
what follows them in their clause ("not", "whether", "although"), marks and words at which a clause ends, and the "or"
of two alternatives, of which neither is said. No grammar is known besides: where such words stand before a sentence, it
is rather not read than misread; what follows it takes nothing away.
"""

import re
from collections.abc import Iterator

NOUN = "(?:answer|response|assistant)"
# "no errors" denies errors, and no sentence that follows; "no way" and "no judge would say" deny what follows.
_NO = (
    r"no(?= +(?:(?:\w+ +)?(?:one|way|longer|means|case|sense|reason|evidence|sign|proof|basis|indication|score)\b"
    r"|(?:\w+ +){1,2}(?:that|would|could|can|should|to)\b))"
)
# Words that deny, doubt or concede what follows.
DENIAL = (
    rf"(?:{_NO}|not|cannot|none|nobody|nothing|nowhere|never|neither|nor|rarely|hardly|seldom|scarcely|barely|whether|if"
    r"|unless|might|may|could|maybe|perhaps|possibly|unlikely|unclear|impossible|doubt\w*|disagree"
    r"|(?:hard|difficult|wrong|unfair|fails?) to|far from|less (?:clear|likely|certain|sure)"
    r"|(?:false|wrong|untrue|incorrect|(?:claim|reject|dispute)\w*|den(?:y|ies|ied)) that"
    r"|(?:little|scant) (?:evidence|reason|sign|proof|basis)|instead of|rather than"
    r"|though|although|while|whereas|despite)"
)
# Where a sentence can begin: what is joined by "and", "so" and "yet" only then begins a clause ("so much", "not yet").
_SUBJECT = rf"(?= +(?:i|it|the|this|these|they|both|overall|thus|{NOUN})\b)"
# By the rules, in their order: an earlier one counts where two fit.
_RULES = {
    "end": r"[.!\n]|</?(?:think|answer)>",
    "asked": r"\?",
    # Alternatives are whole sentences: "accuracy or response length" and "question/answer" are none.
    "either": rf"(?:\bor\b|/)(?= *(?:that +)?(?:{NOUN} *[12]\b|both\b[^.!?\n]{{0,60}}?\bequally\b))",
    # What a comma cuts off from its verb: "It is not the case, I think, that ..."
    "denied": rf", *that\b|n't\b|\b{DENIAL}\b",
    "part": r"[;:]",
    "mark": rf"[,|]| - |\b(?:but|however|therefore|thus|hence)\b|\b(?:and|so|yet){_SUBJECT}",
}
# These hold a denial, and deny nothing behind them; the second is over where its sentence begins.
_HARMLESS = r"\b(?:no|little|without(?: a| any)?) (?:doubt|question)\b"
_OVER = rf"\bneither \w+ nor \w+(?= +{NOUN} [12] is\b)"  # "since it is neither right nor clear Response 2 is better"
# The dashes and the apostrophe of typography are read as those of a keyboard; the long dash parts as a colon does.
_TYPED = {0x2019: "'", 0x2212: "-", 0x2013: "-", 0x2014: ":", 0x201C: " ", 0x201D: " ", 0xA0: " ", 0x9: " "}
_PLAIN = str.maketrans(dict.fromkeys('*_`#"', " ")) | _TYPED

_QUOTE = re.compile(r"(?<!\w)'|'(?!\w)")  # not the apostrophe of "don't"
# A line goes on in the next one that begins as no sentence, list, heading or label does ("final score: 85"), or that
# stands behind a word with which no sentence ends.
_WRAPPED = re.compile(r"\n(?=[ \t]*(?![a-z][.)]|[a-z][a-z _]{0,30}[:=])[a-z])")
_UNFINISHED = re.compile(
    r"(\b(?:an?|the|that|than|or|and|but|of|to|in|for|with|by|at|on|is|are|be|not|never|if|whether|while|although|though"
    r"|because|since|as|say|says|saying|think|believe|agree|claim|claims|suggests?|means?)[ \t\r]{0,4})"
    r"\n(?=[ \t]*(?:\*\*|__)?[^\W\d_])",
    re.IGNORECASE,
)
# What brackets or quotation marks hold is asked by itself: it is no question about the sentence around it.
_ASIDE = re.compile(r"\([^()\n]*\)|\"[^\"\n]*\"|\u201c[^\u201c\u201d\n]*\u201d|(?<!\w)'[^'\n]*'(?!\w)")
_WORD = re.compile(r"\w")


def plain(text: str) -> str:
    """Return a text as `said` reads it, each character in its place.

    It has no markdown and no quotation marks, no questions in brackets or quotation marks, and no ends of lines in the
    middle of a clause.
    """
    text = _UNFINISHED.sub(r"\1 ", _WRAPPED.sub(" ", text))
    return _QUOTE.sub(" ", _ASIDE.sub(_without_question, text).translate(_PLAIN))


def _without_question(aside: re.Match[str]) -> str:
    return " " * len(aside[0]) if aside[0][:-1].rstrip().endswith("?") else aside[0]


def behind_thinking(text: str) -> str:
    """Return what stands behind the last </think>, and before a <think> that is never closed."""
    return text.rpartition("</think>")[2].partition("<think>")[0]


def sentences(pattern: str, alone: str = r"(?!)") -> re.Pattern[str]:
    """Return what `said` looks for, sentences that are compared without regard to case.

    Args:
        pattern: of sentences that may stand anywhere.
        alone: of sentences that are only said where a clause begins, and not behind another one in its sentence but in
            sum: where its group `sum` holds something ("overall").
    """
    rules = {"said": pattern, "alone": alone, "harmless": _HARMLESS, "over": _OVER} | _RULES
    return re.compile("|".join(f"(?P<{name}>{rule})" for name, rule in rules.items()), re.IGNORECASE)


def said(wanted: re.Pattern[str], text: str) -> Iterator[re.Match[str]]:
    """Yield the sentences that a text says, from its beginning to its end, in time linear in its length.

    Not yielded is a sentence behind a denial, a doubt or a concession in the same clause, one that is asked, and one
    that is an alternative of another ("Response 1 is better or Response 2 is better").

    Args:
        wanted: of `sentences`.
        text: as `plain` returns it.
    """
    open_sentence: list[re.Match[str]] = []
    num_unasked = 0  # of these, those before the last colon or semicolon, behind which a question begins
    is_denied = False
    begin: int | None = 0  # of the clause; None where something of it was read
    for found in wanted.finditer(text):
        rule = found.lastgroup
        is_first = begin is not None and _WORD.search(text, begin, found.start()) is None
        begin = found.end() if rule in ("end", "asked", "part", "mark") else None
        if rule == "said" or (rule == "alone" and is_first and (not open_sentence or found["sum"])):
            open_sentence += [] if is_denied else [found]
        if rule in ("said", "alone", "harmless"):
            continue
        is_denied = rule in ("denied", "either")
        if rule == "part":
            num_unasked = len(open_sentence)
        elif rule == "either":
            open_sentence.clear()
        elif rule in ("end", "asked"):
            yield from open_sentence[: num_unasked if rule == "asked" else None]
            open_sentence.clear()
            num_unasked = 0
    yield from open_sentence

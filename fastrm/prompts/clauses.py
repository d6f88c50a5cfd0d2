"""Sentences that a text says, in contrast to those that it denies, doubts, concedes or asks.

A text is read once, from left to right, as a row of four things: sentences that are looked for, words that take away
what follows them in their clause ("not", "whether", "although"), marks and words at which a clause ends, and the "or"
of two alternatives, of which neither is said. No grammar is known besides: where such words stand near a sentence, it
is rather not read than misread.
"""

import re
from collections.abc import Iterator

NOUN = "(?:answer|response|assistant)"
# Words that deny, doubt or concede what follows.
DENIAL = (
    r"(?:not|cannot|no|none|nobody|never|neither|nor|rarely|hardly|seldom|scarcely|barely|whether|if|unless|might|may"
    r"|could|maybe|perhaps|possibly|unlikely|unclear|impossible|doubt\w*|disagree"
    r"|(?:hard|difficult|wrong|unfair|fails?) to"
    r"|(?:false|wrong|untrue|incorrect) that|though|although|while|whereas|despite)"
)
# Where a sentence can begin: what is joined by "and", "so" and "yet" only then begins a clause ("so much", "not yet").
_SUBJECT = rf"(?= +(?:i|it|the|this|these|they|both|overall|thus|{NOUN})\b)"
# By the rules, in their order: an earlier one counts where two fit.
_RULES = {
    "end": r"[.!\n]",
    "asked": r"\?",
    "either": rf"(?:\bor\b|/)(?= *(?:both|{NOUN})\b)",
    # What a comma cuts off from its verb: "It is not the case, I think, that ..."
    "denied": rf", *that\b|n't\b|\b{DENIAL}\b",
    "mark": rf"[,;:|]| - |\b(?:but|however|therefore|thus|hence)\b|\b(?:and|so|yet){_SUBJECT}",
}
# These hold a denial, and deny nothing behind them.
_HARMLESS = (
    r"\b(?:no|without(?: a| any)?) (?:doubt|question)\b"
    rf"|\bneither \w+ nor \w+(?= +{NOUN} [12] is\b)"  # "since it is neither right nor clear Response 2 is better"
)
# The dashes and the apostrophe of typography are read as those of a keyboard; the long dash parts as a colon does.
_TYPED = {0x2019: "'", 0x2212: "-", 0x2013: "-", 0x2014: ":", 0x201C: " ", 0x201D: " ", 0xA0: " ", 0x9: " "}
_PLAIN = str.maketrans(dict.fromkeys('*_`#"', " ")) | _TYPED

_QUOTE = re.compile(r"(?<!\w)'|'(?!\w)")  # not the apostrophe of "don't"


def plain(text: str) -> str:
    """Return a text without markdown and quotation marks, each other character in its place."""
    return _QUOTE.sub(" ", text.translate(_PLAIN))


def behind_thinking(text: str) -> str:
    """Return what stands behind the last </think>, and before a <think> that is never closed."""
    return text.rpartition("</think>")[2].partition("<think>")[0]


def sentences(pattern: str) -> re.Pattern[str]:
    """Return what `said` looks for: a pattern of sentences, which is compared without regard to case."""
    rules = {"said": pattern, "harmless": _HARMLESS} | _RULES
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
    is_denied = False
    for found in wanted.finditer(text):
        rule = found.lastgroup
        if rule == "said":
            open_sentence += [] if is_denied else [found]
            continue
        is_denied = rule in ("denied", "either")
        if rule in ("asked", "either"):
            open_sentence.clear()
        elif rule == "end":
            yield from open_sentence
            open_sentence.clear()
    yield from open_sentence

r"""Decision whether a response gives the true answer, by rules that docs/rl.md writes down.

The answer of a response is the last ``<answer>...</answer>``, else the last ``\boxed{...}``, else the line after the
last ``####``, ``answer is`` or ``answer:``, else the whole response. It is compared as one of `KINDS`:

* ``text``: equal after NFKC, case folding, and removal of marks and white space around it;
* ``choice``: the letter of an option, alone or followed by a mark, with no second option after it;
* ``math``: equal as written, or as decimal numbers, or by math-verify in a process of its own (`math_check.py`);
* ``auto``: by the true answer, ``choice`` for a capital letter, ``math`` for a number or formula, else ``text``.

Responses are what a policy made up: everything here takes time in proportion to a text's length.
"""

import math
import re
import unicodedata
from collections.abc import Sequence
from decimal import Decimal
from numbers import Real

from fastrm.errors import ConfigError, DataError
from fastrm.rl.math_check import equal_as_math

KINDS = ("auto", "text", "choice", "math")
MAX_ANSWER_CHARS = 4096  # an answer longer by this than the true one is wrong, and would only cost time
_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
_BRACE = re.compile(r"[{}]")
_SAID = re.compile(r"(?:####|\banswer(?:\s+is\b(?:\s*:)?|\s*:))\**", re.IGNORECASE)
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|operatorname)\{([^{}]*)\}")
_MARKS = " \t\r\n.,;:!?\"'`*$"
_OPTION = re.compile(r"\s*(?:option\b\s*)?[(\[]?([A-Za-z])(?:[)\].:,]+|\s+[-\u2013\u2014]|\s*$)", re.IGNORECASE)
# A letter after the first one and what joins the options of a list; "a" before a word is an article.
_NEXT_OPTION = re.compile(
    r"(?:[\s.,;:/&|()\[\]\u2013\u2014-]|(?:and|or|option|also|maybe|perhaps|possibly)\b)*"
    r"(?<![A-Za-z])[A-Za-z](?=\s*(?:$|[)\].,:;/&|\u2013\u2014-])|\s+(?:and|or)\b)",
    re.IGNORECASE,
)
_ONE_CAPITAL = re.compile(r"[(\[]?[A-J][)\]]?[.:]?")
_COMMAND = re.compile(r"\\[a-zA-Z]+")
_WORD = re.compile(r"[^\W\d_]{3,}")
_NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d*)(?:(?<=\d)\.|\.\d+)?(?:(?<=[\d.])e[+-]?\d{1,6})?", re.IGNORECASE)
# Numbers, or what looks like them, joined by commas that are not those of thousands: a list, which is no number.
_COMMAS = re.compile(r"[\d.,\s]*\d\s*,[\d.,\s]*")
_WRAPS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"), ("*", "*"), ("`", "`"), ('"', '"'))
_RAISED = dict(
    zip(map(ord, "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b"), "0123456789-", strict=True)
)
_RAISED_RUN = re.compile("[" + "".join(map(chr, _RAISED)) + "]+")


def check_kind(kind: str) -> str:
    """Return the kind itself.

    Raises:
        ConfigError: if it is none of `KINDS`.
    """
    if kind not in KINDS:
        raise ConfigError(f"answers: got {kind!r}, wanted one of {', '.join(KINDS)}")
    return kind


def is_match(response: str, truth: str | float | Sequence | None, kind: str = "auto") -> bool:
    """Return whether a response gives the true answer, or one of several; not if there is none.

    It returns within the time limit of `equal_as_math`, whatever the texts are.

    Raises:
        ConfigError: for a kind that is none of `KINDS`, or ``math`` without math-verify.
        DataError: as `read_truth`.
    """
    check_kind(kind)
    wanted = [extract_answer(one) for one in read_truth(truth)]
    got = extract_answer(response) if wanted else ""
    return any(_is_equal(got, one, _kind_of(one) if kind == "auto" else kind) for one in wanted)


def read_truth(truth: object) -> list[str]:
    """Return the true answers as texts: none for None, an empty text or NaN, which tables hold for a missing value.

    Args:
        truth: text, a number, or a list, tuple or array of them.

    Raises:
        DataError: for anything else, which would silently never be right.
    """
    if hasattr(truth, "tolist"):  # arrays, tensors and their scalars
        truth = truth.tolist()
    if isinstance(truth, (list, tuple)):
        return [text for one in truth for text in read_truth(one)]
    if isinstance(truth, str):
        return [truth] if truth.strip() else []
    if truth is None or (isinstance(truth, (Real, Decimal)) and math.isnan(truth)):
        return []
    if isinstance(truth, (Real, Decimal)):
        return [str(truth)]
    raise DataError(
        f"true answer: got {type(truth).__name__} {truth!r:.80}, wanted text, a number, or a list of them; "
        "name the column that holds the answer itself"
    )


def extract_answer(text: str) -> str:
    """Return the answer that a text marks, or the whole text if it marks none."""
    if (tagged := _last_tagged(text)) is not None:
        text = tagged
    if (boxed := _last_boxed(text)) is not None:
        return boxed.strip()
    text = text.strip()
    if tagged is None and (ends := [mark.end() for mark in _SAID.finditer(text) if mark.end() < len(text)]):
        return text[ends[-1] :].strip().split("\n", 1)[0].strip()
    return text


def normalised(text: str) -> str:
    """Return a text as the kind ``text`` compares it."""
    return " ".join(unicodedata.normalize("NFKC", _plain(text)).casefold().split()).strip(_MARKS)


def _last_tagged(text: str) -> str | None:
    start, found = None, None
    for tag in _TAG.finditer(text):
        if not tag[1]:
            start = tag.end()
        elif start is not None:
            found, start = (start, tag.start()), None
    return text[slice(*found)] if found else None


def _last_boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for brace in _BRACE.finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[start : brace.start()]
    return None  # cut off before it was closed


def _plain(text: str) -> str:
    r"""Return a text without LaTeX's ``\text{}`` and fonts, which may be in one another."""
    for _ in range(3):
        text = _TEXT.sub(r"\1", text)
    return text


def _kind_of(truth: str) -> str:
    if _ONE_CAPITAL.fullmatch(_plain(truth)):
        return "choice"
    return "math" if (any(c.isdigit() for c in truth) or "\\" in truth) and not _has_word(truth) else "text"


def _has_word(text: str) -> bool:
    return _WORD.search(_COMMAND.sub("", text)) is not None


def _is_equal(got: str, wanted: str, kind: str) -> bool:
    if kind == "choice":
        letter = _letter(wanted)
        return letter is not None and _letter(got) == letter
    if len(got) > len(wanted) + MAX_ANSWER_CHARS:
        return False
    if kind == "math" and (any(c.isdigit() for c in wanted) or not _has_word(wanted)):
        return _equal_formulas(got, wanted)
    return normalised(got) == normalised(wanted) != ""


def _letter(text: str) -> str | None:
    """Return the letter of the one option that an answer names; None if it names none or several."""
    text = re.sub(r"\\[()\[\] ]|[*`$_\"'{}]", "", _plain(text[:MAX_ANSWER_CHARS])).strip()
    found = _OPTION.match(text)
    if not found or _NEXT_OPTION.match(text, found.end(1)):
        return None
    return found[1].upper()


def _equal_formulas(got: str, wanted: str) -> bool:
    said, meant = _without_raised(got), _without_raised(wanted)
    got, wanted = _bare(said), _bare(meant)
    if not got or not wanted:
        return False
    if got == wanted:
        return True
    numbers = _decimal(got), _decimal(wanted)
    if None not in numbers:
        return numbers[0] == numbers[1]
    lists = [_COMMAS.fullmatch(text) is not None for text in (got, wanted) if _decimal(text) is None]
    if any(lists):
        # math-verify reads 3,5 as 35. Items are compared here, and a list equals nothing but a list.
        items = [[item.strip() for item in text.split(",")] for text in (got, wanted)]
        return lists == [True, True] and items[0] == items[1]
    return equal_as_math(said, meant)


def _without_raised(text: str) -> str:
    """Return a text with raised digits as exponents and the sign of minus as a hyphen, which parsers read."""
    return _RAISED_RUN.sub(lambda run: f"^{{{run[0].translate(_RAISED)}}}", text).replace("\u2212", "-")


def _bare(text: str) -> str:
    """Return a formula without what sentences and Markdown put around it; no sign that changes its value is lost."""
    text = " ".join(text.split())
    while True:
        before = text
        text = text.removesuffix(".").removesuffix("**").removeprefix("**").strip()
        for left, right in _WRAPS:
            inner = text[len(left) : len(text) - len(right)]
            if len(text) > len(left + right) and text.startswith(left) and text.endswith(right) and left not in inner:
                text = inner.strip()
        if text == before:
            return text


def _decimal(text: str) -> Decimal | None:
    """Return the value of a decimal number, whose commas, if any, part thousands; None for any other text."""
    if not _NUMBER.fullmatch(text) or not any(c.isdigit() for c in text):
        return None
    return Decimal(text.replace(",", ""))

r"""Decision whether a response gives the true answer, by rules that docs/rl.md writes down.

The answer of a response is the last ``<answer>...</answer>``, else the last ``\boxed{...}``, else what follows the last
``####``, ``answer is`` or ``answer:`` in its line, else the whole response. It is compared as one of `KINDS`:

* ``text``: equal after NFKC, case folding, and removal of marks and white space around it;
* ``choice``: the letter of an option, alone or followed by ``.``, ``)``, ``:`` or ``,``;
* ``math``: equal as text, or as decimal numbers, or by math-verify in a process of its own (`math_check.py`);
* ``auto``: by the true answer, ``choice`` for a capital letter, ``math`` for a number or formula, else ``text``.
"""

import re
import unicodedata
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

from fastrm.errors import ConfigError
from fastrm.rl.math_check import equal_as_math

KINDS = ("auto", "text", "choice", "math")
MAX_ANSWER_CHARS = 4096  # a longer text is no answer, and would only cost time
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_SAID = re.compile(r"(?:####|\banswer(?:\s+is\b\s*:?|\s*:))[ \t]*(\S[^\n]*)", re.IGNORECASE)
_MARKS = " \t\r\n.,;:!?\"'`*$"
_LETTER = re.compile(r"[(\[]?([A-Za-z])(?:[)\].:,]|$)")
_ONE_CAPITAL = re.compile(r"[(\[]?[A-J][)\]]?[.:]?")
_COMMAND = re.compile(r"\\[a-zA-Z]+")
_WORD = re.compile(r"[^\W\d_]{3,}")


def check_kind(kind: str) -> str:
    """Return the kind itself.

    Raises:
        ConfigError: if it is none of `KINDS`.
    """
    if kind not in KINDS:
        raise ConfigError(f"answers: got {kind!r}, wanted one of {', '.join(KINDS)}")
    return kind


def is_match(response: str, truth: str | float | Sequence, kind: str = "auto") -> bool:
    """Return whether a response gives the true answer, or one of several.

    It returns within the time limit of `equal_as_math`, whatever the texts are.

    Raises:
        ConfigError: for a kind that is none of `KINDS`, or ``math`` without math-verify.
    """
    check_kind(kind)
    if isinstance(truth, (list, tuple)):
        return any(is_match(response, one, kind) for one in truth)
    wanted, got = extract_answer(str(truth)), extract_answer(response)
    kind = _kind_of(wanted) if kind == "auto" else kind
    if kind == "choice":
        letter = _letter(wanted)
        return letter is not None and _letter(got) == letter
    if normalised(got) == normalised(wanted) != "":
        return True
    return kind == "math" and _equal_numbers(got, wanted)


def extract_answer(text: str) -> str:
    """Return the answer that a text marks, or the whole text if it marks none."""
    if tagged := _TAGGED.findall(text):
        text = tagged[-1]
    if (boxed := _last_boxed(text)) is not None:
        return boxed.strip()
    if not tagged and (said := _SAID.findall(text)):
        return said[-1].strip()
    return text.strip()


def normalised(text: str) -> str:
    """Return a text as the kind ``text`` compares it."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(_MARKS)


def _last_boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start:place]
    return None  # cut off before it was closed


def _kind_of(truth: str) -> str:
    if _ONE_CAPITAL.fullmatch(truth):
        return "choice"
    is_formula = any(c.isdigit() for c in truth) or "\\" in truth
    return "math" if is_formula and not _WORD.search(_COMMAND.sub("", truth)) else "text"


def _letter(text: str) -> str | None:
    found = _LETTER.match(text.strip(_MARKS))
    return found[1].upper() if found else None


def _equal_numbers(got: str, wanted: str) -> bool:
    numbers = _decimal(got), _decimal(wanted)
    if None not in numbers:
        return numbers[0] == numbers[1]
    if len(got) > MAX_ANSWER_CHARS or not got:
        return False
    return equal_as_math(got, wanted)


def _decimal(text: str) -> Decimal | None:
    try:
        number = Decimal(text.strip(_MARKS.replace(".", "")).replace(",", ""))
    except InvalidOperation:
        return None
    return number if number.is_finite() else None

"""Checks of single values of a row; each failure names the field, what was got and what was wanted."""

import json
import math
from collections.abc import Iterator

from fastrm.errors import RecordError

DUPLICATE_KEY = "DUPLICATE_KEY"
MAX_NUMBER = float((2 - 2**-23) * 2**127)  # the largest of float32, without numpy


def describe(value: object) -> str:
    """Describe a value's kind in the words of its file, such as ``a boolean (true)`` or ``a list``."""
    if value is None:
        return "missing or null"
    if isinstance(value, bool):
        return f"a boolean ({str(value).lower()})"
    if isinstance(value, (int, float)):
        return f"a number ({value:g})" if isinstance(value, float) else "a number"
    names = {str: "text", list: "a list", dict: "an object", bytes: "bytes"}
    return names.get(type(value), f"a Python {type(value).__name__}")


def bad_row(name: str, value: object, wanted: str) -> RecordError:
    """Return the error for a field that is missing or of the wrong kind."""
    return RecordError("BAD_ROW", f'"{name}" is {describe(value)}, wanted {wanted}')


def check_text(value: object, name: str) -> str:
    """Return the text itself after checking it.

    Raises:
        RecordError: BAD_ROW if it is not text; BAD_TEXT if UTF-8 cannot encode it or it holds NUL.
    """
    if not isinstance(value, str):
        raise bad_row(name, value, "text")
    if "\0" in value:
        raise RecordError("BAD_TEXT", f'"{name}" holds a NUL character; remove it')
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RecordError(
            "BAD_TEXT", f'"{name}" has a lone surrogate at character {error.start}; write it as valid UTF-8'
        ) from error
    return value


def decode_json(text: str) -> object:
    """Return the value of JSON text.

    Raises:
        RecordError: DUPLICATE_KEY for an object in which a key stands twice; Python would keep the last in silence.
        ValueError, RecursionError: it is not JSON.
    """
    return _DECODER.decode(text)


def unique_keys(pairs: list[tuple[str, object]]) -> dict:
    """Return an object of JSON by its keys and values.

    Raises:
        RecordError: DUPLICATE_KEY.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        key = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise RecordError(DUPLICATE_KEY, f"the key {json.dumps(key)} stands twice in one object; keep one of them")
    return found


# Made once: json.loads would make a decoder with such a hook for every text.
_DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)


def check_json(value: object, name: str) -> str:
    """Return the value as JSON text, with keys in their order.

    Raises:
        RecordError: BAD_ROW if it cannot be written as JSON; BAD_TEXT as `check_text`.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RecordError(
            "BAD_ROW", f'"{name}" holds what JSON cannot: {error}; wanted texts, numbers, lists'
        ) from error
    for item in _texts(value):
        check_text(item, name)
    return text


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in (*value.keys(), *value.values()):
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)


def check_list(value: object, name: str, wanted: str) -> list | tuple:
    """Return the list itself; raise RecordError BAD_ROW if it is empty or no list."""
    if not isinstance(value, (list, tuple)):
        raise bad_row(name, value, wanted)
    if not value:
        raise RecordError("BAD_ROW", f'"{name}" is an empty list, wanted {wanted}')
    return value


def check_number(value: object, name: str) -> float:
    """Return a number that is finite, also in float32, the dtype of the computation.

    Raises:
        RecordError: BAD_PREFERENCE for anything else.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RecordError("BAD_PREFERENCE", f'"{name}" is {describe(value)}, wanted a number')
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not abs(number) <= MAX_NUMBER:
        raise RecordError(
            "BAD_PREFERENCE", f'"{name}" is {number:g}, wanted a finite number of at most {MAX_NUMBER:.4g} (float32)'
        )
    return number

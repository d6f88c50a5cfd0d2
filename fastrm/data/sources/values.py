"""Checks of single values of a row; each failure names the field, what was got and what was wanted."""

import math

from fastrm.errors import RecordError


def describe(value: object) -> str:
    """A value's kind in the words of its file, such as ``a boolean (true)`` or ``a list``."""
    if value is None:
        return "missing or null"
    if isinstance(value, bool):
        return f"a boolean ({str(value).lower()})"
    if isinstance(value, (int, float)):
        return f"a number ({value:g})" if isinstance(value, float) else "a number"
    names = {str: "text", list: "a list", dict: "an object", bytes: "bytes"}
    return names.get(type(value), f"a Python {type(value).__name__}")


def bad_row(name: str, value: object, wanted: str) -> RecordError:
    """The error for a field that is missing or of the wrong kind."""
    return RecordError("BAD_ROW", f'"{name}" is {describe(value)}, wanted {wanted}')


def check_text(value: object, name: str) -> str:
    """The text itself.

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


def check_list(value: object, name: str, wanted: str) -> list | tuple:
    """The non-empty list itself, or RecordError BAD_ROW."""
    if not isinstance(value, (list, tuple)):
        raise bad_row(name, value, wanted)
    if not value:
        raise RecordError("BAD_ROW", f'"{name}" is an empty list, wanted {wanted}')
    return value


def check_number(value: object, name: str) -> float:
    """A finite number.

    Raises:
        RecordError: BAD_PREFERENCE for anything else.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RecordError("BAD_PREFERENCE", f'"{name}" is {describe(value)}, wanted a number')
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RecordError("BAD_PREFERENCE", f'"{name}" is {number}, wanted a finite number')
    return number

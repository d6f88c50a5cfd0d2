"""The function that makes all JSON that fastrm writes."""

import json
import math
from typing import Any


def to_json(value: Any, **layout: Any) -> str:
    """Return a value as JSON that every parser reads (RFC 8259).

    JSON has no word for a number that is not finite. Python would write NaN and Infinity, which other parsers refuse;
    here they are null. That is for measurements, such as the loss of a step that was skipped: rewards are refused
    before they come here.

    Args:
        layout: as `json.dumps` takes it: indent, separators, sort_keys, ensure_ascii.
    """
    try:
        return json.dumps(value, allow_nan=False, **layout)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False, **layout)


def _finite(value: Any) -> Any:
    """Return the value with None in place of numbers that are not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value

"""RLHF-V: the flat pair (`question`, `chosen`, `rejected`) is JSON inside the column `text`, beside `image`."""

from fastrm.data.sources.draft import Draft
from fastrm.data.sources.keys import check_unread, unread_keys
from fastrm.data.sources.layouts import flat
from fastrm.data.sources.media import Resolve
from fastrm.data.sources.values import bad_row, check_text, decode_json
from fastrm.errors import RecordError

KEYS = ("text", *flat.KEYS)


def matches(row: dict) -> bool:
    return isinstance(row.get("text"), str) and not any(key in row for key in ("prompt", "question", "chosen"))


def parse(row: dict, resolve: Resolve) -> Draft:
    """Parse a row in this layout. Raises RecordError for a row that cannot be used."""
    text = check_text(row.get("text"), "text")
    try:
        inner = decode_json(text)
    except (ValueError, RecursionError) as error:
        raise RecordError("BAD_JSON", f'"text" is not JSON: {error}; correct it') from error
    if not isinstance(inner, dict):
        raise bad_row("text", inner, "an object with question, chosen and rejected")
    check_unread({**row, **inner}, unread_keys(inner, flat.KEYS), flat.KEYS)
    return flat.parse({**row, **inner}, resolve)

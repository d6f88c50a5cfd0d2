"""Refused rows as JSON Lines, in the form of quarantine.jsonl.

A line is ``{"source", "origin", "id", "code", "message"}``, with ``"partial": true`` where the record lives on without
a part.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from fastrm.data.sources import RefusedRow
from fastrm.json_files import to_json


def refusal_line(refusal: RefusedRow) -> bytes:
    """Return one line in ASCII, which can then name a record whose text UTF-8 cannot encode."""
    source, origin, record_id, code, message, partial = refusal
    row = {"source": source, "origin": origin, "id": record_id, "code": code, "message": message}
    return to_json(row | ({"partial": True} if partial else {})).encode("ascii") + b"\n"


def read_refusals(path: Path) -> Iterator[RefusedRow]:
    """Yield the refusals of a file, in order."""
    with open(path, "rb") as lines:
        yield from parse_refusals(lines)


def parse_refusals(lines: Iterable[bytes]) -> Iterator[RefusedRow]:
    """Yield the refusals of lines, in order."""
    for row in map(json.loads, lines):
        named = (row[key] for key in ("source", "origin", "id", "code", "message"))
        yield RefusedRow(*named, row.get("partial", False))

"""Records and refused rows as lines of JSON.

Of a record, media are written by reference, and the prompt that its responses share is written once.

    {"id", "source", "origin", "prompt": [message, ...], "responses": [[arguments, message, ...], ...],
     "preferences": [[winner, loser, margin, weight, tie], ...]}; with a sixth, true, for `Preference.again`

A message is ``[role, fields, part, ...]``; a part is a text or an object that says where a medium is. `prompt`
holds the messages that all responses begin with. Bytes that were embedded in a row are in a file of their
own, the media file of the unit, and are referred to by ``"embedded": [first byte, number of bytes]``, so that
a prepared set may be moved to another folder.

A refused row has the form of quarantine.jsonl: ``{"source", "origin", "id", "code", "message"}``, with
``"partial": true`` where the record lives on without a part.
"""

import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import takewhile
from pathlib import Path

from fastrm.data.record import ImageRef, MediaRef, Message, Preference, Record, Response, VideoRef
from fastrm.data.sources import RefusedRow
from fastrm.errors import StorageError
from fastrm.json_files import to_json

RECORDS, MEDIA_BYTES = "records.jsonl", "media.bin"  # files of a unit
_KINDS = {"image": ImageRef, "video": VideoRef}
_NAMES = {kind: name for name, kind in _KINDS.items()}

# A function from embedded bytes and their digest to (first byte, number of bytes) in the media file.
Embed = Callable[[bytes, str], tuple[int, int]]


def encode_record(record: Record, embed: Embed) -> bytes:
    """Encode a record as one line of JSON in UTF-8, without the newline; its media must have digests."""
    responses = [response.messages for response in record.responses]
    num_shared = min(_num_common(responses[0], messages) for messages in responses)
    row = {
        "id": record.id,
        "source": record.source,
        "origin": record.origin,
        "prompt": [_message(message, embed) for message in responses[0][:num_shared]],
        "responses": [
            [response.arguments, *(_message(message, embed) for message in response.messages[num_shared:])]
            for response in record.responses
        ],
        "preferences": [_edge(p) for p in record.preferences],
    }
    return to_json(row, ensure_ascii=False, separators=(",", ":")).encode()


def decode_record(line: bytes, media_file: str) -> Record:
    """Decode a line of `encode_record`; embedded media are now parts of `media_file`."""
    row = json.loads(line)
    prompt = tuple(_read_message(message, media_file) for message in row["prompt"])
    return Record(
        id=row["id"],
        responses=tuple(
            Response(prompt + tuple(_read_message(message, media_file) for message in messages), arguments)
            for arguments, *messages in row["responses"]
        ),
        preferences=tuple(Preference(*edge) for edge in row["preferences"]),
        source=row["source"],
        origin=row["origin"],
    )


def read_record(unit: Path, offset: int, length: int) -> Record:
    """Read a record of a unit's folder.

    Args:
        offset, length: place and size of its line, in bytes.

    Raises:
        StorageError: if it is not there.
    """
    path = os.fspath(unit / RECORDS)
    try:
        line = os.pread(_opened(path).fileno(), length, offset)
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}; delete the prepared set and prepare again") from error
    if len(line) != length:
        raise StorageError(f"{path}: is cut short; delete the prepared set and prepare again")
    return decode_record(line, os.fspath(unit / MEDIA_BYTES))


@functools.lru_cache(maxsize=128)
def _opened(path: str):
    """Open a file for positioned reads, which share no file offset: forked workers may use it too."""
    return open(path, "rb")


def _num_common(first: tuple[Message, ...], second: tuple[Message, ...]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def _edge(preference: Preference) -> list:
    edge = [preference.winner, preference.loser, preference.margin, preference.weight, preference.tie]
    return [*edge, True] if preference.again else edge


def _message(message: Message, embed: Embed) -> list:
    parts = (part if isinstance(part, str) else _medium(part, embed) for part in message.parts)
    return [message.role, message.fields, *parts]


def _medium(ref: MediaRef, embed: Embed) -> dict:
    row = {"kind": _NAMES[type(ref)], "digest": ref.digest}
    if ref.data is not None:
        return row | {"embedded": embed(ref.data, ref.digest)}
    places = {"path": ref.path, "member": ref.member, "span": ref.span}
    return row | {name: value for name, value in places.items() if value is not None}


def _read_message(row: list, media_file: str) -> Message:
    role, fields, *parts = row
    read = tuple(part if isinstance(part, str) else _read_medium(part, media_file) for part in parts)
    return Message(role, read, fields)


def _read_medium(row: dict, media_file: str) -> MediaRef:
    kind, digest = _KINDS[row["kind"]], row["digest"]
    if "embedded" in row:
        return kind(path=media_file, span=tuple(row["embedded"]), digest=digest)
    span = row.get("span")
    return kind(path=row["path"], member=row.get("member"), span=span and tuple(span), digest=digest)


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

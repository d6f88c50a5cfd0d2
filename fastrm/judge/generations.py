"""Texts of judges: JSON Lines of {"id", "order", "text"}, each for one question of one row."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fastrm.data.record import Record
from fastrm.errors import DataError, StorageError

WANTED = '{"id": row\'s id, "order": [numbers of the responses as they are shown], "text": "..."}'

_KEY = re.compile("[0-9a-f]{64}")  # as `JudgeQuestion.key`; another program's line may have any other


@dataclass(frozen=True)
class Generation:
    """A text of a judge.

    Attributes:
        id: of the row that was judged.
        order: the numbers of the responses in the order shown, from 0; one number for a pointwise judge or a critic.
        is_cut: the text ended at the longest length that was allowed; False where nobody says so.
        key: of the question that fastrm asked; empty where another program did.
        origin: `file:line` of a text that was read.
    """

    id: str
    order: tuple[int, ...]
    text: str
    is_cut: bool = False
    key: str = ""
    origin: str = ""


def read_generations(
    path: Path, records: Sequence[Record], shown: int, refused: list[str], *, by_key: bool = False
) -> Iterator[Generation]:
    """Yield the generations of a file that belong to `records`, in the order of the file.

    Lines that cannot be used (half a line, an id that no row has, numbers that no response has) are added to
    `refused`, each with its place and reason.

    Args:
        shown: responses that the judge sees at a time: 2, or 1.
        by_key: a line with a key is told by it, whatever its id and order: rows with an equal question share a text.

    Raises:
        DataError: for a file that is not there.
        StorageError: for one that cannot be read.
    """
    sizes = {record.id: len(record.responses) for record in records}
    try:
        with path.open(encoding="utf-8", errors="strict") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                found = _parse(line, sizes, shown, by_key)
                if isinstance(found, str):
                    refused.append(f"{path}:{number}: {found}")
                else:
                    yield replace(found, origin=f"{path}:{number}")
    except FileNotFoundError:
        raise DataError(f"--from {path}: there is no such file; wanted JSON Lines of {WANTED}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"--from {path}: not UTF-8 ({error.reason}); write it in UTF-8") from None
    except OSError as error:
        raise StorageError(f"--from {path}: {error.strerror}") from None


def given_critiques(records: Iterable[Record]) -> Iterator[Generation]:
    """Yield the critiques of responses that rows hold themselves."""
    for record in records:
        for number, response in enumerate(record.responses):
            if response.critique.strip():
                yield Generation(record.id, (number,), response.critique)


def _parse(line: str, sizes: dict[str, int], shown: int, by_key: bool) -> Generation | str:
    """Return the generation of a line, or why it is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return f"not JSON, or half a line; wanted {WANTED}"
    if not isinstance(row, dict) or not {"id", "order", "text"} <= row.keys():
        return f"wanted {WANTED}"
    name, order, text = row["id"], row["order"], row["text"]
    if not isinstance(text, str):
        return f'"text": got {type(text).__name__}, wanted a text'
    key = row.get("key")
    key = key if isinstance(key, str) and _KEY.fullmatch(key) else ""
    if key and by_key:
        return Generation(str(name), (), text, row.get("cut") is True, key)
    # Rows may have numbers as ids, which a record holds as text.
    name = str(name) if isinstance(name, int) and not isinstance(name, bool) else name
    if not isinstance(name, str) or name not in sizes:
        return f'"id": no row of the data has {name!r}'
    size = sizes[name]
    if not isinstance(order, list) or len(order) != shown or len(set(map(str, order))) != shown:
        return f'"order": got {order!r}, wanted {shown} different numbers, of the responses that were shown'
    if not all(isinstance(one, int) and not isinstance(one, bool) and 0 <= one < size for one in order):
        return f'"order": got {order!r}; row {name!r} has responses 0 to {size - 1}'
    return Generation(name, tuple(order), text, row.get("cut") is True, key)

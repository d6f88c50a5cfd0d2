"""The list of refused records and parts of records, with file, row and reason. Nothing is dropped in silence."""

import json
from collections import Counter
from pathlib import Path

from fastrm.errors import StorageError
from fastrm.json_files import to_json

# The most codes that are shown with an example; more would hide the end of a run.
MOST_REASONS = 6


class Quarantine:
    """A counter of refused records by code that, given a path, appends one JSON row for each.

    A row is ``{"source", "origin", "id", "code", "message"}`` and is in the file when `add` returns; with
    ``"partial": true`` it names a part of a record that lives on without it, and is no refused record.
    The same origin and code count once: a group that is refused again in a later epoch, or after a
    resume that opens the same file, adds nothing.

    Args:
        path: the JSON-lines file, created with its folder if missing; None only counts.

    Attributes:
        counts: refused records by code.
        partial_counts: records that lost a part, by code.
        examples: of each code the first record, with its file, row and reason.

    Raises:
        StorageError: the file cannot be opened, or (from `add`) written.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self.counts: Counter[str] = Counter()
        self.partial_counts: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self._known: set[tuple[str, str]] = set()
        self._file = None
        if path is not None:
            self._file = self._open(Path(path))

    @property
    def total(self) -> int:
        """The number of refused records."""
        return self.counts.total()

    def add(
        self, *, source: str, origin: str, record_id: str | None, code: str, message: str, partial: bool = False
    ) -> None:
        """Record one refusal, unless (origin, code) is known already."""
        if (origin, code) in self._known:
            return
        row = {"source": source, "origin": origin, "id": record_id, "code": code, "message": message}
        row |= {"partial": True} if partial else {}
        if self._file is not None:
            # ASCII escapes, so that a row can name a record whose text UTF-8 cannot encode.
            self._write(to_json(row).encode("ascii") + b"\n")
        self._count(row)

    def reasons(self) -> list[str]:
        """Return a line for each code, the most frequent first, with its number of records and the first of them."""
        counts = (self.counts + self.partial_counts).most_common(MOST_REASONS + 1)
        shown = counts[:MOST_REASONS]
        lines = [f"refused: {self.examples[code]} ({code}, {number:,} in all)" for code, number in shown]
        return [*lines, "refused for other reasons too"] if len(counts) > MOST_REASONS else lines

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> "Quarantine":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _open(self, path: Path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Append mode and no buffer: a row is one write, which rows of other processes cannot split.
            file = open(path, "a+b", buffering=0)  # noqa: SIM115  (see close)
            self._load(file)
        except OSError as error:
            raise StorageError(
                f'quarantine file "{path}" cannot be opened: {error.strerror}; choose a writable folder'
            ) from error
        return file

    def _load(self, file) -> None:
        """Count the rows of an earlier run; end a last line that a crash cut short."""
        file.seek(0)
        line = b"\n"
        for line in file:
            try:
                row = json.loads(line)
                self._count(row)
            except (ValueError, KeyError, TypeError):
                continue  # a torn row: its record is refused, and written, again
        if not line.endswith(b"\n"):
            file.write(b"\n")

    def _count(self, row: dict) -> None:
        origin, code = row["origin"], row["code"]
        if (origin, code) not in self._known:
            self._known.add((origin, code))
            (self.partial_counts if row.get("partial") else self.counts)[code] += 1
            message = str(row.get("message", ""))
            self.examples.setdefault(code, message if message.startswith(origin) else f"{origin}: {message}")

    def _write(self, line: bytes) -> None:
        try:
            num_bytes = self._file.write(line)
        except OSError as error:
            raise StorageError(f'quarantine file "{self.path}": {error.strerror}') from error
        if num_bytes != len(line):
            raise StorageError(f'quarantine file "{self.path}": the disk is full')

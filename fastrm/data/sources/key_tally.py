"""The counts of the keys of a file's rows, and the line that reports those which are not read."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from fastrm.data.sources.keys import PAIR_SCORES, brief, ignore_setting, nearest

EQUAL, REVERSED = "equal", "reversed"
_MAX_REPORTED = 12  # the most unread keys that a report describes


class KeyTally:
    """The counts of the keys of a file's rows: rows that each layout read, and keys that were not read.

    Attributes:
        layouts: number of rows by the name of their layout.
        read: keys that were read, by layout, in the order of the rows.
        unread: number of rows that have an unread key, by its name.
        examples: a shortened value of each of them.
        scores: number of pairs that scores beside them contradict, by how: `EQUAL` or `REVERSED`.
    """

    def __init__(self):
        self.layouts: Counter[str] = Counter()
        self.read: dict[str, list[str]] = {}
        self._known: set[tuple] = set()  # (layout, keys) of the rows seen so far
        self.unread: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self.scores: Counter[str] = Counter()

    def add(self, layout: str, read: tuple[str, ...], unread: dict[str, object]) -> None:
        """Count a row, with the keys of it that are read, and the others with their values."""
        self.layouts[layout] += 1
        if (layout, read) not in self._known:
            self._known.add((layout, read))
            self._add_read(layout, read)
        for name, value in unread.items():
            if name not in self.examples:
                self.examples[name] = brief.repr(value)
            self.unread[name] += 1

    def add_scores(self, row: Mapping) -> None:
        """Count a pair whose own scores, under one of `PAIR_SCORES`, do not put its chosen response first."""
        for names in PAIR_SCORES:
            chosen, rejected = (row.get(name) for name in names)
            if _is_number(chosen) and _is_number(rejected):
                if chosen <= rejected:
                    self.scores[EQUAL if chosen == rejected else REVERSED] += 1
                return

    def merge(self, other: "KeyTally") -> None:
        """Add the counts of other rows."""
        self.layouts += other.layouts
        self.unread += other.unread
        self.scores += other.scores
        self.examples = other.examples | self.examples
        for layout, read in other.read.items():
            self._add_read(layout, read)

    def _add_read(self, layout: str, read: Iterable[str]) -> None:
        self.read[layout] = list(dict.fromkeys([*self.read.get(layout, ()), *read]))

    def to_json(self) -> dict:
        """Return the tally as plain values, for `from_json`."""
        return {
            "layouts": self.layouts, "read": self.read, "unread": self.unread, "examples": self.examples,
            "scores": self.scores,
        }  # fmt: skip

    @classmethod
    def from_json(cls, value: dict) -> "KeyTally":
        tally = cls()
        tally.layouts, tally.unread = Counter(value["layouts"]), Counter(value["unread"])
        tally.read, tally.examples = dict(value["read"]), dict(value["examples"])
        tally.scores = Counter(value.get("scores", {}))  # sets of earlier versions have none
        return tally

    def report(self, path: str, known: Sequence[str]) -> str | None:
        """Return one line about a file's unread keys, with counts, an example and the nearest key; None without any.

        Args:
            known: keys that may be meant, for the nearest one.
        """
        if not self.unread:
            return None
        parts = []
        for name, number in self.unread.most_common(_MAX_REPORTED):
            near = nearest(name, known)
            hint = f"; nearest key: {near}" if near else ""
            parts.append(f"{name} ({number:,} row{'s' if number > 1 else ''}, such as {self.examples[name]}{hint})")
        more = f" and {len(self.unread) - len(parts):,} more" if len(self.unread) > len(parts) else ""
        metadata = self.likely_metadata(known)
        right = f"; where that is right: {ignore_setting(metadata)}" if metadata else ""
        return f"{path}: keys that are not read: {', '.join(parts)}{more}{right}"

    def likely_metadata(self, known: Sequence[str]) -> list[str]:
        """Return the unread keys to which no known key is near, so that a source may ignore them."""
        return [name for name in self.unread if nearest(name, known) is None]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

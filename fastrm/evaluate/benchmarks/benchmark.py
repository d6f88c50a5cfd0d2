"""A benchmark in memory: its rows, the records to score, and its figures from rewards, also those of a file."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType

from fastrm.data.record import Record
from fastrm.data.sources.values import decode_json, describe
from fastrm.errors import DataError, RecordError
from fastrm.evaluate.benchmarks import (
    mm_rlhf_rewardbench,
    multimodal_rewardbench,
    rewardbench,
    rewardbench2,
    rm_bench,
    vl_rewardbench,
)
from fastrm.evaluate.benchmarks.files import find_files, numbered_rows
from fastrm.evaluate.benchmarks.metrics import Metrics
from fastrm.evaluate.benchmarks.rows import Labels, Media, named

# A benchmark's module has TITLE, HUB_ID, NUM_ROWS, FILES, HEADLINES, and the functions labels(row), content(row, media)
# and metrics(rows, rewards).
BENCHMARKS: dict[str, ModuleType] = {
    "vl_rewardbench": vl_rewardbench,
    "mm_rlhf_rewardbench": mm_rlhf_rewardbench,
    "multimodal_rewardbench": multimodal_rewardbench,
    "rewardbench": rewardbench,
    "rewardbench2": rewardbench2,
    "rm_bench": rm_bench,
}
PREFIX = "bench:"


@dataclass(frozen=True)
class Benchmark:
    """One benchmark, row by row as in its file.

    Attributes:
        name: of BENCHMARKS.
        files: its data files.
        rows: what the metrics need to know of each row.
        images: folder or archive of its images; None: beside the data.
    """

    name: str
    files: tuple[str, ...]
    rows: tuple[Labels, ...]
    images: str | None = None

    @property
    def title(self) -> str:
        return self._module.TITLE

    @property
    def headlines(self) -> tuple[str, ...]:
        """The metrics that published tables show."""
        return self._module.HEADLINES

    @property
    def is_whole(self) -> bool:
        """True if there are as many rows as were published."""
        return len(self.rows) == self._module.NUM_ROWS

    @cached_property
    def records(self) -> list[Record]:
        """One record per row, in order, with all responses and the preferences between them.

        Raises:
            DataError: a row lacks what a model would read. Images are not opened.
        """
        return list(self._records())

    def metrics(self, rewards: Sequence[Sequence[float]], rows: Sequence[int] | None = None) -> Metrics:
        """Compute the metrics, by name.

        Args:
            rewards: of each row's responses, in the order of the file.
            rows: which rows these are, if not all.
        """
        labels = [self.rows[row] for row in (range(len(self.rows)) if rows is None else rows)]
        return self._module.metrics(labels, [list(scores) for scores in rewards])

    @property
    def _module(self) -> ModuleType:
        return BENCHMARKS[self.name]

    def _records(self) -> Iterator[Record]:
        media: dict[str, Media] = {}
        for (file, origin, row), labels in zip(numbered_rows(self.files), self.rows, strict=True):
            if file not in media:
                media[file] = Media(self.images, file)
            try:
                yield self._module.content(row, media[file]).record(labels, self.name, origin)
            except RecordError as error:
                raise named(origin, error) from None


def load_benchmark(name: str, data: str | None = None, images: str | None = None) -> Benchmark:
    """Read a benchmark.

    Args:
        name: one of BENCHMARKS, with or without ``bench:``.
        data: its file or folder in a published layout, or a hub id; None: where it is published on the hub.
        images: folder or .tar/.zip archive that image paths are relative to; None: the data file's folder
            and `images` in it.

    Raises:
        DataError: the benchmark is unknown, or cannot be found, or a row of it cannot be read.
    """
    name = name.removeprefix(PREFIX)
    if name not in BENCHMARKS:
        raise DataError(f"bench:{name}: there is no such benchmark; wanted one of {', '.join(BENCHMARKS)}")
    module = BENCHMARKS[name]
    files = find_files(name, data, module.HUB_ID, module.FILES)
    rows = []
    for _, origin, row in numbered_rows(files):
        try:
            rows.append(module.labels(row))
        except RecordError as error:
            raise named(origin, error) from None
    if not rows:
        raise DataError(f"bench:{name}: {files[0]} has no rows")
    benchmark = Benchmark(name, tuple(files), tuple(rows), images)
    # Rows from which no metric can be computed are refused here, not after hours of scoring.
    benchmark.metrics([[0.0] * row.num_rewards for row in rows])
    return benchmark


def read_scores(file: Path, benchmark: Benchmark) -> list[list[float]]:
    """Read rewards from elsewhere: one line {"rewards": [...]} for each row of the benchmark's file, in its order.

    Raises:
        DataError: naming the line, if it is not JSON, has no `rewards`, or they are not as many finite
            numbers as the row has responses; or if there are not as many lines as rows.
    """
    try:
        lines = file.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if len(numbered) != len(benchmark.rows):
        raise DataError(
            f"{file}: has {len(numbered):,} lines of rewards, wanted {len(benchmark.rows):,}: one for each row of "
            f"{', '.join(benchmark.files)}, in its order"
        )
    return [
        _rewards(f"{file}:{number}", line, row.num_rewards)
        for (number, line), row in zip(numbered, benchmark.rows, strict=True)
    ]


def _rewards(where: str, line: str, num_rewards: int) -> list[float]:
    try:
        row = decode_json(line)
    except RecordError as error:
        raise DataError(f"{where}: {error.message}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f'{where}: is not JSON: {error}; wanted {{"rewards": [...]}}') from None
    if not isinstance(row, dict) or not isinstance(row.get("rewards"), list):
        got = describe(row.get("rewards")) if isinstance(row, dict) else describe(row)
        raise DataError(f'{where}: "rewards" is {got}, wanted a list of {num_rewards} numbers')
    rewards = row["rewards"]
    if len(rewards) != num_rewards:
        raise DataError(f'{where}: "rewards" has {len(rewards)} numbers, wanted {num_rewards}: one for each response')
    for place, value in enumerate(rewards):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not _is_finite(value):
            raise DataError(f'{where}: "rewards[{place}]" is {describe(value)}, wanted a finite number')
    return [float(value) for value in rewards]


def _is_finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False

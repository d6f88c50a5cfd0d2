"""Rewards from elsewhere: one line {"rewards": [...]} for each row of a benchmark's file, in its order."""

import math
from pathlib import Path

from fastrm.data.sources.values import decode_json, describe
from fastrm.errors import DataError, RecordError
from fastrm.evaluate.benchmarks.benchmark import Benchmark


def read_scores(file: Path, benchmark: Benchmark) -> list[list[float]]:
    """Read the rewards of every row.

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

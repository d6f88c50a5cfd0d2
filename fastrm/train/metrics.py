"""The outputs for a run's numbers: metrics.jsonl, and trackers."""

import json
from collections.abc import Callable
from pathlib import Path

from fastrm.config import Config
from fastrm.json_files import to_json
from fastrm.storage import write_whole
from fastrm.train.trackers import Trackers


class MetricsLog:
    """The file metrics.jsonl, and the trackers of run.report_to; a context that closes them.

    Rows that the run is going to write again are removed first, so that a resumed run's file reads like that of an
    unbroken one.

    Args:
        progress: where the run continues from: its `step`, and its `last_eval`.
        say: takes a line of text about a tracker that fails.

    Raises:
        ConfigError: if a tracker cannot be opened.
    """

    def __init__(self, config: Config, progress, say: Callable[[str], None]):
        path = Path(config.run.dir) / "metrics.jsonl"
        evaluated = progress.last_eval.get("step", -1)
        keep_rows(path, lambda row: row["step"] <= (evaluated if "eval/loss" in row else progress.step))
        self._trackers = Trackers(config, progress.step, read_rows(path), say)
        self._file = path.open("a")

    def write(self, row: dict) -> None:
        """Append one row; `row["step"]` is the number of steps done."""
        self._file.write(to_json(row) + "\n")
        self._file.flush()
        self._trackers.write(row)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        self._file.close()
        self._trackers.close(failed=kind is not None)


def read_rows(path: Path) -> list[dict]:
    """Read the rows of a JSON Lines file, none if it is missing; a last line cut off by a kill is left out."""
    rows = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows


def statistics_of_step(run_dir: Path, step: int) -> dict | None:
    """Return the statistics of rewards that a run's evaluation of a step has written; None if there are none."""
    rows = read_rows(run_dir / "metrics.jsonl")
    return next((row.get("eval/rewards") for row in rows if row["step"] == step and "eval/loss" in row), None)


def keep_rows(path: Path, wanted: Callable[[dict], bool]) -> None:
    """Remove the other rows of a JSON Lines file, if it exists."""
    if path.exists():
        kept = "".join(to_json(row) + "\n" for row in read_rows(path) if wanted(row))
        write_whole(path, kept)

"""A measurement of preparing data with the recipe's mix of sets, and of planning training from it.

    python bench/data/prepared_scale.py --dir /scratch/scale                      the recipe's 2.85 million rows
    python bench/data/prepared_scale.py --dir /scratch/scale --rows 200000

Interrupted, it goes on where it stopped: rows that are written, and parts that are prepared, stay in --dir.
The seven sets have the paper's sizes [P]. Lengths of texts, sizes of images, and how often rows share a prompt
are ours: the sets are not here. Words are drawn from a vocabulary by Zipf's law, and the tokenizer is a
byte-level BPE of 32,000 entries trained on such text. Images are a pool of small files, by reference.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import psutil

from bench import ROOT
from bench.data.prepared_rows import ROWS, write_sets
from bench.harness.pages import table
from bench.harness.results import RESULTS, device_name, environment, file_of, write_json
from fastrm.json_files import to_json

NUM_RANKS = 64
MEMORY_LIMIT = 2 * 2**30
_PLAN = Path(__file__).with_name("prepared_start.py")


def main() -> None:
    """Write rows, prepare them, start from the set, and plan an epoch; results go to bench/results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, required=True, help="folder for rows and prepared set: 6 KB a row")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--workers", type=int, default=None, help="processes; default: all cores")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    options = parser.parse_args()
    folder = options.dir / f"rows-{options.rows}"
    config = write_sets(folder, options.rows)
    result = {
        "device": device_name(),
        **environment(),
        "rows": options.rows,
        "workers": options.workers or len(os.sched_getaffinity(0)),
        "prepare": _prepare(config, folder, options.workers),
    }
    planned = subprocess.run([sys.executable, _PLAN, config, str(NUM_RANKS)], check=True, stdout=subprocess.PIPE)
    result |= json.loads(planned.stdout)
    suffix = "" if options.rows == ROWS else f"-{options.rows}"
    path = file_of(result["device"], f"-prepared{suffix}.json", options.out)
    write_json(path, result)
    print(table_of(result))
    print(f"written to {path}")


def table_of(result: dict) -> str:
    """Return the figures as a table in Markdown."""
    prepare, start, plan = result["prepare"], result["start"], result["plan"]
    preparing = "what was left of preparing" if prepare["was_interrupted"] else "preparing, all together"
    rate, per_row = result["rows"] / prepare["wall_seconds"], prepare["index_bytes"] / result["rows"]
    rows = [
        ("rows", f"{result['rows']:,}"),
        (preparing, f"{prepare['wall_seconds']:,.0f} s, {rate:,.0f} rows/s"),
        *((f"- {name}", f"{value:,.1f} s") for name, value in prepare["seconds"].items()),
        ("peak memory of all processes together (PSS)", f"{prepare['peak_pss_bytes'] / 2**20:,.0f} MiB"),
        ("index on disk", f"{prepare['index_bytes'] / 2**20:,.1f} MiB, {per_row:,.0f} bytes a row"),
        ("records on disk", f"{prepare['unit_bytes'] / 2**30:,.2f} GiB"),
        ("groups, preferences", f"{start['groups']:,}, {start['preferences']:,}"),
        ("opening the set, to the first planned step", f"{start['seconds']:.2f} s"),
        (f"steps planned a second, for {NUM_RANKS} ranks", f"{plan['steps_per_second']:,.1f}"),
        (f"groups planned a second, for {NUM_RANKS} ranks", f"{plan['groups_per_second']:,.0f}"),
        ("steps of an epoch", f"{plan['steps']:,}"),
        ("preferences in an epoch's packs", f"{plan['preferences_planned']:,}"),
        ("groups that an epoch's packs hold other than once", f"{plan['groups_not_once']:,}"),
        ("packs over the token budget", f"{plan['packs_over_budget']:,}"),
    ]
    return "\n".join(table(("measure", "value"), rows))


def _prepare(config: Path, folder: Path, workers: int | None) -> dict:
    """Run `fastrm data prepare` in a process of its own, and watch it."""
    kept, prepared = folder / "prepare.json", folder / "prepared"
    was_there, was_begun = (prepared / "manifest.json").exists(), (prepared / "units").exists()
    command = [sys.executable, "-m", "fastrm.cli", "data", "prepare", str(config)]
    command += ["--workers", str(workers)] if workers else []
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT)
    watch = _MemoryWatch(process.pid)
    try:
        process.wait()
    except KeyboardInterrupt:
        process.wait()  # it was signalled too, and ends after the parts under way
        raise SystemExit("interrupted; the same command goes on from here") from None
    if process.returncode:
        raise SystemExit(f"preparing failed with exit code {process.returncode}; the lines above say why")
    wall = time.perf_counter() - started
    seconds = json.loads((prepared / "report.json").read_text())["seconds"]
    if was_there and kept.exists():  # keep the figures of the run that made it
        return json.loads(kept.read_text())
    figures = {
        "wall_seconds": wall,
        "seconds": seconds,
        "was_interrupted": was_begun,  # the figures are then only of what was left
        "peak_pss_bytes": watch.stop(),
        "memory_is_bounded": watch.peak < MEMORY_LIMIT,
        "index_bytes": _size(prepared / "index"),
        "unit_bytes": _size(prepared / "units"),
    }
    kept.write_text(to_json(figures))
    return figures


class _MemoryWatch(threading.Thread):
    """A thread that samples the memory of a process and its children; shared pages count once (PSS)."""

    def __init__(self, pid: int, every: float = 0.5):
        super().__init__(daemon=True)
        self.process, self.every, self.peak = psutil.Process(pid), every, 0
        self._stopped = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._stopped.wait(self.every):
            try:
                members = [self.process, *self.process.children(recursive=True)]
            except psutil.Error:
                return
            self.peak = max(self.peak, sum(map(_pss, members)))

    def stop(self) -> int:
        """Stop sampling and return the peak in bytes."""
        self._stopped.set()
        self.join()
        return self.peak


def _pss(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().pss
    except psutil.Error:
        return 0


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


if __name__ == "__main__":
    main()

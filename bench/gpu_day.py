"""The program of a day on a GPU, in one command that ends in time: correctness first, then speed.

    python bench/gpu_day.py --out FOLDER                     540 seconds; correctness first, then speed
    python bench/gpu_day.py --out FOLDER --wheels .gpu-day   with packages that were carried along
    python bench/gpu_day.py --out FOLDER --only update,memory --seconds 120
    python bench/gpu_day.py --out FOLDER --rehearse          on a CPU: tiny models, emulated operators, and faults

FOLDER gets gpu_day.json (all figures, at any moment up to the last second), gpu_day.md (tables) and gpu_day.log.
bench/README.md says what each stage answers; `make gpu-day` prepares what a machine without a network needs;
bench/gpu/adopt.py takes the figures into the project. Exit status 1 if a stage failed, 128 and the signal if stopped.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import ROOT
from bench.gpu.runner import DONE, LEFT_OUT, Day, Stage, say
from bench.gpu.stages import rehearsal, stages
from bench.gpu.tables import day_lines

SECONDS = 540
SHOWN_CHARACTERS = 9_000  # of the tables on the terminal: some callers keep only the end of the output


def chosen(groups: list[list[Stage]], only: str | None) -> list[list[Stage]]:
    """Return the stages that --only names, with those that all others need.

    Raises:
        SystemExit: if it names none.
    """
    if only is None:
        return groups
    wanted = only.split(",")
    names = [stage.name for group in groups for stage in group]
    if unknown := [name for name in wanted if name not in names]:
        raise SystemExit(f"--only {unknown[0]}: no such stage; there are {', '.join(names)}")
    kept = [[s for s in group if s.name in wanted or s.required or s.name == "unpack"] for group in groups]
    return [group for group in kept if group]


def environment_of(work: Path) -> dict[str, str]:
    """Return the environment of all stages: the project's code first, caches in one place, no network."""
    site = work / "site"
    paths = [str(ROOT), str(ROOT / "kernels"), str(site), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "TRITON_CACHE_DIR": str(work / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "FASTRM_GPU_DAY_SITE": str(site),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of gpu_day.json, gpu_day.md and gpu_day.log")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="that all takes; default: %(default)s")
    parser.add_argument("--only", metavar="NAME,NAME", help="stages to run; facts runs in any case")
    parser.add_argument("--wheels", type=Path, help="folder that make gpu-day has filled")
    parser.add_argument("--rehearse", action="store_true", help="every stage in small on a CPU, and stages that fail")
    parser.add_argument("--list", action="store_true", help="show the stages and run nothing")
    arguments = parser.parse_args()
    wheels = arguments.wheels.resolve() if arguments.wheels else None
    groups = chosen((rehearsal if arguments.rehearse else stages)(wheels), arguments.only)
    if arguments.list:
        for stage in (stage for group in groups for stage in group):
            print(f"{stage.name:<18} {stage.limit:>4.0f} s  {stage.question}")
        return 0
    return run(groups, arguments.out.resolve(), arguments.seconds, arguments.rehearse)


def run(groups: list[list[Stage]], out: Path, seconds: float, rehearsed: bool) -> int:
    """Run the groups of stages, draw the tables, and return the exit status."""
    work = Path(tempfile.mkdtemp(prefix="fastrm-gpu-day-"))
    facts = {"date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), "rehearsal": rehearsed}
    day = Day(out, work, seconds, facts, ROOT, environment_of(work))
    day.stop_on_signals()
    try:
        day.run(groups)
    finally:
        draw(day.record, out)
        shutil.rmtree(work, ignore_errors=True)
    if day.stopped:
        return 128 + signal.Signals[day.stopped]
    return 0 if all(stage["status"].startswith((DONE, LEFT_OUT)) for stage in day.record["stages"]) else 1


def draw(record: dict, out: Path) -> None:
    """Write gpu_day.md and print it. Errors here are caught: the figures are already saved."""
    try:
        text = "\n".join(day_lines(record)) + "\n"
        (out / "gpu_day.md").write_text(text)
    except Exception as error:
        text = f"no tables: {type(error).__name__}: {error}"
    say(text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "\n... the rest is in gpu_day.md")
    left = [stage["name"] for stage in record["stages"] if stage["status"].startswith(LEFT_OUT)]
    if left:
        say(f"not run: --only {','.join(left)}")


if __name__ == "__main__":
    sys.exit(main())

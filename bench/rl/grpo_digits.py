"""The comparison of reward schemes on scanned digits: `fastrm grpo configs/grpo/digits.yaml` for each scheme and seed.

    fastrm train configs/quickstart.yaml      the reward model, first
    python bench/rl/grpo_digits.py --run      train what is not there yet, in runs/grpo-digits; --seed N: of one seed
    python bench/rl/grpo_digits.py --save     write bench/results/DEVICE-grpo-digits.json, of this machine
    python bench/rl/grpo_digits.py --table    print the table of docs/grpo.md from that file

The policy without GRPO, `none`, is that of the evaluation before: the same for all schemes of a seed.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import ROOT
from bench.harness.pages import table
from bench.harness.results import RESULTS, device_name, environment, file_of, write_json
from fastrm.ablate.statistics import Estimate, estimate

SCHEMES, SEEDS = ("rule", "model", "hybrid"), (0, 1, 2)
CONFIG = ROOT / "configs/grpo/digits.yaml"
SUFFIX = "-grpo-digits.json"
PAGE_FILE = RESULTS / f"amd-epyc-2-cores{SUFFIX}"  # what docs/grpo.md shows
FOLDER = Path("runs/grpo-digits")
COLUMNS = ("reward", "held-out accuracy", "change", "reward model's mean reward", "change", "answer's length")
KEYS = ("accuracy", "judge_reward", "mean_characters")


def run_all(seeds: tuple[int, ...]) -> None:
    """Run every scheme and seed whose report is not there yet, seed by seed."""
    from fastrm.config import load_run
    from fastrm.grpo.config import GrpoConfig
    from fastrm.grpo.run import run_grpo

    for seed in seeds:
        for scheme in SCHEMES:
            folder = FOLDER / f"{scheme}-{seed}"
            if not (folder / "report.json").exists():
                reward = {"scheme": scheme, "answers": "text"}
                reward |= {"model": "runs/quickstart/model"} if scheme != "rule" else {}
                changed = [f"run.dir={folder}", f"run.seed={seed}", f"rewards={json.dumps([reward])}"]
                run_grpo(load_run(GrpoConfig, CONFIG, changed))


def collect() -> dict:
    """Return the figures of all reports that are there, by scheme and seed, and name those that are not."""
    files = {(scheme, seed): FOLDER / f"{scheme}-{seed}" / "report.json" for scheme in SCHEMES for seed in SEEDS}
    missing = [str(file) for file in files.values() if not file.exists()]
    if missing:
        print(f"saved without {', '.join(missing)}, which --run would make")
    found = {}
    for (scheme, seed), file in files.items():
        if str(file) in missing:
            continue
        report = json.loads(file.read_text())
        parts = {part: {key: report[part][key] for key in KEYS} for part in ("before", "after")}
        training = {key: report["training"][key] for key in ("steps", "reward_share", "first", "last")}
        found.setdefault(scheme, {})[str(seed)] = {**parts, "training": training}
    return found


def save() -> Path:
    """Write what the runs left, with the device and the versions, and return the file: of this device."""
    device = device_name()
    file = file_of(device, SUFFIX, RESULTS)
    write_json(file, {"device": device, **environment("transformers", "trl"), "schemes": collect()})
    return file


def table_of(results: dict) -> list[str]:
    """Return the lines of the table: means over seeds with 95 % t-intervals."""
    first = {seed: entry["before"] for scheme in results.values() for seed, entry in scheme.items()}
    rows = [_row("none", list(first.values()), None)]
    for scheme, entries in results.items():
        rows.append(_row(scheme, [e["after"] for e in entries.values()], [e["before"] for e in entries.values()]))
    return table(COLUMNS, rows)


def _row(name: str, after: list[dict], before: list[dict] | None) -> list[str]:
    cells = [name]
    for key in ("accuracy", "judge_reward"):
        cells.append(_cell(estimate([entry[key] for entry in after])))
        change = [a[key] - b[key] for a, b in zip(after, before, strict=True)] if before else None
        cells.append("" if change is None else _cell(estimate(change), sign="+"))
    return [*cells, f"{estimate([entry['mean_characters'] for entry in after]).mean:.1f}"]


def _cell(value: Estimate, sign: str = "") -> str:
    return f"{value.mean:{sign}.3f}" + ("" if value.half is None else f" ± {value.half:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, text in (("--run", "train"), ("--save", "write the results"), ("--table", "print the table")):
        parser.add_argument(name, action="store_true", help=text)
    parser.add_argument("--seed", type=int, choices=SEEDS, help="run this one only")
    chosen = parser.parse_args()
    if chosen.run:
        run_all(SEEDS if chosen.seed is None else (chosen.seed,))
    if chosen.save:
        print(f"wrote {save()}")
    if chosen.table:
        print("\n".join(table_of(json.loads(PAGE_FILE.read_text())["schemes"])))


if __name__ == "__main__":
    main()

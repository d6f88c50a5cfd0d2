"""Results of the kernel benchmarks: the file of each device, its figures, and the goals.

A file is <device>-kernels.json, beside the training-step results of the same device. Each operation in it
has its own date and versions, so that measuring one again leaves the other as it was.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.harness import results as device_results
from bench.harness.results import RESULTS, file_of, write_json
from bench.kernels.shapes import STEP

SUFFIX = "-kernels.json"
HEAD, ATTENTION = "preference_head", "tree_attention"
NOT_MEASURED = "not measured"
TORCH_DTYPES = {"bf16": "torch.bfloat16", "fp16": "torch.float16", "fp32": "torch.float32"}


def save(entries: Sequence[dict], facts: dict, folder: Path, *, quick: bool = False) -> Path:
    """Write the entries of this run; operations that it did not measure keep their entries in the file.

    Args:
        facts: of the run: device, copy_bytes_per_second, left_out, and those of `environment`.
        quick: a run of few shapes, which goes to a file of its own that no table is made from.
    """
    device = facts["device"]
    file = file_of(device, SUFFIX, folder, quick=quick)
    report = json.loads(file.read_text()) if file.exists() else {"device": device, "operations": {}}
    for op in (HEAD, ATTENTION):
        mine = [entry for entry in entries if entry["op"] == op]
        left_out = [text for where, text in facts["left_out"] if where == op]
        if mine or left_out:
            kept = {key: value for key, value in facts.items() if key not in ("device", "left_out")}
            report["operations"][op] = {**kept, "left_out": left_out, "entries": mine}
    write_json(file, report)
    return file


def load_all(folder: Path = RESULTS) -> list[dict]:
    """Return the reports of all devices."""
    return device_results.load_all(SUFFIX, folder)


# Figures of one entry


def median(entry: dict, variant: str, direction: str = STEP) -> float | None:
    """Return the median seconds, or None where there is no figure."""
    found = entry["variants"].get(variant)
    return found["seconds"].get(direction, {}).get("median") if found and not found["failed"] else None


def ratio(entry: dict, ours: str, theirs: str, direction: str = STEP) -> float | None:
    """Return how many times as fast as `theirs` `ours` is."""
    a, b = median(entry, ours, direction), median(entry, theirs, direction)
    return b / a if a and b else None


def pair_ratio(entry: dict, ours: str, direction: str = STEP) -> float | None:
    """Return our time for one visible pair of a query and a key, over that of duplicated sequences."""
    faster = ratio(entry, ours, "duplicated", direction)
    return entry["shape"]["work_ratio"] / faster if faster else None


def floor_ratio(entry: dict, variant: str, copy_bytes_per_second: float | None) -> float | None:
    """Return the time of a head over the time in which its bytes could be copied."""
    seconds = median(entry, variant)
    return seconds * copy_bytes_per_second / entry["floor_bytes"] if seconds and copy_bytes_per_second else None


# Goals


@dataclass(frozen=True)
class Goal:
    """A target of the kernels' issue (number 3, section 4), for an H100 or H200.

    Attributes:
        text: what is compared, and where.
        at_least: wanted ratio; None for a goal of at most.
        measure: (entry, copy bandwidth) -> the ratio.
        applies: does the goal speak of this shape? Given the entry's "shape".
    """

    op: str
    text: str
    measure: Callable[[dict, float | None], float | None]
    applies: Callable[[dict], bool]
    at_least: float | None = None
    at_most: float | None = None

    @property
    def wanted(self) -> str:
        return f"at least {self.at_least:g}x" if self.at_least is not None else f"at most {self.at_most:g}x"

    def met(self, value: float) -> bool:
        return value >= self.at_least if self.at_least is not None else value <= self.at_most


def _of_floor(entry, copy):
    return floor_ratio(entry, "triton+graph", copy)


def _of_eager(entry, _):
    return ratio(entry, "triton+graph", "eager")


def _over(rival: str):
    return lambda entry, _: ratio(entry, "triton", rival)


def _is_issue_head(shape: dict) -> bool:
    # The shape for which section 1 of the issue derives the floor.
    return (shape["width"], shape["rows"], shape["dtype"]) == (3584, 8, "bf16")


def _trees(num_responses: int, prefix: int | None = None, response: int | None = None, up_to: int | None = None):
    def applies(shape):
        return (
            shape["num_responses"] == num_responses
            and prefix in (None, shape["prefix"])
            and response in (None, shape["response"])
            and (up_to is None or shape["response"] <= up_to)
        )

    return applies


GOALS = [
    Goal(HEAD, "head in a graph, of the bandwidth floor: D=F=3584, R=8, bf16", _of_floor, _is_issue_head, at_most=1.5),
    Goal(HEAD, "head in a graph, of the bandwidth floor: the other shapes", _of_floor,
         lambda shape: not _is_issue_head(shape), at_most=1.5),
    Goal(HEAD, "head in a graph against eager: D=F=3584, R=8, bf16", _of_eager, _is_issue_head, at_least=3),
    Goal(HEAD, "head in a graph against eager: the other shapes", _of_eager,
         lambda shape: not _is_issue_head(shape), at_least=3),
    Goal(ATTENTION, "attention against FlashAttention-2 with copied K/V: N=2", _over("varlen"), _trees(2), at_least=1),
    Goal(ATTENTION, "attention against FlashAttention-2 with copied K/V: N=8, responses of 150 tokens or fewer",
         _over("varlen"), _trees(8, up_to=150), at_least=1.5),
    Goal(ATTENTION, "attention against duplicated sequences: 1300/300, N=2 (work 1.49x)", _over("duplicated"),
         _trees(2, 1300, 300), at_least=1.4),
    Goal(ATTENTION, "attention against duplicated sequences: 1300/300, N=8 (work 2.37x)", _over("duplicated"),
         _trees(8, 1300, 300), at_least=2.1),
]  # fmt: skip


def is_goal_device(device: str) -> bool:
    return "H100" in device or "H200" in device


def verdict(goal: Goal, report: dict | None) -> tuple[str, str]:
    """Return (the measured value, met or not) for a report of one device; each shape has to meet the goal."""
    part = report["operations"].get(goal.op) if report else None
    if part is None:
        return NOT_MEASURED, NOT_MEASURED
    values = {}
    num_shapes = 0
    for entry in part["entries"]:
        if goal.applies(entry["shape"]):
            num_shapes += 1
            value = goal.measure(entry, part["copy_bytes_per_second"])
            if value is not None:
                values[entry["name"]] = value
    if not values:
        return NOT_MEASURED, NOT_MEASURED
    low, high = min(values.values()), max(values.values())
    shown = f"{low:.2f}x" if len(values) == 1 else f"{low:.2f}x to {high:.2f}x"
    missed = [name for name, value in values.items() if not goal.met(value)]
    if missed:
        worst = (min if goal.at_least is not None else max)(missed, key=values.get)
        return shown, f"not met on {len(missed)} of {len(values)} shapes, worst {worst}"
    if len(values) < num_shapes:
        return shown, f"met on the {len(values)} of {num_shapes} shapes that have figures"
    return shown, "met" if len(values) == 1 else f"met on all {len(values)} shapes"


# The choice for `auto`


# The rivals of an implementation; the first is what runs where it is not chosen.
RIVALS = {HEAD: ("eager",), ATTENTION: ("varlen", "flash_attn")}


def winners(op: str, entries: Sequence[dict]) -> list[tuple[str, str, str]]:
    """Return (dtype, implementation, why) of an operation: the fastest by geometric mean over a dtype's shapes.

    Counted are forward and backward without CUDA graphs: the trainer launches without them, so that this is what `auto`
    has to be right about.
    """
    found = []
    for dtype in dict.fromkeys(entry["shape"]["dtype"] for entry in entries if entry["op"] == op):
        mine = [entry for entry in entries if entry["op"] == op and entry["shape"]["dtype"] == dtype]
        best, means, texts = "triton", {"triton": 1.0}, []
        for rival in RIVALS[op]:
            values = [value for entry in mine if (value := ratio(entry, "triton", rival))]
            if values:
                means[rival] = 1 / _geometric_mean(values)
                texts.append(
                    f"triton is {1 / means[rival]:.2f}x as fast as {rival} over {len(values)} shapes "
                    f"({min(values):.2f}x to {max(values):.2f}x)"
                )
        if texts:
            best = max(means, key=means.get)
            found.append((dtype, best, "; ".join(texts)))
    return found


def proposals(entries: Sequence[dict], device: str) -> list[str]:
    """Return the lines for dispatch.MEASURED; bench/gpu/adopt.py writes them there."""
    return [
        f'    ("{op}", "{device}", {TORCH_DTYPES[dtype]}): "{winner}",  # {why}'
        for op in (HEAD, ATTENTION)
        for dtype, winner, why in winners(op, entries)
    ]


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))

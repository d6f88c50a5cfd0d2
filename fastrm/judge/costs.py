"""The command `fastrm eval --costs`: what it costs to judge a pair of responses, and a group of eight."""

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from statistics import mean, median

import torch

from fastrm.data.record import Message, Preference, Record, Response
from fastrm.errors import ConfigError, DataError
from fastrm.evaluate.benchmarks.benchmark import PREFIX as BENCHMARK
from fastrm.evaluate.benchmarks.benchmark import load_benchmark
from fastrm.evaluate.options import JudgeTexts
from fastrm.evaluate.reading import read_in_order
from fastrm.json_files import to_json
from fastrm.judge.command import JudgeOptions, choose, refuse_unused
from fastrm.judge.judging import BRACKET, OF_GROUP, PAIR, CriticJudging, JudgeJudging, Judging, RewardModelJudging
from fastrm.model.network import pick_device
from fastrm.model.paradigms import is_writer
from fastrm.prompts.spec import PREFIX
from fastrm.resident import release_freed, reset_peak, status_bytes
from fastrm.storage import check_output, write_whole
from fastrm.tables import Table
from fastrm.ui import Display, make_console, print_table

ROUNDS = 3
GROUP = 8
# Rows of a file that are looked at for groups of eight.
_LOOKED_AT = 1000


@dataclass(frozen=True)
class CostRows:
    """The records whose judging is measured, up to ROUNDS of each kind.

    Attributes:
        pairs, groups: of two responses, and of eight.
        repeated: no row had eight responses, so that those of a row were repeated, each with a number in front.
    """

    pairs: list[Record]
    groups: list[Record]
    repeated: bool

    @classmethod
    def read(cls, data: str, options: JudgeOptions) -> "CostRows":
        """Find the first rows of a file or benchmark that have what is needed.

        Raises:
            DataError: if no row has two responses.
        """
        pairs, groups, refused, seen = [], [], [], 0
        for seen, row in enumerate(islice(_rows(data, options), _LOOKED_AT), 1):  # noqa: B007
            if not isinstance(row, Record):
                refused.append(f"; {row[1].message} ({row[1].code})")
                continue
            if len(row.responses) >= 2 and len(pairs) < ROUNDS:
                pairs.append(_of(row, row.responses[:2]))
            if len(row.responses) >= GROUP:
                groups.append(_of(row, row.responses[:GROUP]))
            if len(groups) == ROUNDS == len(pairs):
                break
        if not pairs:
            raise DataError(
                f"{data}: none of its first {seen:,} rows has two responses, which are wanted for --costs"
                f"{refused[0] if refused else ''}"
            )
        repeated = not groups
        return cls(pairs, groups or [_repeat(record) for record in pairs], repeated)

    def of(self, way: str) -> list[Record]:
        """Return the records that are judged that way."""
        return self.pairs if way == PAIR else self.groups


def measure_costs(models: Sequence[str], data: str, options: JudgeOptions) -> None:
    """Print what it costs a model to judge a pair and a group of eight; optionally write it as JSON.

    Args:
        models: one reward model, critic or judge, as for `fastrm eval`.
        options: as of a judge; texts that are there already cost nothing, and are refused.

    Raises:
        ConfigError: for several models, texts that are there, a judge without a generator, or models that cannot be
            used.
        DataError: for data without two responses in a row, or rows that cannot be judged.
        ServerError: for a judge's server that gives no answer.
    """
    if len(models) != 1:
        raise ConfigError(f"--costs is for one model; got {len(models)}, wanted fastrm eval MODEL DATA --costs")
    texts = options.texts
    if texts.given or texts.written is not None or texts.generations is not None:
        raise ConfigError("--costs measures how texts are written, and keeps none: leave out what names texts")
    if options.json_out is not None:
        check_output(options.json_out)
    (name,) = models
    with Display() as display:
        rows = CostRows.read(data, options)
        memory = _Memory(pick_device(options.scoring.device))
        judging = _open(name, options, display)
        costs = measure(judging, rows, memory, display)
    here = {"device": "by URL" if judging.device is None else str(judging.device), "threads": torch.get_num_threads()}
    report = {"model": name, "data": data, "costs": costs, "rounds": ROUNDS, "responses_repeated": rows.repeated} | here
    print_table(make_console(), _table(report))
    if options.json_out is not None:
        write_whole(options.json_out, to_json(report, indent=2) + "\n")


def measure(judging: Judging, rows: CostRows, memory: "_Memory", display: Display) -> dict[str, dict]:
    """Return the costs of each way to judge: the median time, the largest peak, and the mean work of the rounds.

    Each round judges another row in every way, so that what slows the machine down for a while hits all ways. The mean
    over the rows does not depend on which of them was the fastest.
    """
    for way in judging.warm_up:
        judging.judge(way, rows.of(way)[0])
    update, found = display.task("measuring"), {way: [] for way in judging.ways}
    for number in range(ROUNDS):
        for way in judging.ways:
            records = rows.of(way)
            record = records[number % len(records)]
            memory.reset()
            started = time.perf_counter()
            judged = judging.judge(way, record)
            seconds = time.perf_counter() - started
            peak = None if judging.device is None else memory.peak()
            work = judging.work_of(record, judged)._asdict()
            found[way].append({**work, "seconds": seconds, "memory_bytes": peak})
            update(sum(map(len, found.values())), ROUNDS * len(judging.ways))
    return {way: _summary(costs) for way, costs in found.items()}


def _summary(rounds: Sequence[dict]) -> dict:
    together = {"tokens_generated": mean, "tokens_read": mean, "flops": mean, "seconds": median, "memory_bytes": max}
    columns = {name: [cost[name] for cost in rounds] for name in together}
    return {name: None if None in found else together[name](found) for name, found in columns.items()}


class _Memory:
    """The peak of memory above what was in use when this object was made: of a GPU's allocator, or of the process."""

    def __init__(self, device: torch.device):
        self._device, self._on_gpu = device, device.type == "cuda"
        self._known = self._on_gpu or sys.platform == "linux"
        self.reset()
        self._before = self._now() if self._known else 0

    def _now(self) -> int:
        return torch.cuda.memory_allocated(self._device) if self._on_gpu else status_bytes("VmRSS")

    def reset(self) -> None:
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats(self._device)
        elif self._known:
            release_freed()
            reset_peak()

    def peak(self) -> int | None:
        if not self._known:
            return None
        peak = torch.cuda.max_memory_allocated(self._device) if self._on_gpu else status_bytes("VmHWM")
        return peak - self._before


def _open(name: str, options: JudgeOptions, display: Display) -> Judging:
    if not name.startswith(PREFIX) and not is_writer(name):
        if options.texts != JudgeTexts():
            raise ConfigError(f"{name}: a reward model writes no texts; leave the options of texts out")
        return RewardModelJudging(name, options.scoring, display)
    _, spec = choose([name], options.texts)
    refuse_unused(name, spec, options)
    if spec.kind == "critic":
        return CriticJudging(spec, options.scoring, display)
    return JudgeJudging(spec, options.scoring)


def _rows(data: str, options: JudgeOptions) -> Iterator:
    rows = options.rows
    if data.startswith(BENCHMARK):
        return iter(load_benchmark(data, options.bench_data, rows.images).records)
    reading = {"columns": rows.columns, "ignore": rows.ignore, "require_preferences": False}
    return read_in_order(data, rows.images, rows.data_format, **reading)


def _of(record: Record, responses: Sequence[Response]) -> Record:
    """Return the record with these responses, each in one preference: what a judge is asked about."""
    asked = tuple(Preference(number, number + 1) for number in range(0, len(responses), 2))
    return replace(record, responses=tuple(responses), preferences=asked)


def _repeat(record: Record) -> Record:
    given = record.responses
    return _of(record, [_numbered(given[number % len(given)], number + 1) for number in range(GROUP)])


def _numbered(response: Response, number: int) -> Response:
    *prompt, last = response.messages
    first, *others = last.parts if last.parts and isinstance(last.parts[0], str) else ("", *last.parts)
    return replace(response, messages=(*prompt, Message(last.role, (f"{number}. {first}", *others), last.fields)))


def _table(report: dict) -> Table:
    names = {PAIR: "a pair", OF_GROUP: "a group of 8", BRACKET: "a group of 8, bracket"}
    costs = report["costs"]
    where = f"Seconds: median of {report['rounds']} rounds, tokens and operations: means, on {report['device']}"
    where += f", {report['threads']} threads." if report["device"] == "cpu" else "."
    memory = "Memory: growth of the process since before the model was loaded." if report["device"] == "cpu" else ""
    repeated = "No row has 8 responses: those of a row were repeated, numbered." if report["responses_repeated"] else ""
    table = Table(
        "figure", *(names[way] for way in costs), title=f"Costs of judging by {report['model']}",
        caption="\n".join(filter(None, (where, memory, repeated))),
    )  # fmt: skip

    def row(title: str, key: str, scale: float, digits: int) -> None:
        values = [cost[key] for cost in costs.values()]
        table.add_row(title, *("unknown" if value is None else f"{value / scale:,.{digits}f}" for value in values))

    row("tokens read", "tokens_read", 1, 0)
    row("tokens generated", "tokens_generated", 1, 0)
    row("operations, 10^9", "flops", 1e9, 3)
    row("seconds", "seconds", 1, 3)
    row("memory, MiB", "memory_bytes", 2**20, 0)
    return table

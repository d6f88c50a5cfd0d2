"""A benchmark's own figures from what a judge or a critic says, by the code that measures reward models."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from fastrm.data.record import Record
from fastrm.evaluate.benchmarks.benchmark import Benchmark
from fastrm.evaluate.benchmarks.metrics import Metrics, mean_of
from fastrm.evaluate.benchmarks.report import Evaluation
from fastrm.evaluate.judge_figures import RIGHT
from fastrm.judge.metrics import Said, outcomes_of
from fastrm.prompts.spec import JudgeSpec

# What of a reward model's report stands in a judge's under the same names.
_NAMES = ("benchmark", "files", "rows", "scored", "partial", "metrics", "intervals", "bootstrap")
_UNDEFINED = (
    "each preference counts in accuracy; the benchmark's own figures are of a reward for each response, which a judge "
    "of pairs gives with order: round_robin or bracket alone"
)
_NOTHING = "the benchmark's own figures need a row of which all is judged, and there is none"


@dataclass(frozen=True)
class VerdictEvaluation(Evaluation):
    """Verdicts on the pairs of a benchmark as rewards: 1 for the winner where the verdict is right, else all 0.

    Attributes:
        rewards: of each row, by its number, where the winner is shown first.
        turned: the same where the loser is; of a row that was judged in one order only, the rewards of that order.
    """

    turned: dict[int, list[float]] = field(default_factory=dict)

    @cached_property
    def metrics(self) -> Metrics:
        """The means over the orders: of the share of right rows it is the share of right orders."""
        return mean_of(self._measure(self.rewards), self._measure(self.turned))


def measure_benchmark(
    spec: JudgeSpec, benchmark: Benchmark, records: Sequence[Record], texts: Said, rewards: Sequence[dict]
) -> tuple[dict, Evaluation | None]:
    """Return a benchmark's figures under the names that `--json` has, null with a note where they are not defined.

    Args:
        records: of its rows, in order.
        texts: what was said about them, as `measure` takes it.
        rewards: those that `measure` returned.

    Returns:
        The figures, and the evaluation that they are of; None where they are not defined.
    """
    is_of_pairs = all(len(record.responses) == 2 for record in records)
    if is_of_pairs and spec.kind != "critic":
        evaluation = _of_verdicts(spec, benchmark, records, texts)
    else:
        known = {row["id"]: row["rewards"] for row in rewards}
        found = {number: known.get(record.id) or [None] for number, record in enumerate(records)}
        evaluation = Evaluation(benchmark, "", {number: row for number, row in found.items() if None not in row})
    if evaluation.rewards:
        figures = evaluation.to_json()
        return {name: figures[name] for name in _NAMES}, evaluation
    names = benchmark.metrics([[0.0] * row.num_rewards for row in benchmark.rows])
    note = _NOTHING if is_of_pairs or spec.gives_rewards else _UNDEFINED
    return {"benchmark": benchmark.name, "metrics": dict.fromkeys(names), "metrics_note": note}, None


def _of_verdicts(
    spec: JudgeSpec, benchmark: Benchmark, records: Sequence[Record], texts: Said
) -> VerdictEvaluation:
    straight: dict[int, list[float]] = {}
    turned: dict[int, list[float]] = {}
    for number, record in enumerate(records):
        (preference,) = record.preferences
        found = outcomes_of(spec, texts, record.id, preference.winner, preference.loser)
        for winner_first, rewards in ((True, straight), (False, turned)) if found else ():
            is_right = found.get(winner_first, next(iter(found.values()))) == RIGHT
            rewards[number] = [float(is_right and place == preference.winner) for place in (0, 1)]
    return VerdictEvaluation(benchmark, "", straight, turned=turned)

"""The run folder's lock, and the guard against non-finite steps."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fastrm.errors import DivergedError
from fastrm.json_files import to_json
from fastrm.storage import locked_folder
from fastrm.train.metrics import keep_rows
from fastrm.train.ranks import Ranks

INCIDENTS = "incidents.jsonl"  # file in the run folder
# The most steps in a row that may be skipped for a non-finite loss or gradient before the run stops.
MAX_SKIPPED_STEPS = 3


@contextmanager
def locked(run_dir: Path, ranks: Ranks) -> Iterator[None]:
    """Hold the run folder's lock on rank 0.

    Raises:
        StorageError: on all ranks, if another process holds it, or the folder cannot be written.
    """
    lock = locked_folder(run_dir, "the run folder", "stop it or choose another run.dir")
    with ExitStack() as held:
        ranks.on_first(lambda: held.enter_context(lock))
        yield


class StepGuard:
    """A guard that writes incidents.jsonl for skipped steps and stops a run that does nothing else.

    A skipped step changed no weight and no moment; its records are named.

    Args:
        path: of incidents.jsonl; None on a rank that only counts.
        step: that the run continues from; incidents of later ones are removed, since they will be taken again.
    """

    def __init__(self, path: Path | None, step: int = 0, skipped_in_a_row: int = 0):
        self._path = path
        if path is not None:
            keep_rows(path, lambda row: row["step"] <= step)
        self.skipped_in_a_row = skipped_in_a_row

    def after_step(self, step: int, finite: bool, loss: float, grad_norm: float, records: list[str]) -> None:
        """Note one step.

        Raises:
            DivergedError: after MAX_SKIPPED_STEPS skipped steps in a row.
        """
        if finite:
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        row = {"step": step, "loss": repr(loss), "grad_norm": repr(grad_norm), "records": records}
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(to_json(row) + "\n")
        if self.skipped_in_a_row >= MAX_SKIPPED_STEPS:
            way_on = "the last checkpoint holds finite weights: lower optim.lr, or look at those records"
            if step == self.skipped_in_a_row:  # a rate that was never applied is not the cause
                way_on = (
                    "no step has changed a weight yet: a weight of model.path is no finite number, or a value is too "
                    "large for precision.dtype: look at the weights, or set precision.dtype: fp32"
                )
            raise DivergedError(
                f"step {step}: loss {loss} and gradient norm {grad_norm} are not finite, as in the "
                f"{MAX_SKIPPED_STEPS - 1} steps before; the records are named in incidents.jsonl; {way_on}"
            )

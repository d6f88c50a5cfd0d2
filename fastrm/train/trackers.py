"""The trackers of run.report_to, which get the rows of metrics.jsonl: TensorBoard, Weights & Biases, MLflow, trackio.

Each is used through its own package, a class of a few lines. accelerate's trackers were tried, and do not serve: they
want a PartialState of accelerate, MLflow's cannot go on in a run whose configuration has changed (more steps, say), and
warn of every figure that is not a number; ids of runs, and what becomes of a tracker that fails, would be left to us.
"""

import importlib.metadata
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from fastrm.config import Config
from fastrm.errors import ConfigError
from fastrm.json_files import to_json
from fastrm.storage import write_whole
from fastrm.yaml_files import flat

# In the run folder: the id of the run in each tracker, by which a resumed run goes on there.
IDS = "trackers.json"
# The most seconds that the end of a run waits for a tracker to take its last rows.
CLOSE_SECONDS = 60.0


@dataclass(frozen=True)
class TrackedRun:
    """The facts about a run that a tracker is told.

    Attributes:
        folder: of the run.
        name, project, tags: of run.name, run.project and run.tags.
        settings: the configuration, nested.
        step: steps done before.
        run_id: of the run in the tracker, to go on in it; None begins one.
    """

    folder: Path
    name: str
    project: str
    tags: list[str]
    settings: dict[str, Any]
    step: int
    run_id: str | None


class Tracker:
    """An open run of a tracker, made of a `TrackedRun`.

    Attributes:
        needs: the packages that have it, each enough by itself, the first of which is recommended.
        run_id: by which the tracker finds the run again.
    """

    needs: tuple[str, ...]
    run_id: str

    @staticmethod
    def check() -> None:
        """Raise an exception if the tracker is not logged in or cannot be reached."""

    def log(self, figures: dict[str, float], step: int) -> None:
        """Take the figures of a step."""

    def close(self, failed: bool) -> None:
        """End the run, as one that failed or was stopped, or that is finished."""


class _TensorBoard(Tracker):
    needs = ("tensorboard>=2.16",)
    run_id = "tensorboard"  # its folder

    def __init__(self, run: TrackedRun):
        from torch.utils.tensorboard import SummaryWriter

        # Steps that a killed run took after its last checkpoint are computed again: their old rows are hidden.
        self._writer = SummaryWriter(run.folder / self.run_id, purge_step=run.step + 1)
        self._writer.add_text("run", f"{run.project}/{run.name} {' '.join(run.tags)}".strip(), run.step)
        self._writer.add_text("settings", f"```json\n{to_json(run.settings, indent=2)}\n```", run.step)

    def log(self, figures: dict[str, float], step: int) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, failed: bool) -> None:
        self._writer.close()


class _Wandb(Tracker):
    needs = ("wandb>=0.31",)

    def __init__(self, run: TrackedRun):
        import wandb

        self._run = wandb.init(
            project=run.project, name=run.name, tags=run.tags, config=run.settings, dir=run.folder, id=run.run_id,
            resume=None if run.run_id is None else "allow",  # offline runs of one id are joined when they are synced
        )  # fmt: skip
        self.run_id = self._run.id
        # wandb's own steps cannot go back, as those of a killed run do when it resumes.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    @staticmethod
    def check() -> None:
        import wandb

        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False, verify=True):
            raise ConfigError(
                "it is not logged in; run `wandb login`, or set WANDB_API_KEY, or WANDB_MODE=offline, which keeps the "
                "run in run.dir/wandb for `wandb sync`"
            )

    def log(self, figures: dict[str, float], step: int) -> None:
        self._run.log({**figures, "step": step})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _MLflow(Tracker):
    needs = ("mlflow-skinny>=3", "mlflow>=3")

    def __init__(self, run: TrackedRun):
        from mlflow import MlflowClient
        from mlflow.entities import Param, RunTag

        self._client = client = MlflowClient()
        if run.run_id is None:
            found = client.get_experiment_by_name(run.project)
            experiment = client.create_experiment(run.project) if found is None else found.experiment_id
            self.run_id = client.create_run(experiment, run_name=run.name).info.run_id
        else:
            self.run_id = run.run_id
            client.update_run(self.run_id, status="RUNNING")
        settings = {key: str(value) for key, value in flat(run.settings, in_lists=True).items()}
        before = client.get_run(self.run_id).data.params
        # A parameter cannot be changed: a setting that differs in a resumed run is a tag.
        tags = {f"changed.{key}": value for key, value in settings.items() if before.get(key, value) != value}
        tags |= dict.fromkeys(run.tags, "true")
        new = [Param(key, value) for key, value in settings.items() if key not in before]
        for start in range(0, len(new), 100):  # the most that a message may hold
            client.log_batch(self.run_id, params=new[start : start + 100])
        client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    @staticmethod
    def check() -> None:
        from mlflow import MlflowClient

        retries = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"  # seven of them make four minutes: good in a run, not before it
        given = os.environ.get(retries)
        os.environ[retries] = given or "1"
        try:
            MlflowClient().search_experiments(max_results=1)
        finally:
            if given is None:
                del os.environ[retries]

    def log(self, figures: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self.run_id, [Metric(name, value, now, step) for name, value in figures.items()])

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self.run_id, "FAILED" if failed else "FINISHED")


class _Trackio(Tracker):
    needs = ("trackio>=0.43",)

    def __init__(self, run: TrackedRun):
        import trackio

        with redirect_stdout(sys.stderr):  # where our tables are, programs read
            # It has no tags: they are among the settings.
            self._run = trackio.init(
                run.project, run.name, config=run.settings, resume="never" if run.run_id is None else "must",
                embed=False,
            )  # fmt: skip
        if run.run_id not in (None, self._run.id):
            raise ConfigError(
                f"the newest run {run.name!r} of project {run.project!r} is another one, and trackio finds runs by "
                "name; set run.name to a name of its own"
            )
        self.run_id = self._run.id

    @staticmethod
    def check() -> None:
        from huggingface_hub import get_token

        if (space := os.environ.get("TRACKIO_SPACE_ID")) and get_token() is None:
            raise ConfigError(
                f"TRACKIO_SPACE_ID is {space}, but you are not logged in to the hub; run `hf auth login`, or unset it "
                "to keep the run on this machine"
            )

    def log(self, figures: dict[str, float], step: int) -> None:
        self._run.log(figures, step=step)

    def close(self, failed: bool) -> None:
        with redirect_stdout(sys.stderr):
            self._run.finish()


_TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": _TensorBoard, "wandb": _Wandb, "mlflow": _MLflow, "trackio": _Trackio
}  # fmt: skip


def check_trackers(names: list[str]) -> None:
    """Check, before any work is done, that the trackers of run.report_to are installed, and logged in or reachable.

    Raises:
        ConfigError: saying what to do.
    """
    for name in names:
        _check(name)


def _check(name: str) -> None:
    kind = _TRACKERS[name]
    found = [(need, _version(need.name)) for need in map(Requirement, kind.needs)]
    if not any(version and version in need.specifier for need, version in found):
        old = next((f"{name} {version} is too old, {need} is wanted" for need, version in found if version), None)
        command = f'pip install "{kind.needs[0]}"'
        raise ConfigError(f"run.report_to: {old or f'{name} is not installed'}; {command}, or leave it out")
    try:
        kind.check()
    except Exception as error:
        raise _refused(name, error) from error


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _refused(name: str, error: Exception) -> ConfigError:
    problem = _one_line(error)
    advice = "" if isinstance(error, ConfigError) else f"; mend that, or leave {name} out of run.report_to"
    return ConfigError(f"run.report_to: {name}: {problem}{advice}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


class Trackers:
    """The trackers of a run, open. One that fails is named and left out, and the run goes on without it.

    Args:
        step: steps done before.
        earlier_rows: of metrics.jsonl, for a tracker that a resumed run has added.
        say: takes a line of text.

    Raises:
        ConfigError: if a tracker cannot be opened, saying what to do.
    """

    def __init__(self, config: Config, step: int, earlier_rows: list[dict], say: Callable[[str], None]):
        self._say, self._open, self._lost = say, {}, {}
        if not config.run.report_to:
            return
        folder = Path(config.run.dir)
        path, settings = folder / IDS, config.model_dump(mode="json")
        ids = json.loads(path.read_text()) if path.exists() else {}
        for name in config.run.report_to:
            known = ids.get(name)
            run = TrackedRun(
                folder, config.run.name or folder.name, config.run.project, config.run.tags, settings, step, known
            )
            try:
                self._open[name] = tracker = _TRACKERS[name](run)
            except Exception as error:
                self.close(failed=True)
                raise _refused(name, error) from error
            ids[name] = tracker.run_id
            write_whole(path, to_json(ids) + "\n")
            for row in earlier_rows if known is None else ():
                self._log(name, row)

    def write(self, row: dict) -> None:
        """Give a row of metrics.jsonl to all trackers; one that fails is left out from here on."""
        for name in list(self._open):
            self._log(name, row)

    def _log(self, name: str, row: dict) -> None:
        try:
            self._open[name].log(dict(_figures(row)), row["step"])
        except Exception as error:
            self._lose(name, f"has no rows from step {row['step']:,} on: {_one_line(error)}")

    def _lose(self, name: str, problem: str) -> None:
        self._open.pop(name, None)
        self._lost[name] = f"{name} {problem}; metrics.jsonl has all rows"
        self._say(f"warning: {self._lost[name]}")

    def close(self, failed: bool) -> None:
        """End the run in all trackers, and name those that were lost on the way.

        Args:
            failed: the run was stopped, or ended with an error.
        """
        for line in self._lost.values():
            self._say(f"tracker lost in this run: {line}")
        for name, tracker in list(self._open.items()):
            problems = []

            def end(tracker=tracker, problems=problems) -> None:
                try:
                    tracker.close(failed)
                except Exception as error:
                    problems.append(_one_line(error))

            # In a thread, because a client whose server is away may wait without end.
            thread = threading.Thread(target=end, daemon=True)
            thread.start()
            thread.join(CLOSE_SECONDS)
            if thread.is_alive():
                problems.append(f"it did not end within {CLOSE_SECONDS:.0f} s")
            if problems:
                self._lose(name, f"may lack the last rows: {problems[0]}")


def _figures(row: dict, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of a row, those of nested ones by names such as `eval/sources/mmlu/accuracy`."""
    for name, value in row.items():
        if isinstance(value, dict):
            yield from _figures(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "step":
            yield _plain(prefix + name), value


def _plain(name: str) -> str:
    """Return the name of a figure as every tracker takes it: a source may be called `../data/a (1).jsonl`."""
    parts = re.sub(r"[^\w./ -]+", "_", name).split("/")
    return "/".join(part for part in parts if part.strip("."))

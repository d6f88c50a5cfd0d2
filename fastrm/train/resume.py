"""The start of a run: from nothing, or from a checkpoint that fits the configuration."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from fastrm.config import Config
from fastrm.errors import ConfigError, StorageError
from fastrm.paradigm_config import section_of
from fastrm.stopping_config import ACCURACY
from fastrm.train.checkpoint import (
    CHECKPOINTS,
    STATE,
    clean,
    load_checkpoint,
    newest_checkpoint,
    set_newer_aside,
    verify,
)
from fastrm.train.overwrite import holds_run
from fastrm.train.progress import Progress
from fastrm.train.ranks import Ranks
from fastrm.train.run import INCIDENTS
from fastrm.train.trackers import IDS as TRACKER_IDS
from fastrm.train.writing import learnt_from, writer_of
from fastrm.yaml_files import differences

# Keys that may differ on resume: they do not change what a step computes. More or fewer steps in all
# change the learning rates that follow, which is what a user who sets them wants.
MAY_CHANGE = (
    "run.dir", "run.epochs", "run.max_steps", "run.log_every", "run.eval_every", "run.save_every",
    "run.keep_checkpoints", "run.report_to", "run.name", "run.project", "run.tags", "run.device", "data.eval",
    "data.prepared", "data.num_workers", "run.num_processes", "run.export", "run.early_stopping", "run.overwrite",
    "run.eval_groups", "run.eval_at_start", "engine", "compile", "kernels", "model.attention",
    "model.activation_checkpointing", "model.export_dtype", "model.head.new", "optim.tokens_per_pack",
    "check_exactness",
)  # fmt: skip


def find_start(run_dir: Path, resume: str, say: Callable[[str], None], over: bool = False) -> Path | None:
    """Find the checkpoint to start from; None for a fresh start.

    What a killed writer of checkpoints has left is removed, or put back in its place.
    Before a fresh start, what an earlier one has left that reached no checkpoint is removed: it would count in this
    run, or be taken for its own.

    Args:
        resume: no, auto, required, or the path of a checkpoint.
        say: takes a line of text about what was passed over.
        over: start over, whatever the folder holds, which `check_overwrite` has accepted.

    Raises:
        ConfigError: if the folder holds a run and resume is no without `over`, or resume is required and there is
            nothing to resume.
        StorageError: if checkpoints exist but none is intact, or what a killed writer has left cannot be removed.
    """
    try:
        clean(run_dir / CHECKPOINTS)
    except OSError as error:
        raise StorageError(
            f"{error.filename}: is left of a checkpoint whose writing was interrupted, and cannot be removed: "
            f"{error.strerror}; remove it, then resume"
        ) from error
    start = None if over else _find_checkpoint(run_dir, resume, say)
    if start is None:
        for name in ("quarantine.jsonl", INCIDENTS, TRACKER_IDS):
            (run_dir / name).unlink(missing_ok=True)
    return start


def _find_checkpoint(run_dir: Path, resume: str, say: Callable[[str], None]) -> Path | None:
    folder = run_dir / CHECKPOINTS
    if resume == "no":
        if holds_run(run_dir):
            raise ConfigError(
                f"{run_dir}: holds a run already; add --resume auto to continue it, set run.dir to start another, or "
                "run.overwrite=true to delete this one and start over"
            )
        return None
    if resume in ("auto", "required"):
        found = newest_checkpoint(folder, say)
        if found is None and resume == "required":
            raise ConfigError(f"{folder}: --resume required, but there is no checkpoint; start without it")
        if found is None:
            say(f"{folder}: no checkpoint yet, starting from step 0")
        return found
    problem = verify(Path(resume))
    if problem is not None:
        raise StorageError(f"{resume}: not an intact checkpoint: {problem}; use --resume auto to find the newest")
    return Path(resume)


def check_writer(checkpoint: Path | None, config: Config) -> None:
    """Refuse to resume a critic or a judge whose SPEC has another prompt or parser than its texts were made with.

    Raises:
        ConfigError: naming the SPEC.
    """
    if checkpoint is None or (section := section_of(config)) is None:
        return
    state = json.loads((checkpoint / STATE).read_text())
    if "writer" in state and learnt_from(state["writer"]) != learnt_from(writer_of(config)):
        raise ConfigError(
            f"{config.paradigm}.spec {section.spec}: is not the SPEC that {checkpoint} was trained with; restore it "
            f"({STATE} there holds it under writer), or use a new run.dir"
        )


def restore(checkpoint: Path, config: Config, fingerprint: str, engine, ranks: Ranks) -> Progress:
    """Load weights and optimizer states of an intact checkpoint, and return its progress; called on all ranks.

    Checkpoints of the run that are newer are set aside: other steps will follow now.

    Args:
        fingerprint: of the training data.

    Raises:
        ConfigError: the configuration or the training data would have made another run.
        StorageError: its tensors are not those of this network and its optimizers.
    """
    state = json.loads((checkpoint / STATE).read_text())
    check_config(state["config"], config)
    if state["data_fingerprint"] != fingerprint:
        raise ConfigError(
            f"{checkpoint}: the training data has changed since (texts, images, preferences, order); "
            "restore it, or start a new run.dir"
        )
    if state.get("base_digest") != engine.network.base_digest:
        raise ConfigError(
            f"{checkpoint}: holds adapters of other weights than {config.model.path} has now; restore them, or start a "
            "new run.dir"
        )
    load_checkpoint(checkpoint, engine)
    progress = Progress.from_state(state["progress"])
    if _chooses_by(state["config"]) != _chooses_by(config.model_dump(mode="json")):
        progress.forget_evaluations()
    folder = Path(config.run.dir) / CHECKPOINTS
    if config.run.export == "best" and progress.best_checkpoint is not None:
        ranks.on_first(lambda: _check_best(folder / progress.best_checkpoint, checkpoint))
    if ranks.is_first:
        set_newer_aside(folder, progress.step)
    return progress


def _chooses_by(config: dict) -> list:
    """Return what the figures of evaluations can be compared by: their data, and the one that chooses."""
    stopping = config["run"].get("early_stopping") or {"metric": ACCURACY}
    return [config["data"]["eval"], config["run"].get("eval_groups"), stopping["metric"]]


def _check_best(best: Path, start: Path) -> None:
    """Refuse to go on without the best checkpoint so far, which the run would export at its end."""
    if (problem := verify(best)) is not None:
        raise ConfigError(
            f"run.export: best: the best step so far, {best}, is not there or not intact ({problem}); copy it there "
            f"from {start.parent}, or set run.export: last"
        )


def check_config(saved: dict, config: Config) -> None:
    """Refuse to resume under a configuration that would have computed something else.

    Raises:
        ConfigError: naming each field with its old and new value.
    """
    with suppress(ValidationError):  # settings that are newer than the checkpoint had their defaults
        saved = Config.model_validate(saved).model_dump(mode="json")
    found = differences(saved, config.model_dump(mode="json"))
    changed = [
        f"{key}: {old!r} in the checkpoint, {new!r} now"
        for key, (old, new) in found.items()
        if not key.startswith(MAY_CHANGE)
    ]
    if changed:
        lines = "\n  ".join(changed)
        raise ConfigError(f"cannot resume under another configuration:\n  {lines}\nset it back, or use a new run.dir")

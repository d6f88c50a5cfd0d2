"""The deletion of the run that lies in run.dir, for run.overwrite; nothing else is ever deleted."""

import shutil
from collections.abc import Callable
from pathlib import Path

from fastrm.config import Config
from fastrm.errors import ConfigError
from fastrm.model.places import read_json
from fastrm.train.checkpoint import ABANDONED, CHECKPOINTS, list_checkpoints, set_newer_aside
from fastrm.train.trackers import IDS
from fastrm.yaml_files import read_yaml

# What a run leaves besides its checkpoints and its model. config.yaml is written anew, prepared data are used again.
# Without the ids in trackers.json, trackers begin a run as well.
_FILES = ("metrics.jsonl", "summary.json", "report.png", "report.html", IDS)
_SECTIONS = {"run", "data", "model", "optim"}


def holds_run(run_dir: Path) -> bool:
    """Return whether a folder holds metrics or checkpoints."""
    metrics = run_dir / "metrics.jsonl"
    return bool(list_checkpoints(run_dir / CHECKPOINTS)) or (metrics.exists() and metrics.stat().st_size > 0)


def check_overwrite(config: Config) -> None:
    """Refuse to delete what is no run, or holds the model that is about to be trained.

    Raises:
        ConfigError: saying what was found.
    """
    run_dir, settings = Path(config.run.dir), config.model
    if not holds_run(run_dir):
        return
    stored = run_dir / "config.yaml"
    if not stored.is_file() or not read_yaml(stored)[0].keys() >= _SECTIONS:
        raise ConfigError(
            f"run.overwrite: {run_dir} holds metrics or checkpoints but no config.yaml of a run, and is not deleted; "
            "remove it by hand, or set run.dir to another folder"
        )
    folder = run_dir.resolve()
    for path in (settings.path, settings.tokenizer):
        found = Path(path).resolve() if isinstance(path, str) else None
        if found == folder or (found and {folder / "model", folder / CHECKPOINTS} & {found, *found.parents}):
            raise ConfigError(
                f"run.overwrite: {path}, which the model is made of, is a part of the run in {run_dir}, which would be "
                "deleted; set run.dir to another folder"
            )


def delete_run(run_dir: Path, say: Callable[[str], None]) -> None:
    """Delete a run's files, checkpoints and model from its folder, which `check_overwrite` accepts, and say so.

    Data that the run has prepared stay, and so does all that no run writes.
    """
    checkpoints = run_dir / CHECKPOINTS
    if not holds_run(run_dir):
        return
    num_checkpoints = len(list_checkpoints(checkpoints))
    set_newer_aside(checkpoints, -1)  # first: none of them may be taken for one of the new run, whatever happens now
    folders, exported = list(checkpoints.glob(f"{ABANDONED}*")), run_dir / "model"
    if (exported / "config.json").is_file() and "fastrm" in read_json(str(exported), "config.json"):
        folders.append(exported)
    for path in folders:
        path.unlink() if path.is_symlink() else shutil.rmtree(path)
    for name in _FILES:
        (run_dir / name).unlink(missing_ok=True)
    say(f"run.overwrite: deleted the run in {run_dir}, with {num_checkpoints:,} checkpoints")

"""Checkpoints that exist completely or not at all.

A checkpoint is written to `step-N.tmp-<pid>/`, every file is fsynced, `manifest.json` with the size
and SHA-256 of each file comes last, then the folder is renamed into place and its parent fsynced.
A folder without a manifest that verifies is not a checkpoint.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from fastrm.errors import StorageError
from fastrm.model.export import host_copy

_NAME = re.compile(r"step-(\d{8,})")
MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"


def save_checkpoint(folder: Path, step: int, engine, state: dict) -> Path:
    """Write `folder/step-<N>` and return it. `state` is JSON: what resuming needs besides tensors.

    Raises:
        StorageError: if writing fails; the temporary folder is then removed, older checkpoints are
            as they were.
    """
    target = folder / f"step-{step:08d}"
    temporary = folder / f"{target.name}.tmp-{os.getpid()}"
    try:
        _clean(folder)
        temporary.mkdir(parents=True)
        save_file(_on_host(engine.model_tensors()), temporary / MODEL)
        save_file(_on_host(engine.optimizer_tensors()), temporary / OPTIMIZER)
        (temporary / STATE).write_text(json.dumps(state, indent=2) + "\n")
        files = {name: _seal(temporary / name) for name in (MODEL, OPTIMIZER, STATE)}
        (temporary / MANIFEST).write_text(json.dumps({"step": step, "files": files}, indent=2) + "\n")
        _fsync(temporary / MANIFEST)
        _fsync(temporary)
        if target.exists():
            shutil.rmtree(target)
        os.rename(temporary, target)
        _fsync(folder)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # safetensors reports a full disk as its own error type, with the errno in the text only.
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)
        hint = "free some space, then resume" if full else "check the folder, then resume"
        raise StorageError(f"{target}: the checkpoint could not be written: {error}; {hint}") from error
    return target


def load_checkpoint(path: Path, engine) -> dict:
    """Load weights and optimizer states from a checkpoint that `verify` accepts; returns its state.

    Raises:
        StorageError: if its tensors are not those of this engine's network and optimizers.
    """
    try:
        # From the host's memory: a second copy of everything might not fit the device.
        engine.load_tensors(load_file(path / MODEL), load_file(path / OPTIMIZER))
    except StorageError as error:
        raise StorageError(f"{path}: {error}") from None
    return json.loads((path / STATE).read_text())


def verify(path: Path) -> str | None:
    """None if every file is there with the size and hash of the manifest, else what is wrong."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files = manifest["files"]
        for name in (MODEL, OPTIMIZER, STATE):
            file = path / name
            if file.stat().st_size != files[name]["bytes"]:
                return f"{name} has {file.stat().st_size:,} bytes, the manifest says {files[name]['bytes']:,}"
            if _sha256(file) != files[name]["sha256"]:
                return f"{name} does not match its SHA-256"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} is not readable: {error}"
    return None


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first; not yet verified."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(_NAME.fullmatch(path.name)[1]), reverse=True)


def newest_checkpoint(folder: Path, report) -> Path | None:
    """Newest checkpoint that verifies; `report(text)` names each one that was passed over.

    Raises:
        StorageError: if there are checkpoints but none verifies.
    """
    found = list_checkpoints(folder)
    for path in found:
        problem = verify(path)
        if problem is None:
            return path
        report(f"{path}: damaged ({problem}); looking for an older one")
    if found:
        raise StorageError(
            f"{folder}: none of {len(found)} checkpoints is intact; restore one, or use another run.dir to start over"
        )
    return None


def set_newer_aside(folder: Path, step: int) -> None:
    """Rename checkpoints after `step` to abandoned-*: they are damaged, or of a future that will not be."""
    for path in list_checkpoints(folder):
        if int(_NAME.fullmatch(path.name)[1]) > step:
            aside = path.with_name(f"abandoned-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def prune(folder: Path, keep: int, best: str | None) -> None:
    """Delete all but the newest `keep` checkpoints and the one named `best`."""
    for path in list_checkpoints(folder)[keep:]:
        if path.name != best:
            shutil.rmtree(path)


def _on_host(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: host_copy(tensor) for name, tensor in tensors}


def _seal(path: Path) -> dict:
    _fsync(path)
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _clean(folder: Path) -> None:
    """Remove temporary folders of writers that were killed. The run's lock makes us the only writer."""
    if folder.is_dir():
        for path in folder.glob("step-*.tmp-*"):
            shutil.rmtree(path)

"""Checkpoints that exist completely or not at all.

A checkpoint is written to `step-N.tmp-<pid>/`, every file is fsynced, `manifest.json` with the size
and SHA-256 of each file comes last, then the folder is renamed into place and its parent fsynced.
A folder without a manifest that verifies is not a checkpoint.

A step may be saved twice, before and after its evaluation. Its first checkpoint is renamed to
`step-N.replaced` before the second takes its name, and deleted after that; `clean` gives it back its
name if the writer was killed in between.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fastrm.errors import StorageError
from fastrm.json_files import to_json
from fastrm.stop import StopFlag
from fastrm.storage import sync_path
from fastrm.train.progress import Progress
from fastrm.train.ranks import ALONE, Ranks

_NAME = re.compile(r"step-(\d{8,})")
CHECKPOINTS = "checkpoints"  # folder in the run folder
MODEL, OPTIMIZER, STATE, MANIFEST = "model", "optimizer", "state.json", "manifest.json"
ABANDONED = "abandoned-"  # before the name of a checkpoint whose steps will run again
_REPLACED = ".replaced"  # behind the name of a checkpoint that makes room for a second one of its step
# The most bytes of a safetensors file. model.safetensors is followed by model.2.safetensors and so on.
SHARD_BYTES = 4 * 2**30
# The most saves in a row that may fail, as on a full disk, before the run stops.
MAX_FAILED_SAVES = 3


class Checkpoints:
    """The checkpoints of one run: the choice of those that are written, and of those that are kept.

    Args:
        folder: the folder of the checkpoints.
        about: facts about the run besides its progress, as JSON, which each checkpoint holds.
        keep: the number to keep, besides the best.
        saved: the progress that the run was restored from, whose checkpoint is there; None for a fresh start.
        say: called with a line of text about a save that failed.
    """

    def __init__(
        self,
        folder: Path,
        engine,
        about: dict,
        keep: int,
        *,
        saved: Progress | None,
        stop: StopFlag,
        ranks: Ranks,
        say: Callable[[str], None],
    ):
        self._folder, self._engine, self._about, self._keep = folder, engine, about, keep
        self._stop, self._ranks, self._say = stop, ranks, say
        self._saved = None if saved is None else _key(saved)
        self._failures = 0  # in a row

    def save(self, progress: Progress) -> None:
        """Write a checkpoint, unless the last one holds the same; called on all ranks.

        Raises:
            StorageError: on all ranks, as `save_checkpoint`.
        """
        if self._saved == _key(progress):
            return
        with self._stop.saving():
            state = {"progress": progress.state(), **self._about}
            save_checkpoint(self._folder, progress.step, self._engine, state, self._ranks)
        self._saved = _key(progress)
        if self._ranks.is_first:
            prune(self._folder, self._keep, progress.best_checkpoint)

    def try_to_save(self, progress: Progress) -> bool:
        """Save, but let training go on if the disk is full: the next save may succeed.

        Raises:
            StorageError: at the MAX_FAILED_SAVES-th failure in a row.
        """
        try:
            self.save(progress)
            self._failures = 0
            return True
        except StorageError as error:
            self._failures += 1
            self._say(f"warning: {error} (failure {self._failures} of {MAX_FAILED_SAVES} in a row)")
            if self._failures >= MAX_FAILED_SAVES:
                raise
            return False


def _key(progress: Progress) -> tuple[int, bool]:
    """Return a key that differs between two checkpoints of a run: the step, and whether it includes its evaluation."""
    return progress.step, progress.is_evaluated


def save_checkpoint(folder: Path, step: int, engine, state: dict, ranks: Ranks = ALONE) -> Path:
    """Write `folder/step-<N>` and return it; called on all ranks, of which the first writes.

    The files do not depend on the number of ranks, and the first holds at most SHARD_BYTES, or one
    tensor, of the others' weights and states at a time.

    Args:
        state: JSON, what resuming needs besides tensors.

    Raises:
        StorageError: on all ranks, if writing fails; the temporary folder is then removed, older
            checkpoints are as they were.
    """
    writer = _Writer(folder, step) if ranks.is_first else None
    for stem, tensors in ((MODEL, engine.model_tensors()), (OPTIMIZER, engine.optimizer_tensors())):
        for name, tensor in tensors:
            if writer is not None:  # the other ranks only help to gather
                writer.add(stem, name, tensor)
    ranks.on_first(lambda: writer.finish(state))
    return folder / f"step-{step:08d}"


class _Writer:
    """A writer of one checkpoint, which raises its errors in `finish`.

    After a failure it accepts and drops the rest, so that no other rank waits for this one.
    """

    def __init__(self, folder: Path, step: int):
        self._folder, self._step = folder, step
        self._target = folder / f"step-{step:08d}"
        self._temporary = folder / f"{self._target.name}.tmp-{os.getpid()}"
        self._files: dict[str, dict] = {}
        self._stem, self._shard, self._bytes = MODEL, {}, 0
        self._failure: Exception | None = None
        self._try(self._begin)

    def add(self, stem: str, name: str, tensor: torch.Tensor) -> None:
        """Add a tensor of model or optimizer; all of the one come before all of the other."""
        self._try(self._add, stem, name, tensor)

    def finish(self, state: dict) -> None:
        """Write the rest, and let the checkpoint appear.

        Raises:
            StorageError: if anything has failed since the beginning.
        """
        self._try(self._finish, state)
        if (error := self._failure) is None:
            return
        with suppress(OSError):  # what cannot be removed now is removed at the next start
            clean(self._folder)
        # safetensors reports a full disk by its own error type, with the errno only in the text.
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)
        hint = "free some space, then resume" if full else "check the folder, then resume"
        raise StorageError(f"{self._target}: the checkpoint could not be written: {error}; {hint}") from error

    def _try(self, function: Callable, *arguments) -> None:
        if self._failure is None:
            try:
                function(*arguments)
            except Exception as error:
                self._failure, self._shard = error, {}

    def _begin(self) -> None:
        clean(self._folder)
        self._temporary.mkdir(parents=True)

    def _add(self, stem: str, name: str, tensor: torch.Tensor) -> None:
        if stem != self._stem or (self._shard and self._bytes + tensor.nbytes > SHARD_BYTES):
            self._flush()
            self._stem = stem
        self._shard[name] = _host_copy(tensor)
        self._bytes += tensor.nbytes

    def _flush(self) -> None:
        """Write the tensors that have come; model and optimizer have a file each, even without tensors."""
        number = sum(name.startswith(f"{self._stem}.") for name in self._files) + 1
        name = _shard_name(self._stem, number)
        save_file(self._shard, self._temporary / name)
        self._files[name] = _seal(self._temporary / name)
        self._shard, self._bytes = {}, 0

    def _finish(self, state: dict) -> None:
        self._flush()
        if self._stem == MODEL:
            self._stem = OPTIMIZER
            self._flush()
        (self._temporary / STATE).write_text(to_json(state, indent=2) + "\n")
        self._files[STATE] = _seal(self._temporary / STATE)
        manifest = {"step": self._step, "files": self._files}
        (self._temporary / MANIFEST).write_text(to_json(manifest, indent=2) + "\n")
        sync_path(self._temporary / MANIFEST)
        sync_path(self._temporary)
        replaced = self._target.with_name(self._target.name + _REPLACED)
        if self._target.exists():
            os.rename(self._target, replaced)
        os.rename(self._temporary, self._target)
        sync_path(self._folder)
        shutil.rmtree(replaced, ignore_errors=True)


class _Tensors(Mapping):
    """The tensors of model or optimizer in a checkpoint, each read into the host's memory when asked for.

    A second copy of everything may fit neither the device, nor the host once for every rank.
    """

    def __init__(self, path: Path, stem: str):
        names = json.loads((path / MANIFEST).read_text())["files"]
        files = [safe_open(path / name, framework="pt") for name in names if name.startswith(f"{stem}.")]
        self._files = {name: file for file in files for name in file.keys()}  # noqa: SIM118  (no iterator)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def model_tensors(path: Path) -> Mapping[str, torch.Tensor]:
    """Return the weights in a checkpoint by their stock names, each read when it is asked for."""
    return _Tensors(path, MODEL)


def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor in the host's memory, contiguous, in storage of its own, as safetensors wants it.

    The parts of a fused projection share one storage; on a CPU nothing else is copied.
    """
    tensor = tensor.detach().cpu().contiguous()
    shares = tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()
    return tensor.clone() if shares else tensor


def load_checkpoint(path: Path, engine) -> dict:
    """Load weights and optimizer states from a checkpoint that `verify` accepts; return its state.

    Raises:
        StorageError: if its tensors are not those of this engine's network and optimizers.
    """
    try:
        engine.load_tensors(model_tensors(path), _Tensors(path, OPTIMIZER))
    except StorageError as error:
        raise StorageError(f"{path}: {error}") from None
    return json.loads((path / STATE).read_text())


def verify(path: Path) -> str | None:
    """Return None if every file has the size and hash of the manifest, else what is wrong."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files = manifest["files"]
        for name in dict.fromkeys([_shard_name(MODEL, 1), _shard_name(OPTIMIZER, 1), STATE, *files]):
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
    """Return the checkpoint folders, newest first; they are not verified yet."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """Return the step of a checkpoint, by its folder's name."""
    return int(_NAME.fullmatch(path.name)[1])


def newest_checkpoint(folder: Path, report) -> Path | None:
    """Return the newest checkpoint that verifies; `report(text)` names each damaged one that is newer.

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


def clean(folder: Path) -> None:
    """Remove what a writer that was killed or failed has left, and give a replaced checkpoint back its name if needed.

    The run's lock makes the caller's process the only writer.

    Raises:
        OSError: something cannot be removed or renamed.
    """
    for replaced in folder.glob(f"step-*{_REPLACED}"):
        target = replaced.with_name(replaced.name.removesuffix(_REPLACED))
        if verify(target) is None:
            shutil.rmtree(replaced)
        else:
            shutil.rmtree(target, ignore_errors=True)
            os.rename(replaced, target)
    for temporary in folder.glob("step-*.tmp-*"):
        shutil.rmtree(temporary)


def set_newer_aside(folder: Path, step: int) -> None:
    """Rename checkpoints after `step` to abandoned-*: they are damaged, or of steps that will run again."""
    for path in list_checkpoints(folder):
        if step_of(path) > step:
            aside = path.with_name(f"{ABANDONED}{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def prune(folder: Path, keep: int, best: str | None) -> None:
    """Delete all but the newest `keep` checkpoints and the one named `best`."""
    for path in list_checkpoints(folder)[keep:]:
        if path.name != best:
            shutil.rmtree(path)


def _shard_name(stem: str, number: int) -> str:
    return f"{stem}.safetensors" if number == 1 else f"{stem}.{number}.safetensors"


def _seal(path: Path) -> dict:
    sync_path(path)
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

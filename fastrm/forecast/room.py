"""A check that this machine has room for a run, before it begins, and the table of its needs."""

from pathlib import Path

from rich.console import Console

from fastrm.config import Config
from fastrm.errors import ConfigError, StorageError
from fastrm.forecast.hardware import GPUS_PER_NODE
from fastrm.forecast.needs import Disk, Least, Needs, least_of
from fastrm.model.architectures import find_architecture, meta_network
from fastrm.model.network import pick_device
from fastrm.resources import available_memory, free_disk
from fastrm.tables import Table
from fastrm.ui import gib, gpus, say, show

_PHASES = {
    "loading": "loading the weights",
    "training": "training",
    "saving": "writing a checkpoint",
    "exporting": "exporting the model",
}


def check_room(config: Config, num_ranks: int = 1, num_local: int = 1) -> None:
    """Refuse a run that this machine has too little host memory or too little disk for.

    Memory is compared with what a run cannot do without, so that none is refused that would have fitted. A model
    whose architecture nothing here knows, such as one that is still on the hub, is not looked at.

    Args:
        num_ranks: processes of the run.
        num_local: of them, on this machine.

    Raises:
        ConfigError: too little host memory.
        StorageError: too little disk.
    """
    try:
        architecture, _ = find_architecture(config.model)
    except LookupError:
        return
    needs = least_of(config, meta_network(architecture, config.model, config.paradigm), num_ranks)
    on_gpu = pick_device(config.run.device).type != "cpu"
    if problem := memory_problem(config, needs, on_gpu, num_local):
        raise ConfigError(problem)
    if problem := disk_problem(config, needs.disk):
        raise StorageError(problem)


def memory_problem(config: Config, needs: Least, on_gpu: bool, num_local: int) -> str | None:
    """Return a message if the host's memory is too small, with the change that helps; None if a run may fit."""
    least, there = num_local * (needs.least_on_gpu if on_gpu else needs.least), available_memory()
    if least <= there:
        return None
    ranks = f" of {num_local} ranks" if num_local > 1 else ""
    if on_gpu:
        return (
            f"host memory: the random weights of model.init{ranks} are made there and take {gib(least)} GiB, "
            f"{gib(there)} GiB are available; start from a folder (model.path), which is read straight to the GPU, "
            "lower run.num_processes, or free memory"
        )
    if num_local > 1:
        ways = ["lower run.num_processes"]
    else:
        ways = ["optim.states: 8bit"] * (config.optim.states != "8bit")
        if config.precision.dtype == "bf16" != config.precision.weights:
            ways.append("precision.weights: bf16")
    ways += ["model.freeze with more parts", "a smaller model", "a GPU"]
    return (
        f"host memory: weights, gradients and AdamW's states{ranks} take {gib(least)} GiB on a CPU, without what a "
        f"pack needs; {gib(there)} GiB are available; free memory, or try one of: {', '.join(ways)}"
    )


def disk_problem(config: Config, disk: Disk) -> str | None:
    """Return a message if the disk of run.dir is too small, with the change that helps; None if all fits."""
    run_dir = Path(config.run.dir)
    try:
        there = free_disk(run_dir) + _written(run_dir)
    except OSError as error:
        return f"{run_dir}: the disk cannot be asked how much is free: {error.strerror}; choose another run.dir"
    if disk.total <= there:
        return None
    ways = ["free some space", "choose a run.dir on another disk"]
    if disk.num_checkpoints > 1:
        ways.append(f"lower run.keep_checkpoints ({config.run.keep_checkpoints})")
    if config.optim.states != "8bit":
        ways.append("set optim.states: 8bit")
    text = f"{run_dir}: {disk_text(disk)} take {gib(disk.total)} GiB, {gib(there)} GiB are free"
    return f"{text}; {', or '.join(ways)}"


def disk_text(disk: Disk) -> str:
    """Return the files on the disk at its fullest, in words."""
    one = f"checkpoint{'s' * (disk.num_checkpoints > 1)} of {gib(disk.checkpoint)} GiB"
    return f"{disk.num_checkpoints} {one} and the model of {gib(disk.export)} GiB"


def _written(run_dir: Path) -> int:
    """Return bytes of checkpoints and model of an earlier part of the run, which new ones replace."""
    files = (file for name in ("checkpoints", "model") for file in (run_dir / name).rglob("*"))
    return sum(file.stat().st_size for file in files if file.is_file())


def print_needs(console: Console, config: Config, needs: Needs, num_gpus: int) -> None:
    """Print a table of memory at its highest, and a line on disk; for one process, also on a CPU."""
    columns = {f"host of {gpus(min(num_gpus, GPUS_PER_NODE))}": needs.host, "each GPU": needs.gpu}
    if num_gpus == 1:
        columns = {"host, on a CPU": needs.cpu} | columns
    table = Table("peak in GiB", *columns)
    for name, label in _PHASES.items():
        table.add_row(label, *(gib(getattr(phases, name)) for phases in columns.values()))
    show(console, f"Memory of a run, packs of {config.optim.tokens_per_pack:,} tokens (estimate)", table)
    say(console, f"  Disk below run.dir, at most: {disk_text(needs.disk)}: {gib(needs.disk.total)} GiB.")


def print_problems(console: Console, config: Config, needs: Needs) -> None:
    """Print lines on what this machine has too little of for one process of the run."""
    on_gpu = pick_device(config.run.device).type != "cpu"
    for problem in filter(None, (memory_problem(config, needs, on_gpu, 1), disk_problem(config, needs.disk))):
        say(console, f"  Not on this machine: {problem}.")

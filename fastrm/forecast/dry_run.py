"""The work of `fastrm train --dry-run`: check what can be checked without weights, and size the run.

Nothing is downloaded or written, and of data that is here the first rows are read. A missing input does not end a
dry run; it is listed. What a step costs depends on all of the data, so it is computed for a stated, typical group.
"""

from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from fastrm.config import Config, ModelConfig
from fastrm.data.tokenizer import load_tokenizer
from fastrm.forecast.fake_step import PROGRESS, FakeSteps
from fastrm.forecast.flops import step_flops
from fastrm.forecast.inputs import ROWS, check_inputs, check_rows
from fastrm.forecast.memory import MODES, peak_of
from fastrm.forecast.needs import needs_of
from fastrm.forecast.parameters import count_parameters
from fastrm.forecast.report import print_parameters
from fastrm.forecast.room import print_needs, print_problems
from fastrm.forecast.stand_ins import describe_replaced
from fastrm.forecast.step_time import packs_of_a_step
from fastrm.forecast.ways import ways
from fastrm.forecast.workload import Workload, typical_workload
from fastrm.model.adopt import adopt_what_is_here
from fastrm.model.architectures import find_architecture, meta_network
from fastrm.model.config_keys import describe_unknown_keys
from fastrm.model.export import check_vocabulary
from fastrm.model.network import RewardNetwork
from fastrm.model.places import locate
from fastrm.tables import Table
from fastrm.train.optim import check_lr_parts
from fastrm.ui import Display, gib, make_console, peta, say, show

GPU_COUNTS = (1, 8, 64)


def dry_run(config: Config, console: Console | None = None) -> dict:
    """Print inputs, parameters, memory and operations of a run on standard output.

    Returns:
        {"inputs": [(name, state, detail)], "rows": the same of sources' first rows, "parameters", "memory",
        "needs", "step"}, in bytes and operations; the last four are missing if nothing here knows the model's
        architecture.

    Raises:
        ConfigError: if the model's family, its config or model.freeze cannot work, if the configuration contradicts
            the reward head in the model's files, or if the tokenizer has more tokens than the model embeddings.
        StorageError: if the model's files do not fit one another.
    """
    console = console or make_console()
    report: dict = {"inputs": check_inputs(config)}
    _print_table(console, "Inputs", report["inputs"])
    config, head = adopt_what_is_here(config)
    if head:
        say(console, head)
    report["rows"] = check_rows(config)
    if report["rows"]:
        _print_table(console, f"Up to {ROWS} rows of each source that is here", report["rows"])
    try:
        architecture, origin = find_architecture(config.model)
    except LookupError as error:
        say(console, f"Model not sized: {error.args[0]}.")
    else:
        _check_tokenizer(config.model, architecture)
        network = meta_network(architecture, config.model, config.paradigm)
        check_lr_parts(network, config.optim)
        with Display() as display:
            report |= _size(config, network, display.task(PROGRESS))
        print_parameters(console, report["parameters"], origin)
        if (line := describe_unknown_keys(architecture)) is not None:
            say(console, line)
        _print_memory(console, report["memory"], config)
        print_needs(console, config, report["needs"], 1)
        print_problems(console, config, report["needs"])
        _print_step(console, report["step"])
    num_missing = sum(state == "missing" for _, state, _ in report["inputs"])
    here = f"{num_missing} of {len(report['inputs'])} inputs are missing here" if num_missing else "its inputs are here"
    unusable = [name for name, state, _ in report["rows"] if state == "missing"]
    then = f"; no row that was looked at can be used: {', '.join(unusable)}" if unusable else ""
    say(console, f"The configuration is valid; {here}{then}.")
    return report


def _check_tokenizer(settings: ModelConfig, architecture) -> None:
    """Refuse a tokenizer that is here and has more tokens than the embeddings; one that is trained fits by itself."""
    if settings.path is None or not Path(settings.path).is_dir():
        return
    folder = settings.tokenizer or locate(settings.path).tokenizer
    if (Path(folder) / "tokenizer.json").is_file():
        check_vocabulary(architecture, load_tokenizer(folder))


def _size(config: Config, network: RewardNetwork, progress: Callable[..., None]) -> dict:
    steps = FakeSteps(network, progress)
    load = typical_workload(config, network)
    packs = {count: packs_of_a_step(config, load, count) for count in GPU_COUNTS}  # as `fastrm plan` has it
    return {
        "parameters": count_parameters(network),
        "memory": {
            way.label: {mode: peak_of(steps, way.config(config, mode), count, load, packs[count]) for mode in MODES}
            for count in GPU_COUNTS
            for way in ways(config, count)
        },
        "needs": needs_of(steps, config, load, num_packs=packs[1]),
        "step": {"workload": load, "ways": _ways(config, network, load)},
    }


def _ways(config: Config, network: RewardNetwork, load: Workload) -> dict[str, dict]:
    """Return tokens, images and operations of a step, for a stock pairwise trainer and for this one."""
    share = config.data.share_prefixes
    found = {"stock pairwise": {"shared": False, "images_once": False, "pruned": False}}
    if share:
        found["shared prompts"] = {"shared": True, "images_once": True, "pruned": False}
    found["fastrm"] = {"shared": share, "images_once": True, "pruned": config.prunes_last_layer}
    checkpointing = config.model.activation_checkpointing == "full"
    return {
        name: {
            "tokens": load.num_tokens(way["shared"]),
            "images": load.num_images(way["images_once"]),
            "flops": step_flops(network, load, **way, checkpointing=checkpointing),
        }
        for name, way in found.items()
    }


def _print_table(console: Console, title: str, rows: list[tuple[str, str, str]]) -> None:
    table = Table("key", "state", "detail", text=range(3))
    for row in rows:
        table.add_row(*row, style="red" if row[1] in ("missing", "refused") else None)
    show(console, title, table)


def _print_memory(console: Console, memory: dict, config: Config) -> None:
    configured = config.model.activation_checkpointing
    table = Table("way to run", *(f"{mode} (as configured)" if mode == configured else mode for mode in MODES))
    for label, by_mode in memory.items():
        table.add_row(label, *(gib(by_mode[mode].total) for mode in MODES))
    title = f"Peak memory by activation checkpointing, packs of {config.optim.tokens_per_pack:,} tokens"
    show(console, f"{title}, GiB per GPU (estimate)", table)
    for line in describe_replaced(config):
        say(console, f"  - {line}")
    say(console, "  What it is made of, and what fits a GPU: fastrm plan.")


def _print_step(console: Console, step: dict) -> None:
    load, found = step["workload"], step["ways"]
    table = Table("", *found)
    table.add_row("tokens", *(f"{way['tokens']:,}" for way in found.values()))
    table.add_row("images through the vision tower", *(f"{way['images']:,}" for way in found.values()))
    flops = [way["flops"] for way in found.values()]
    for part in flops[0]:
        table.add_row(f"PFLOP, {part}", *(peta(by_part[part].total) for by_part in flops))
    for phase in ("forward", "backward", "recomputed", "total"):
        sums = [sum(getattr(part, phase) for part in by_part.values()) for by_part in flops]
        table.add_row(f"PFLOP, {phase}", *map(peta, sums), end_section=phase == "recomputed")
    table.add_row("relative to stock pairwise", *(f"{value / sums[0]:.3f}" for value in sums))
    what = "preferences" if load.unit == "pairs" else load.unit
    show(console, f"One step of {load.num_pairs:,} {what} (estimate)", table)
    say(
        console,
        f"  Assumed, whatever the data are: 1 {load.unit[:-1]} per prompt, {load.image_tokens:,} image tokens "
        f"({load.image_key}), {load.lengths}. Operations per matrix "
        "parameter and row: 2 forward, 2 for the gradient of the input where something before it is trained, 2 for its "
        "own where it is trained; attention 4 Q forward, 8 Q backward per query-key pair; recomputed: full "
        "checkpointing repeats a layer but for its last product.",
    )

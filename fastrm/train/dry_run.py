"""`fastrm train --dry-run`: check what can be checked without weights and data, and size the run.

Nothing is downloaded, read or written. A missing input does not end a dry run; it is listed. What a
step costs depends on data that may not be here, so it is computed for a stated, typical group.
"""

import importlib.util
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fastrm.config import Config, ModelConfig, SourceConfig
from fastrm.data.sources import read_source
from fastrm.data.sources.digits import PREFIX as DIGITS_PREFIX
from fastrm.data.sources.files import data_files
from fastrm.errors import DataError
from fastrm.model.architectures import find_architecture, meta_network
from fastrm.model.network import RewardNetwork
from fastrm.train.cost import (
    Workload,
    activation_bytes,
    autocast_weight_bytes,
    count_parameters,
    local_state_bytes,
    patches_per_token,
    step_flops,
    sum_parameters,
    zero_state_bytes,
)

# The group that costs are computed for: one image at data.max_pixels, one question, two responses.
PROMPT_TEXT_TOKENS = 100  # question and chat template
RESPONSE_TOKENS = 300
GPU_COUNTS = (1, 8, 64)
# Columns of a piped table, wide enough that paths stay in one piece.
PIPE_WIDTH = 140


def dry_run(config: Config, console: Console | None = None) -> dict:
    """Print inputs, parameters, memory and operations of a run on standard output.

    Returns:
        {"inputs": [(name, state, detail)], "parameters", "memory", "step"}, in bytes and operations;
        the last three are missing if nothing here knows the model's architecture.

    Raises:
        ConfigError: if the model's family, its config or model.freeze cannot work.
    """
    console = console or Console()
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    report: dict = {"inputs": check_inputs(config)}
    _print_inputs(console, report["inputs"])
    try:
        architecture, origin = find_architecture(config.model)
    except LookupError as error:
        _say(console, f"Model not sized: {error.args[0]}.")
    else:
        network = meta_network(architecture, config.model)
        report |= _size(config, network)
        _print_parameters(console, report["parameters"], origin)
        _print_memory(console, report["memory"], config)
        _print_step(console, report["step"], config)
    num_missing = sum(state == "missing" for _, state, _ in report["inputs"])
    here = f"{num_missing} of {len(report['inputs'])} inputs are missing here" if num_missing else "its inputs are here"
    _say(console, f"The configuration is valid; {here}.")
    return report


def check_inputs(config: Config) -> list[tuple[str, str, str]]:
    """(name, "found" or "missing", detail) of everything that the configuration says a run reads."""
    rows = [("data.train", "missing", "no source is named")] if not config.data.train else []
    for split, sources in (("train", config.data.train), ("eval", config.data.eval)):
        for number, source in enumerate(sources):
            rows.append((f"data.{split}.{number}", *_check_source(source)))
    rows += _check_model(config.model)
    for logger in config.run.report_to:
        found = importlib.util.find_spec(logger) is not None
        rows.append(("run.report_to", "found" if found else "missing", f"Python package {logger}"))
    return rows


def _check_source(source: SourceConfig) -> tuple[str, str]:
    """State and detail of one source: its files and images exist, no row is read."""
    try:
        records = read_source(source.path, format=source.format, images=source.images, quarantine=None)
        if source.path.startswith(DIGITS_PREFIX):
            # Ships with a package; only making the first record tells whether it is there.
            list(islice(records, 1))
            return "found", f"{source.path}, built in"
        files = data_files(source.path)
    except DataError as error:
        return "missing", str(error)
    num_bytes = sum(Path(file).stat().st_size for file in files)
    return "found", f"{source.path}: {len(files):,} file{'s' * (len(files) > 1)}, {num_bytes / 2**20:,.1f} MiB"


def _check_model(model: ModelConfig) -> list[tuple[str, str, str]]:
    rows = []
    if model.path is not None:
        rows.append(("model.path", *_check_folder(model.path, "config.json", "*.safetensors")))
    if isinstance(model.tokenizer, str):
        rows.append(("model.tokenizer", *_check_folder(model.tokenizer, "tokenizer.json", "tokenizer_config.json")))
    return rows


def _check_folder(path: str, *patterns: str) -> tuple[str, str]:
    folder = Path(path)
    if not folder.is_dir():
        return "missing", f"{path}: no such folder here; a run asks the hub for it"
    absent = [pattern for pattern in patterns if not any(folder.glob(pattern))]
    return ("missing", f"{path}: has no {' and no '.join(absent)}") if absent else ("found", path)


def typical_workload(config: Config, network: RewardNetwork) -> Workload:
    """A step of groups with one image at data.max_pixels, if the model sees, and two responses."""
    image_tokens = 0
    if network.is_vision:
        vision = network.model.config.vision_config
        image_tokens = config.data.max_pixels // (vision.patch_size * vision.spatial_merge_size) ** 2
    return Workload(config.optim.batch_pairs, image_tokens, PROMPT_TEXT_TOKENS, RESPONSE_TOKENS)


def _size(config: Config, network: RewardNetwork) -> dict:
    parts = count_parameters(network)
    load = typical_workload(config, network)
    return {
        "parameters": parts,
        "memory": _memory(config, network, load),
        "step": {"workload": load, "ways": _ways(config, network, load)},
    }


def _memory(config: Config, network: RewardNetwork, load: Workload) -> dict:
    """Bytes: "state" by engine and number of GPUs, "autocast", and "activations" of a full pack."""
    total, bf16 = sum_parameters(count_parameters(network)), config.precision.dtype == "bf16"
    state = {"local engine": {1: local_state_bytes(total)}}
    for stage in range(4):
        state[f"ZeRO-{stage}"] = {gpus: zero_state_bytes(total, stage, gpus) for gpus in GPU_COUNTS}
    num_tokens = config.optim.tokens_per_pack
    groups_per_pack = num_tokens * load.num_pairs / load.num_tokens(config.data.share_prefixes)
    num_patches = round(groups_per_pack * load.image_tokens * patches_per_token(network))
    return {
        "state": state,
        "autocast": autocast_weight_bytes(network) if bf16 else 0,
        "activations": activation_bytes(network, num_tokens, num_patches, bf16),
    }


def _ways(config: Config, network: RewardNetwork, load: Workload) -> dict[str, dict]:
    """Tokens, images and operations of a step, for a stock pairwise trainer and for this one."""
    share = config.data.share_prefixes
    ways = {"stock pairwise": {"shared": False, "images_once": False, "pruned": False}}
    if share:
        ways["shared prompts"] = {"shared": True, "images_once": True, "pruned": False}
    ways["fastrm"] = {"shared": share, "images_once": True, "pruned": True}
    checkpointing = config.model.activation_checkpointing == "full"
    return {
        name: {
            "tokens": load.num_tokens(way["shared"]),
            "images": load.num_pairs * (1 if way["images_once"] else 2) * (load.image_tokens > 0),
            "flops": step_flops(network, load, **way, checkpointing=checkpointing),
        }
        for name, way in ways.items()
    }


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False)


def _show(console: Console, title: str, table: Table) -> None:
    # As a line of its own: a table's own title is wrapped to the width of the table.
    console.print(title, style="bold", markup=False, highlight=False)
    console.print(table, markup=False)


def _table(*columns: str) -> Table:
    """A table whose first column is text and whose others are numbers."""
    table = Table()
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def _print_inputs(console: Console, inputs: list[tuple[str, str, str]]) -> None:
    table = Table()
    for column in ("key", "state", "detail"):
        table.add_column(column, overflow="fold")
    for row in inputs:
        table.add_row(*row, style="red" if row[1] == "missing" else None)
    _show(console, "Inputs", table)


def _print_parameters(console: Console, parts: dict, origin: str) -> None:
    table = _table("part", "all", "trained")
    for name, count in (*parts.items(), ("all", sum_parameters(parts))):
        table.add_row(name, f"{count.total:,}", f"{count.trainable:,}")
    _show(console, f"Parameters (exact; {origin})", table)


def _print_memory(console: Console, memory: dict, config: Config) -> None:
    headings = [f"{gpus} GPU{'s' * (gpus > 1)}" for gpus in GPU_COUNTS]
    table = _table("engine", *headings)
    for engine, by_gpus in memory["state"].items():
        table.add_row(engine, *(_gib(by_gpus[gpus]) if gpus in by_gpus else "-" for gpus in GPU_COUNTS))
    _show(console, "Weights, gradients and AdamW state, GiB per GPU (estimate)", table)
    _say(
        console,
        "  local engine: float32 throughout, 16 bytes per trained and 4 per frozen parameter, one process.\n"
        "  ZeRO: bf16 with a float32 copy, 2 + 2 + 12 bytes per trained and 2 per frozen parameter; stage 1 divides\n"
        "  the 12, stage 2 also the gradients, stage 3 also the weights (arXiv 1910.02054, section 3).",
    )
    table = _table("besides the above", "GiB")
    checkpointing = config.model.activation_checkpointing == "full"
    for name, label in (("whole", "activations"), ("checkpointed", "activations with gradient checkpointing")):
        is_set = checkpointing == (name == "checkpointed")
        table.add_row(label + " (as configured)" * is_set, _gib(memory["activations"][name]))
    if memory["autocast"]:
        table.add_row("bf16 copies of the trained matrices (autocast)", _gib(memory["autocast"]))
    _show(console, f"One pack of {config.optim.tokens_per_pack:,} tokens (estimate)", table)
    formula = "2 (5 D + 2 Q + 2 KV + 4 I)" if config.precision.dtype == "bf16" else "4 (2 D + 2 Q + 2 KV + 4 I)"
    _say(
        console,
        f"  bytes per token and layer: 16 D + {formula}; checkpointed: 4 D and one whole layer\n"
        "  (D hidden, Q query heads, KV key heads, I intermediate size; frozen vision blocks keep nothing).",
    )


def _print_step(console: Console, step: dict, config: Config) -> None:
    load, ways = step["workload"], step["ways"]
    table = _table("", *ways)
    table.add_row("tokens", *(f"{way['tokens']:,}" for way in ways.values()))
    table.add_row("images through the vision tower", *(f"{way['images']:,}" for way in ways.values()))
    flops = [way["flops"] for way in ways.values()]
    for part in flops[0]:
        table.add_row(f"PFLOP, {part}", *(_peta(by_part[part].total) for by_part in flops))
    for phase in ("forward", "backward", "recomputed", "total"):
        sums = [sum(getattr(part, phase) for part in by_part.values()) for by_part in flops]
        table.add_row(f"PFLOP, {phase}", *map(_peta, sums), end_section=phase == "recomputed")
    table.add_row("relative to stock pairwise", *(f"{value / sums[0]:.3f}" for value in sums))
    _show(console, f"One step of {load.num_pairs:,} preferences (estimate)", table)
    _say(
        console,
        f"  Assumed, since no data is read: 1 pair per prompt, {load.image_tokens:,} image tokens (data.max_pixels), "
        f"{load.prompt_text_tokens} prompt\n  tokens of text, {load.response_tokens} per response. "
        "Operations per matrix parameter and row: 2 forward, 2 for the gradient of the\n  input where something "
        "before it is trained, 2 for its own where it is trained; attention 4 Q forward, 8 Q backward\n"
        "  per query-key pair; recomputed: gradient checkpointing repeats a layer but for its last product.",
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.1f}"


def _peta(flops: int) -> str:
    return f"{flops / 1e15:,.3f}"

"""The report at the end of a run: a table, report.png, and the versions and memory of the run."""

import importlib
import os
import resource
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from fastrm.config import Config
from fastrm.errors import StorageError
from fastrm.evaluate.accuracy import Flips
from fastrm.evaluate.ratings import FIGURES, shown
from fastrm.json_files import to_json
from fastrm.model.config_keys import describe_unknown_keys
from fastrm.model.lora import num_elements
from fastrm.model.stock_classes import padding_note
from fastrm.stopping_config import ACCURACY
from fastrm.storage import write_whole
from fastrm.tables import Table
from fastrm.train.checkpoint import CHECKPOINTS, verify
from fastrm.train.metrics import read_rows, statistics_of_step
from fastrm.train.run import Run
from fastrm.train.setup import Job, export_model
from fastrm.ui import gib, new_figure, print_table

MOST_SOURCES = 8  # in report.png, the largest ones


def announce(run: Run, start: Path | None) -> None:
    """Say what is about to be trained, how, and from which checkpoint; write config.yaml."""
    if run.ranks.is_first:
        write_whole(run.folder / "config.yaml", run.config.to_yaml())
    for line in _opening_lines(run.job, run.ranks.num_ranks, run.quarantine.total):
        run.display.say(line)
    run.display.say(f"run: {run.num_steps:,} steps of {run.order.batch_pairs:,} {_noun(run.config)} in {run.folder}")
    if start is not None:
        run.display.say(f"resumed from {start}")


def _opening_lines(job: Job, num_ranks: int, num_quarantined: int) -> Iterator[str]:
    """Yield lines on the model, on each decision about how it computes, and on the training data."""
    network, config, train = job.network, job.config, job.train
    # If weights are divided over ranks, this one holds a part.
    sizes = [(getattr(p, "ds_numel", num_elements(p)), p.requires_grad) for p in network.parameters()]
    parameters, trainable = sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)
    yield f"model: {parameters:,} parameters, {trainable:,} trained, on {network.device}"
    if (line := describe_unknown_keys(network.model.config)) is not None:
        yield line
    if num_ranks > 1:
        yield f"ranks: {num_ranks}, DeepSpeed ZeRO stage {config.engine.zero_stage}"
    for part, (choice, why) in (("attention", network.attention), ("head and loss", network.head_kernels)):
        yield f"{part}: {choice} ({why})"
    if network.paradigm != "reward":
        how = "Liger's kernel" if network.lm_kernels == "triton" else "PyTorch, in chunks"
        yield f"loss of what is written: {how} (kernels: {config.kernels})"
    yield f"norm and SwiGLU: {network.norm_and_gate}"
    if network.fp8:
        yield from network.fp8.lines(config.compile == "layers")
    if (line := padding_note(network)) is not None:
        yield line
    yield (
        f"data: {len(train.groups):,} groups with {train.num_preferences:,} {_noun(config)} from "
        f"{train.num_records:,} records; {train.num_ties_ignored:,} ties ignored; "
        f"{num_quarantined:,} records in quarantine"
    )


def _noun(config: Config) -> str:
    """Return what a step is made of: preferences, or a judge's texts, of which there may be two of each."""
    return "texts" if config.paradigm == "judge" else "preferences"


def progress_note(row: dict, device: torch.device) -> str:
    """Return what is shown during the run: the part of a row of metrics.jsonl that matters, and the peak of memory."""
    if row["loss"] is None:
        return "no step was finite"
    is_of_pairs = "rewards/accuracies" in row
    accuracy, unit = (f"acc {row['rewards/accuracies']:.3f}  ", "pairs") if is_of_pairs else ("", "preferences")
    return (
        f"loss {row['loss']:.4f}  {accuracy}{row['preferences_per_second']:,.3g} {unit}/s"
        f"  {row['tokens_per_second']:,.0f} tok/s  wait {row['data_wait_share']:.0%}  "
        f"{gib(peak_memory_bytes(device))} GiB"
    )


def stopping_note(run: Run) -> str:
    """Return a line that says why the run stopped before its last step."""
    progress, stopping = run.progress, run.config.run.early_stopping
    by = f" by more than {stopping.min_delta:g}" * (stopping.min_delta > 0)
    return (
        f"stopped early after step {progress.step:,} of {run.num_steps:,}: {stopping.metric} has not improved{by} in "
        f"{progress.evaluations_since:,} evaluations; the best, {progress.best_value:.4f}, was at step "
        f"{progress.best_step:,}"
    )


def finish(run: Run, flips: Flips | None) -> dict:
    """Export the model, write the report, and return the content of summary.json; called on all ranks.

    Args:
        flips: of FP8 against bf16.

    Raises:
        InterruptedRun: if a rank was asked to stop.
        StorageError, DataError: as `export_model`.
    """
    run.leave_if_stopped()
    chosen = _chosen_checkpoint(run)
    step = run.progress.step if chosen is None else run.progress.best_step
    run.job.network.reward_statistics = statistics_of_step(run.folder, step)
    with run.breakable():
        export_model(run.engine, run.folder / "model", run.ranks, chosen)
    summary = _summary(run, flips)
    if run.ranks.is_first:
        write_report(run.folder, summary)
        print_table(run.display.console, summary_table(summary, summary["eval_by_source"]))
        for line in (*run.quarantine.reasons(), f"model, report.html, report.png and summary.json are in {run.folder}"):
            run.display.say(line)
    return summary


def _chosen_checkpoint(run: Run) -> Path | None:
    """Return the checkpoint that is exported: with run.export best the best one; None for the weights of the end."""
    progress = run.progress
    if run.config.run.export == "last" or progress.best_step == progress.step:
        return None
    best = run.folder / CHECKPOINTS / progress.best_checkpoint
    if (problem := run.ranks.on_first(lambda: verify(best))) is not None:
        run.checkpoints.save(progress)  # no step is lost
        raise StorageError(
            f"{best}: the best checkpoint, which run.export: best exports, is not intact: {problem}; restore it and "
            "add --resume auto, or set run.export=last"
        )
    return best


def _summary(run: Run, flips: Flips | None) -> dict:
    progress, network = run.progress, run.job.network
    last = progress.last_eval
    figure = next(name for name in ("accuracy", "mse", "loss") if not last or f"eval/{name}" in last)
    return {
        "eval_accuracy": last.get("eval/accuracy"),
        "eval_loss": last.get("eval/loss"),
        **{f"eval_{name}": last[key] for name in FIGURES if (key := f"eval/{name}") in last},
        "steps": progress.step,
        "preferences": progress.preferences,
        "tokens_processed": progress.tokens_processed,
        "tokens_unshared": progress.tokens_unshared,
        "train_seconds": progress.train_seconds,
        "preferences_per_second": progress.preferences / max(progress.train_seconds, 1e-9),
        "num_processes": run.ranks.num_ranks,
        "peak_memory_bytes": max(run.ranks.gather(peak_memory_bytes(network.device))),
        "quarantined": run.quarantine.total,
        "eval_by_source": last.get("eval/sources", {}),
        "eval_by_set": {name: last[f"eval/{name}/{figure}"] for name in run.config.data.eval_names},
        "fp8_flip_rate": flips.rate if flips else None,
        "compiled_graphs": None if network.graphs is None else network.graphs.count,
        "best_checkpoint": progress.best_checkpoint,
        "best_accuracy": progress.best_accuracy,
        "best_metric": run.config.run.best_metric(last),
        "best_value": progress.best_value,
        "exported_step": progress.step if run.config.run.export == "last" else progress.best_step,
        "stopped_early": progress.is_stopped_early(run.config.run),
        "versions": versions(),
        "hardware": hardware(network.device),
    }


def write_report(run_dir: Path, summary: dict) -> None:
    """Write summary.json, and report.png of the rows of metrics.jsonl that have a finite loss."""
    write_whole(run_dir / "summary.json", to_json(summary, indent=2) + "\n")
    rows = read_rows(run_dir / "metrics.jsonl")
    draw_curves(
        [row for row in rows if row.get("loss") is not None],
        [row for row in rows if row.get("eval/loss") is not None],
        run_dir / "report.png",
        f"{run_dir.name}: {summary['steps']:,} steps, {summary['preferences']:,} preferences",
    )


def draw_curves(rows: list[dict], evaluations: list[dict], path: Path, title: str) -> None:
    """Draw report.png: loss, accuracy, margin and throughput over the steps, and held-out accuracies by set and source.

    Of ratings it shows correlations with them, of a critic the parts of its loss.

    Args:
        rows: of metrics.jsonl with a `loss`.
        evaluations: rows with `eval/loss`.
    """
    parts, panels = accuracies(evaluations), _panels(rows, evaluations)
    num_rows = max(2, -(-len(panels) // 2)) + bool(parts)
    figure = new_figure(11, 3.5 * num_rows)
    figure.suptitle(title)
    grid = figure.add_gridspec(num_rows, 2)
    for number, (name, label, evaluated) in enumerate(panels):
        axes = figure.add_subplot(grid[number // 2, number % 2])
        if drawn := [row for row in rows if name in row]:
            steps, values = [row["step"] for row in drawn], [row[name] for row in drawn]
            axes.plot(steps, values, color="#9bb8d9", linewidth=0.8, label="each row")
            axes.plot(steps, smooth(values), color="#1f5fa8", linewidth=1.8, label="running mean")
        held_out = [(row["step"], row[evaluated]) for row in evaluations if row.get(evaluated) is not None]
        if held_out:
            axes.plot(*zip(*held_out, strict=True), "o-", color="#d1662a", markersize=4, label="held out")
        if name == "rewards/accuracies":
            axes.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
            axes.set_ylim(top=1.01)
        if name == "preferences_per_second":
            axes.set_ylim(bottom=0)
        axes.set_title(label, fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    if parts:
        _draw_parts(parts, *figure.add_subfigure(grid[-1, :]).subplots(1, 2, width_ratios=(3, 1)))
    figure.savefig(path, dpi=110)


def _panels(rows: list[dict], evaluations: list[dict]) -> list[tuple[str, str, str | None]]:
    """Return (name in rows, title, name in evaluations) of what a run has, for `draw_curves`."""
    panels = [
        ("loss", "Loss (the objective, as the loss section sets it)", "eval/loss"),
        ("rewards/accuracies", "Pair accuracy", "eval/accuracy"),
        ("rewards/margins", "Margin (chosen - rejected reward)", "eval/margin"),
        ("preference_loss", "Loss of preferences", "eval/preference_loss"),
        ("critique_loss", "Loss of critiques, times critic.lm_weight", "eval/critique_loss"),
        ("preferences_per_second", "Preferences per second", None),
    ]
    if any("eval/mse" in row for row in evaluations):
        panels[1:3] = [(f"eval/{name}", f"{FIGURES[name]} with ratings", f"eval/{name}") for name in FIGURES][1:]
    return [panel for panel in panels if any(name in row for row in rows + evaluations for name in panel)]


def accuracies(evaluations: list[dict]) -> dict[str, list[tuple[int, float]]]:
    """Return (step, accuracy) at each of several evaluations, by named set and by source, the largest of them."""
    points, evaluations = defaultdict(list), [row for row in evaluations if "eval/accuracy" in row]
    for row in evaluations if len(evaluations) > 1 else ():
        sets = {key.split("/")[1]: row[key] for key in row if key.count("/") == 2 and key.endswith("/accuracy")}
        sources = sorted(row.get("eval/sources", {}).items(), key=lambda item: -item[1]["preferences"])[:MOST_SOURCES]
        found = {f"set {name}": value for name, value in sets.items()}
        found |= {name: figures["accuracy"] for name, figures in sources if len(sources) > 1}
        for name, value in found.items():
            points[name].append((row["step"], value))
    return points


def _draw_parts(parts: dict[str, list[tuple[int, float]]], axes, beside) -> None:
    """Draw the lines of `accuracies` into `axes`, and their names into the axes `beside`."""
    draw_lines(parts, axes)
    axes.set_title("Held-out pair accuracy by set and source", fontsize=10)
    axes.set_xlabel("step")
    axes.grid(alpha=0.25)
    beside.axis("off")
    beside.legend(*axes.get_legend_handles_labels(), fontsize=8, loc="center left")


def draw_lines(parts: dict[str, list[tuple[int, float]]], axes) -> None:
    """Draw the lines of `accuracies`, those of named sets broader than those of sources."""
    for name, points in parts.items():
        width = 2.0 if name.startswith("set ") else 1.0
        axes.plot(*zip(*points, strict=True), "o-", markersize=1.5 + width, linewidth=width, label=name)


def smooth(values: list[float], share: float = 0.05) -> list[float]:
    """Return the exponential running mean, started at the first value, over about `share` of the run."""
    decay = 1.0 - 1.0 / max(1.0, share * len(values))
    smooth, mean = [], None
    for value in values:
        mean = value if mean is None else decay * mean + (1.0 - decay) * value
        smooth.append(mean)
    return smooth


def summary_table(summary: dict, by_source: dict[str, dict]) -> Table:
    """Return the short table at the end of a run."""
    table = Table("", "", title="Training done")
    accuracy = summary["eval_accuracy"]
    if "eval_mse" in summary:
        for name, text in FIGURES.items():
            table.add_row(f"held-out {text}", shown(summary[f"eval_{name}"]))
            for source, values in by_source.items() if len(by_source) > 1 else ():
                table.add_row(f"  {source} ({values['ratings']:,})", shown(values[name]))
    elif accuracy is None and summary["eval_loss"] is not None:
        table.add_row("held-out loss", f"{summary['eval_loss']:.4f}")
    else:
        table.add_row("held-out pair accuracy", "no data.eval" if accuracy is None else f"{accuracy:.4f}")
        for name, value in summary["eval_by_set"].items():
            table.add_row(f"  set {name}", f"{value:.4f}")
    if len(by_source) > 1 and accuracy is not None:
        for source, values in by_source.items():
            table.add_row(f"  {source} ({values['preferences']:,})", f"{values['accuracy']:.4f}")
    if summary["best_checkpoint"] is not None:
        best_step = int(summary["best_checkpoint"].removeprefix("step-"))
        metric = summary["best_metric"]
        by = "" if metric == ACCURACY else f", by {metric}"
        table.add_row(f"best at an evaluation{by}", f"{summary['best_value']:.4f} (step {best_step:,})")
    if summary["exported_step"] != summary["steps"]:
        table.add_row("model/ has the weights of", f"step {summary['exported_step']:,}")
    table.add_row("steps", f"{summary['steps']:,}{', stopped early' * summary['stopped_early']}")
    table.add_row("preferences", f"{summary['preferences']:,}")
    table.add_row("preferences per second", f"{summary['preferences_per_second']:,.1f}")
    table.add_row("tokens processed", f"{summary['tokens_processed']:,}")
    sharing = summary["tokens_unshared"] / max(1, summary["tokens_processed"])
    table.add_row("tokens a pairwise trainer needs", f"{summary['tokens_unshared']:,} ({sharing:.2f}x)")
    if summary["compiled_graphs"] is not None:
        table.add_row("graphs compiled", f"{summary['compiled_graphs']:,}")
    table.add_row("peak memory", f"{summary['peak_memory_bytes'] / 2**20:,.0f} MiB")
    table.add_row("records in quarantine", f"{summary['quarantined']:,}")
    return table


def peak_memory_bytes(device: torch.device) -> int:
    """Return this process's peak of allocated CUDA memory, or of resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def hardware(device: torch.device) -> dict[str, str]:
    """Return what the run computes with, in words."""
    import psutil

    found = {"processor": "unknown", "cores": f"{len(os.sched_getaffinity(0)):,}"}
    with suppress(OSError, StopIteration), open("/proc/cpuinfo") as lines:
        found["processor"] = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    found["host memory"] = f"{gib(psutil.virtual_memory().total)} GiB"
    if device.type == "cuda":
        found["GPU"] = torch.cuda.get_device_name(device)
        found["GPU memory"] = f"{gib(torch.cuda.get_device_properties(device).total_memory)} GiB"
    return found


def versions() -> dict[str, str]:
    """Return the versions that decide a run's figures, as the modules themselves give them.

    Versions of the installed distributions would not do: a source tree that was never installed has none, and torch's
    leaves out its build (2.11.0 for 2.11.0+cu130).
    """
    modules = {name: name for name in ("fastrm", "torch", "transformers", "tokenizers", "numpy")} | {"pillow": "PIL"}
    found = {name: importlib.import_module(module).__version__ for name, module in modules.items()}
    return {"python": sys.version.split()[0], **found}

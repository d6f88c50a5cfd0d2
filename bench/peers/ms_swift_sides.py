"""One training run of either trainer in a process of its own, with its losses, seconds and peak memory."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

from bench import ROOT
from bench.peers.ms_swift_inputs import Workload

HERE = Path(__file__).resolve().parent
LEARNING_RATE = 1e-6


@dataclass(frozen=True)
class Run:
    """The results of one process.

    Attributes:
        losses, grad_norms, seconds: of each step; the seconds of reading the data count.
        peak_bytes: most resident memory of the process, from its start to its end.
        trained: parameters with a gradient.
        tokens: that the language model computes in a step, padding included.
    """

    losses: list[float]
    grad_norms: list[float]
    seconds: list[float]
    peak_bytes: int
    trained: int
    tokens: int


class RunFailed(Exception):
    """A trainer's process failed; the text ends with the last lines of its log."""


def run_fastrm(inputs: Path, workload: Workload, steps: int, checkpointing: str, folder: Path) -> Run:
    """Run `fastrm train` on the workload.

    Raises:
        RunFailed: if it fails.
    """
    folder.mkdir(parents=True)
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(fastrm_config(inputs, workload, steps, checkpointing, folder / "run")))
    peak = _run([sys.executable, "-m", "fastrm.cli", "train", str(config)], folder, {})
    return read_fastrm(folder / "run", peak)


def fastrm_config(inputs: Path, workload: Workload, steps: int, checkpointing: str, run_dir: Path) -> dict:
    """Return a configuration of fastrm as a tree: float32, everything trained, one pack a step."""
    return {
        "run": {"dir": str(run_dir), "max_steps": steps, "log_every": 1},
        "data": {"train": [{"path": str(inputs / f"{workload.name}.jsonl")}], "num_workers": 0},
        "model": {
            "path": str(inputs / "model"), "head": {"layers": 1, "bias": False}, "fuse_projections": True,
            "activation_checkpointing": checkpointing,
        },
        "optim": {
            "lr": LEARNING_RATE, "schedule": "constant", "warmup_ratio": 0.0, "weight_decay": 0.0,
            "max_grad_norm": 1.0, "batch_pairs": workload.pairs,
        },
        "precision": {"dtype": "fp32"},
    }  # fmt: skip


def read_fastrm(run_dir: Path, peak_bytes: int) -> Run:
    """Read a run folder of fastrm as a `Run`."""
    rows = _read_lines(run_dir / "metrics.jsonl")
    summary = json.loads((run_dir / "summary.json").read_text())
    # A step's preferences over its preferences per second: the time from the end of a step to the end of the next.
    pairs = summary["preferences"] / len(rows)
    losses, norms, speeds = ([row[name] for row in rows] for name in ("loss", "grad_norm", "preferences_per_second"))
    return Run(
        losses, norms, [pairs / speed for speed in speeds], peak_bytes,
        trained=_trained(run_dir.parent / "log.txt"), tokens=summary["tokens_processed"] // len(rows),
    )  # fmt: skip


def _trained(log: Path) -> int:
    """Return the second number of the line `model: 33,554,432 parameters, 33,554,432 trained, on cpu`."""
    line = next(line for line in log.read_text().splitlines() if line.startswith("model: "))
    return int(line.split(" trained")[0].split()[-1].replace(",", ""))


def run_swift(python: Path, inputs: Path, workload: Workload, steps: int, checkpointing: str, folder: Path) -> Run:
    """Run ms-swift's `rlhf --rlhf_type rm` on the workload.

    Args:
        python: of its environment.

    Raises:
        RunFailed: if it fails.
    """
    from fastrm.data.tokenizer import load_tokenizer, special_id

    record = folder / "record"
    record.mkdir(parents=True)
    image_pad = special_id(load_tokenizer(str(inputs / "model")), "<|image_pad|>")
    extra = {"RECORD": str(record), "IMAGE_PAD": str(image_pad), "PYTHONPATH": str(HERE / "ms_swift_site")}
    command = [str(python), "-m", "swift.cli.rlhf", *swift_arguments(inputs, workload, steps, checkpointing, folder)]
    return read_swift(record, _run(command, folder, extra))


def swift_arguments(inputs: Path, workload: Workload, steps: int, checkpointing: str, folder: Path) -> list[str]:
    """Return the command line of ms-swift that asks the same of it as `fastrm_config` of fastrm."""
    recompute = "true" if checkpointing == "full" else "false"
    options = {
        "rlhf_type": "rm", "model": inputs / "model", "model_type": "qwen2_5_vl", "template": "qwen2_5_vl",
        "tuner_type": "full", "freeze_vit": "false", "freeze_aligner": "false", "torch_dtype": "float32",
        "attn_impl": "sdpa", "gradient_checkpointing": recompute, "vit_gradient_checkpointing": recompute,
        "dataset": inputs / f"{workload.name}.jsonl", "split_dataset_ratio": 0, "dataset_shuffle": "false",
        "train_dataloader_shuffle": "false", "dataloader_num_workers": 0, "max_length": 32_768,
        "per_device_train_batch_size": workload.pairs, "gradient_accumulation_steps": 1, "max_steps": steps,
        "learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant", "warmup_ratio": 0, "weight_decay": 0,
        "adam_beta2": 0.999, "max_grad_norm": 1.0, "logging_steps": 1, "save_strategy": "no", "eval_strategy": "no",
        "report_to": "none", "output_dir": folder / "output", "check_model": "false", "max_pixels": 12_845_056,
        "external_plugins": HERE / "ms_swift_site" / "recorder.py", "callbacks": "recorder",
    }  # fmt: skip
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def read_swift(record: Path, peak_bytes: int) -> Run:
    """Read what the plugin wrote as a `Run`."""
    rows = _read_lines(record / "steps.jsonl")
    facts = json.loads((record / "facts.json").read_text())
    losses, norms, seconds = ([row[name] for row in rows] for name in ("loss", "grad_norm", "seconds"))
    return Run(losses, norms, seconds, peak_bytes, facts["trained"], facts["tokens"])


def _read_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def _run(command: list[str], folder: Path, extra: dict[str, str]) -> int:
    """Run a command to its end with the output in folder/log.txt; return its peak resident memory in bytes."""
    log = folder / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **extra}, stdout=output, stderr=subprocess.STDOUT
        )
        # The kernel's own count for this one process, VmHWM at its end. Linux counts in KiB.
        _, status, usage = os.wait4(process.pid, 0)
    if code := os.waitstatus_to_exitcode(status):
        lines = "\n".join(log.read_text().splitlines()[-15:])
        raise RunFailed(f"{' '.join(command[:4])} ...: exit status {code}; {log} ends with\n{lines}")
    return usage.ru_maxrss * 1024

"""The stages of a GPU day, in the order of their worth, and the same in small for a rehearsal on a CPU."""

import sys
from dataclasses import replace
from pathlib import Path

from bench import ROOT
from bench.gpu.runner import Stage
from bench.training.results import GROUPS, PAIRS

PYTHON = sys.executable
# 24 steps of the quick start, with all that a run does besides. Three heads of the tower: 32 numbers each, which
# the Triton kernels take.
SHORT_RUN = (
    "model.init.vision_config.num_heads=3", "data.num_workers=2", "run.max_steps=24", "run.eval_every=12",
    "run.save_every=12",
)  # fmt: skip
EVERYTHING = (
    "precision.dtype=bf16", "precision.weights=bf16", "optim.states=8bit", "compile=layers", "kernels=triton",
    "model.fuse_projections=true", "model.activation_checkpointing=selective",
)  # fmt: skip


def bench(script: str, *arguments: str) -> tuple[str, ...]:
    """Return the command of a script of this folder."""
    return (PYTHON, f"bench/{script}", *arguments)


def train(*settings: str) -> tuple[str, ...]:
    """Return the command of the quick start with other settings."""
    return (PYTHON, "-m", "fastrm.cli", "train", "configs/quickstart.yaml", "run.dir={out}/run", *settings)


def training(model: str, *arguments: str) -> tuple[str, ...]:
    """Return the command of the training-step benchmark."""
    options = ("--model", model, "--budget-seconds", "{budget}", "--out", "{out}")
    return bench("training/run_training.py", *options, *arguments)


def kernels(*arguments: str) -> tuple[str, ...]:
    """Return the command of the kernel benchmarks."""
    return bench("kernels/run_kernels.py", "--budget-seconds", "{budget}", "--out", "{out}", *arguments)


def gpu_tests() -> list[str]:
    """Test files with tests that need a GPU."""
    files = sorted(file for folder in ("tests", "kernels/tests") for file in (ROOT / folder).rglob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if "mark.gpu" in file.read_text(encoding="utf-8")]


def stages(wheels: Path | None) -> list[list[Stage]]:
    """Return groups that run one after another. The stages of a group run side by side: nothing is timed there.

    Args:
        wheels: folder of what was carried along; None where all packages are installed.
    """
    return [*([[_unpack(wheels)]] if wheels else []), *_correctness(), *_main_figures(), *_by_worth()]


def _unpack(wheels: Path) -> Stage:
    command = bench("gpu/carry.py", "--unpack", str(wheels), "--site", "{site}", "--out", "{out}")
    return Stage("unpack", "are the carried packages whole?", command, 40)


def _correctness() -> list[list[Stage]]:
    tests = bench("gpu/run_tests.py", "--out", "{out}", "-n", "12", *gpu_tests())
    facts = bench("gpu/facts.py", "--out", "{out}")
    return [
        [Stage("facts", "which device, versions and rates?", facts, 40, required=True)],
        [
            Stage("tests", "are the kernels right?", tests, 120),
            Stage("train-defaults", "does the quick start run as it is?", train(*SHORT_RUN), 110),
            Stage("train-everything", "does it run with every option on?", train(*SHORT_RUN, *EVERYTHING), 120),
        ],
    ]


def _main_figures() -> list[list[Stage]]:
    found = [
        Stage("kernels-quick", "how fast are the kernels, against FlashAttention?", kernels("--quick"), 75),
        Stage("step-7B", "how fast is a step, what takes its time?", training("7B", "--only", PAIRS), 270, margin=25),
    ]
    return [[stage] for stage in found]


def _by_worth() -> list[list[Stage]]:
    """Return the stages for the time that is left, which a second call may ask for with --only."""
    two = ("--variant", "plain", "--variant", "fastrm")
    update = bench("gpu/update.py", "--model", "7B", "--out", "{out}")
    turns = bench("gpu/turn_loss.py", "--model", "7B", "--out", "{out}")
    memory = bench("gpu/memory.py", "--model", "7B", "--budget-seconds", "{budget}", "--out", "{out}")
    groups, others = training("7B", "--only", GROUPS, *two), training("7B", "--only", "alternatives")
    small, attention = training("3B", "--only", PAIRS, *two), kernels("--only", "attention")
    found = [
        Stage("update", "how is the 8-bit update compiled best?", update, 45),
        Stage("groups-7B", "what do groups of four gain?", groups, 110, margin=20, least=90),
        Stage("alternatives-7B", "which FP8 recipe and attention are best?", others, 200, margin=20, least=75),
        Stage("memory", "do sizes fit that the plan says fit?", memory, 90, least=45),
        Stage("turn-loss", "does Liger compute what critics write faster?", turns, 45),
        Stage("step-3B", "how fast is a step of the 3B?", small, 100, margin=20, least=70),
        Stage("kernels-attention", "how fast is attention at all lengths?", attention, 240, least=40),
    ]
    return [[stage] for stage in found]


_PATIENCE = 600  # the limit in seconds of a rehearsed stage: a CPU may be slow, and busy with other work
# Stages that fail, each in another way, between the others of a rehearsal.
HANG = "import subprocess, time; subprocess.Popen(['sleep', '600'], start_new_session=True); time.sleep(600)"
MEMORY = (
    "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30)); "
    "kept = [bytearray(1 << 26) for _ in range(64)]"
)
DEATH = (
    "import os, pathlib, signal, sys; pathlib.Path(sys.argv[1], 'before.json').write_text('[1]'); "
    "pathlib.Path(sys.argv[1], 'torn.json').write_text('[1,'); os.kill(os.getpid(), signal.SIGKILL)"
)
GARBAGE = "import os, sys; [sys.stdout.buffer.write(os.urandom(4096)) for _ in range(512)]"
FLOOD = "import sys\nwhile True: sys.stdout.write('x' * 65536)"


def faulty_stages() -> list[list[Stage]]:
    """Return stages that fail, each in another way: alone, and two side by side."""

    def fault(name: str, code: str, limit: float = 20) -> Stage:
        return Stage(f"fault-{name}", "a rehearsed fault", (PYTHON, "-c", code, "{out}"), limit)

    return [
        [fault("hang", HANG, 3), fault("memory", MEMORY)], [fault("death", DEATH), fault("garbage", GARBAGE)],
        [fault("flood", FLOOD)],
    ]  # fmt: skip


def rehearsal(wheels: Path | None) -> list[list[Stage]]:
    """Return the stages for a CPU: tiny models, emulated GPU operators, and faults between them."""
    groups = [[_small(stage) for stage in group] for group in stages(wheels)]
    faults = faulty_stages()
    return [*groups[:2], *faults, *groups[2:]]


def _small(stage: Stage) -> Stage:
    if stage.name == "unpack":
        return stage
    if stage.name == "tests":
        files = ["kernels/tests/test_tree_attention.py"]
        command = bench("gpu/run_tests.py", "--out", "{out}", "-n", "2", "-m", "not gpu", *files)
        return replace(stage, command=command, limit=_PATIENCE)
    python, script, *arguments = stage.command
    if stage.name.startswith("train-"):
        # The last of two settings counts. Small packs, for dense attention.
        arguments += ["run.max_steps=2", "run.eval_every=2", "run.save_every=2", "optim.tokens_per_pack=2048"]
    if stage.name == "facts":
        arguments.append("--cpu")
    environment = {"TRITON_INTERPRET": "1", "DS_ACCELERATOR": "cpu"}
    return replace(
        stage, command=(python, "bench/gpu/rehearsal.py", script, *arguments), environment=environment,
        limit=_PATIENCE, least=20,
    )  # fmt: skip

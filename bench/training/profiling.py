"""The parts of a training step's time: its phases, and the operations that take longest."""

from collections import defaultdict
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from bench.harness.timing import Stopwatch, synchronize
from bench.training.variants import TrainingStep

LONGEST = 12  # operations that are named; the rest is one row
# Kinds of kernels and operators, by what their names contain; the first that matches counts.
KINDS = {
    "attention": ("tree_attention", "flash", "fmha", "attention", "attn"),
    "head and loss": ("head_fwd", "head_bwd", "head_finish", "head_sum", "preference_loss"),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitk", "aten::mm", "aten::addmm", "aten::bmm"),
    "copies": ("memcpy", "memset"),
}
OTHER = "elementwise, norms, update and the rest"


def profile_step(step: TrainingStep) -> dict:
    """Time the phases of one step by the clock, and the operations of another by torch's profiler.

    Returns:
        phases: seconds of vision (forward, by itself), forward (vision included), backward and update.
        and what `profile_operations` gives.
    """
    return {"phases": _phases(step), **profile_operations(lambda: step.step(0))}


def profile_operations(action: Callable[[], None]) -> dict:
    """Profile the operations of one call with torch's profiler.

    Returns:
        operations: [name, calls, seconds, share of the profiled time], longest first: kernels on a GPU,
            operators by their own time on a CPU.
        shares: of the profiled time, by kind of operation.
    """
    on_gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
        action()
        synchronize()
    seconds: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for event in found.key_averages():
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if microseconds > 0:
            seconds[event.key] += microseconds / 1e6
            calls[event.key] += event.count
    total = sum(seconds.values())
    names = sorted(seconds, key=seconds.__getitem__, reverse=True)
    rows = [[name, calls[name], seconds[name], seconds[name] / total] for name in names[:LONGEST]]
    if rest := names[LONGEST:]:
        spent = sum(seconds[name] for name in rest)
        rows.append([f"{len(rest)} others", sum(calls[name] for name in rest), spent, spent / total])
    return {"operations": rows, "shares": shares_by_kind(seconds)}


def shares_by_kind(seconds: dict[str, float]) -> dict[str, float]:
    """Return the share of the time that each of KINDS, and the rest, takes.

    Args:
        seconds: by the operation's name.
    """
    found = dict.fromkeys([*KINDS, OTHER], 0.0)
    for name, value in seconds.items():
        lower = name.lower()
        kind = next((kind for kind, parts in KINDS.items() if any(part in lower for part in parts)), OTHER)
        found[kind] += value
    total = sum(found.values()) or 1.0
    return {kind: value / total for kind, value in found.items()}


def _phases(step: TrainingStep) -> dict[str, float]:
    """Return the seconds of each phase; they wait for the device between them, which a step does not do."""
    engine, pack, found = step.engine, step.pack, {}

    def timed(name: str, action):
        with Stopwatch() as watch:
            result = action()
        found[name] = watch.wall
        return result

    if not step.variant.plain:
        # Gradients are on, as in a step: without them, compiled layers would be compiled once more.
        with torch.autocast(engine.network.device.type, torch.bfloat16, _is_half(step)):
            timed("vision", lambda: engine.network._runner.media_features(pack.pixel_values, pack.layouts.vision))
    loss, _ = timed("forward", lambda: engine.loss_and_rewards(pack))
    timed("backward", loss.backward)
    engine.discard()
    # Only the update is timed, so that its gradient is made again before.
    engine.accumulate(pack)
    timed("update", step.update)
    return found


def _is_half(step: TrainingStep) -> bool:
    return step.engine.config.precision.dtype == "bf16"

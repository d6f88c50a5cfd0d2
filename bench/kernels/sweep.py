"""Try other block sizes of the Triton kernels, for a machine that is there for a short time.

One kernel at a time: its blocks are independent of those of the others, so the number of trials is a sum
and not a product. Workers compile ahead into Triton's disk cache, which takes most of the time; then each
trial is timed alone. A trial that does not compile or does not fit is printed as such.
"""

import itertools
import multiprocessing
import os
import statistics
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from unittest import mock

import torch

from bench.harness.gate import DeviceLost, attempt
from bench.harness.timing import Budget
from bench.kernels.attention import Pack
from bench.kernels.head import Inputs, fused, num_sets, step
from bench.kernels.measurement import Candidate, captured, one_pass
from bench.kernels.results import ATTENTION, HEAD
from bench.kernels.shapes import AttentionShape, HeadShape, attention_shapes, head_shapes
from bench.kernels.tables import duration
from fastrm_kernels.tree_attention import tiles

REPEATS = 15
SHOWN = 5  # best trials of each kernel and shape
ATTENTION_SWEPT = ("1300/150 N=8 28/4", "1300/300 N=2 28/4", "4100/300 N=8 16/2", "vision windows 16/16")
HEAD_SWEPT = ("D=3584 R=8 bf16", "D=3584 R=64 bf16", "D=3584 R=256 bf16", "D=3584 R=8 fp32")
COMPILE_SHARE = 0.5  # the largest share of the time that compiling ahead may take


@dataclass(frozen=True)
class Trial:
    """One choice of blocks for one kernel; no changes is the present choice.

    Attributes:
        kernel: forward, query or key_value for attention; forward or backward for the head.
        changes: (name, value) of what differs from the present choice.
    """

    op: str
    kernel: str
    shape: AttentionShape | HeadShape
    changes: tuple[tuple[str, int], ...] = ()

    @property
    def text(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.changes) or "as it is"


def attention_trials(shape: AttentionShape) -> list[Trial]:
    """Return trials with tiles 64 and 128, steps 32 to 128, 4 and 8 warps, two to four steps in flight."""
    names = {
        "forward": ("query_tile", "key_step", "query_warps", "fwd_stages"),
        "query": ("query_tile", "key_step", "query_warps", "query_stages"),
        "key_value": ("key_tile", "query_step", "key_warps", "key_stages"),
    }
    values = list(itertools.product((128, 64), (64, 32, 128), (8, 4), (5, 2, 8)))
    return _trials(ATTENTION, shape, {kernel: [tuple(zip(fields, v, strict=True)) for v in values]
                                      for kernel, fields in names.items()})  # fmt: skip


def head_trials(shape: HeadShape) -> list[Trial]:
    fields = ("BLOCK_F", "BLOCK_D", "num_warps", "num_stages")
    pipelines = ((4, 3), (4, 5), (4, 8), (8, 4))
    choices = {"forward": ((16, 32, 64), (64, 128, 256)), "backward": ((32, 64, 128), (16, 32, 64))}
    return _trials(HEAD, shape, {
        kernel: [tuple(zip(fields, (f, d, *rest), strict=True))
                 for f, d, rest in itertools.product(features, widths, pipelines)]
        for kernel, (features, widths) in choices.items()
    })  # fmt: skip


def _trials(op, shape, choices) -> list[Trial]:
    return [Trial(op, kernel, shape, changes) for kernel, found in choices.items() for changes in ((), *found)]


def prepare(trial: Trial) -> tuple[Callable[[], object], Callable[[], list[torch.Tensor]], int]:
    """Compile the kernel; return (a function to time, its results, operations in one call)."""
    torch.manual_seed(0)
    return (_prepare_attention if trial.op == ATTENTION else _prepare_head)(trial)


def _prepare_attention(trial: Trial):
    from fastrm_kernels.tree_attention.triton_backward import (
        launch_tree_attention_bwd_key_value,
        launch_tree_attention_bwd_query,
    )
    from fastrm_kernels.tree_attention.triton_forward import launch_tree_attention_fwd

    shape = trial.shape
    pack = _pack(shape)
    query, key, value = (leaf.detach() for leaf in pack.leaves)
    base = tiles.pick_blocks(query.dtype, shape.head_dim, False)
    output, query_grad = (torch.empty_like(query) for _ in range(2))
    num_parts = tiles.work_lists(pack.layout, base, shape.causal).key_tiles.parts_wanted(
        key.shape[1], shape.heads // key.shape[1]
    )
    dtype = query.dtype if num_parts == 1 else torch.float32
    key_grad, value_grad = (torch.empty((num_parts, *x.shape), dtype=dtype, device=x.device) for x in (key, value))
    lse = query.new_empty((shape.heads, shape.num_tokens), dtype=torch.float32)
    row_stats = lse.new_empty((*lse.shape, 2))

    def run(kernel, blocks):
        settings = tiles.work_lists(pack.layout, blocks, shape.causal), blocks, shape.head_dim**-0.5
        if kernel == "forward":
            launch_tree_attention_fwd(query, key, value, output, lse, *settings)
        elif kernel == "query":
            launch_tree_attention_bwd_query(
                query, key, value, output, pack.upstream, lse, row_stats, query_grad, *settings
            )
        else:
            launch_tree_attention_bwd_key_value(
                query, key, value, pack.upstream, row_stats, key_grad, value_grad, *settings
            )

    results = {"forward": [output, lse], "query": [query_grad, row_stats], "key_value": [key_grad, value_grad]}
    for kernel in results:
        # The kernels before the one on trial run as they are now, to make its inputs.
        if kernel == trial.kernel:
            break
        run(kernel, base)
    chosen = partial(run, trial.kernel, replace(base, **dict(trial.changes)))
    chosen()
    return chosen, lambda: results[trial.kernel], 1


_packs: dict[str, Pack] = {}


def _pack(shape: AttentionShape) -> Pack:
    """Return the pack of a shape, the same for all its trials; only one is in memory at a time."""
    if shape.name not in _packs:
        _packs.clear()
        _packs[shape.name] = Pack.draw(shape, "cuda")
    return _packs[shape.name]


def _prepare_head(trial: Trial):
    from fastrm_kernels.preference_head import triton_backward, triton_forward

    module, name = {
        "forward": (triton_forward, "forward_blocks"), "backward": (triton_backward, "backward_blocks"),
    }[trial.kernel]  # fmt: skip
    base = getattr(module, name)
    count = num_sets(trial.shape, torch.cuda.get_device_properties(0).L2_cache_size)
    sets = [Inputs.draw(trial.shape, "cuda") for _ in range(count)]
    changed = mock.patch.object(module, name, lambda *arguments: {**base(*arguments), **dict(trial.changes)})
    with changed:
        replay, outputs = captured(lambda: [step(partial(fused, impl="triton"), inputs) for inputs in sets])
    return replay, lambda: list(outputs[0].values()), count


def measure_trial(trial: Trial, wanted: list[torch.Tensor] | None) -> tuple[float, list[torch.Tensor]]:
    """Return (seconds of one operation, its results).

    Raises:
        ValueError: if the results differ from `wanted` by more than the order of additions explains.
    """
    run, results, steps = prepare(trial)
    candidate = Candidate(trial.text, {"run": run}, steps, queued=True)
    times = [one_pass(candidate, "run", "cuda") for _ in range(REPEATS + 2)][2:]
    found = [x.clone() for x in results()]
    for a, b in zip(found, wanted or found, strict=True):
        # Two roundings of the dtype, or 1e-5, the error of reordered float32 sums.
        limit = max(2 * torch.finfo(a.dtype).eps, 1e-5) * float(b.abs().max())
        if not float((a.double() - b.double()).abs().max()) <= limit:
            raise ValueError("computes something else")
    return statistics.median(times) / steps, found


def _compile(trial: Trial) -> None:
    # A failure here comes again, and is reported, when the trial is timed.
    with suppress(Exception):
        prepare(trial)
        torch.cuda.synchronize()


def compile_ahead(trials: list[Trial], seconds: float) -> None:
    """Fill Triton's disk cache from several processes; what is not there in time compiles later."""
    workers = max(1, min(12, (os.cpu_count() or 2) - 2))
    budget = Budget(seconds)
    # Leaving the block ends the workers: none may use the device while a trial is timed.
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pending = [pool.apply_async(_compile, (trial,)) for trial in trials]
        for result in pending:
            result.wait(max(0.0, budget.left))
        print(f"compiled ahead: {sum(result.ready() for result in pending)} of {len(pending)} trials", flush=True)


def sweep(only: str | None, seconds: float) -> int:
    """Time all trials and print the best of each kernel and shape; return the exit status."""
    if not torch.cuda.is_available():
        print("a sweep needs a GPU: nothing was tried")
        return 1
    budget = Budget(seconds)
    trials = []
    if only != HEAD:
        trials += [t for s in attention_shapes(True) if s.name in ATTENTION_SWEPT for t in attention_trials(s)]
    if only != ATTENTION:
        trials += [t for s in head_shapes(True) if s.name in HEAD_SWEPT for t in head_trials(s)]
    compile_ahead(trials, COMPILE_SHARE * seconds)
    left_out = 0
    for (kernel, name), group in itertools.groupby(trials, lambda t: (f"{t.op} {t.kernel}", t.shape.name)):
        left_out += _sweep_one(f"{kernel}, {name}", list(group), budget)
    print(f"{left_out} of {len(trials)} trials left out for lack of time" if left_out else "all trials were timed")
    return 0


def _sweep_one(title: str, trials: list[Trial], budget: Budget) -> int:
    """Time the trials of one kernel at one shape, the present choice first; return how many were left out."""
    times, reasons, wanted, tried = {}, {}, None, 0
    for trial in trials:
        if budget.left < 1:
            break
        tried += 1
        candidate = Candidate(trial.text, {})
        try:
            result = attempt(candidate, partial(measure_trial, trial, wanted))
        except DeviceLost as error:
            raise SystemExit(f"{title}, {trial.text}: {error}") from error
        if result is None:
            reasons.setdefault(candidate.failed, []).append(trial.text)
            continue
        times[trial.text], found = result
        wanted = found if wanted is None else wanted
    print(f"\n{title}: {len(times)} timed, {tried - len(times)} failed, {len(trials) - tried} left out")
    now = times.get("as it is")
    for text in sorted(times, key=times.get)[:SHOWN]:
        print(f"  {duration(times[text]):>9}  {f'{now / times[text]:.2f}x' if now else '-':>6}  {text}")
    if now:
        print(f"  {duration(now):>9}   1.00x  as it is")
    for reason, texts in reasons.items():
        print(f"  failed, {reason}: {len(texts)} trials, such as {texts[0]}", flush=True)
    return len(trials) - tried

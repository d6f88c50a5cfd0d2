"""The launches of every operation at the sizes of real models, recorded with tensors on the meta device.

`aot.py` compiles them. A label says what sets a launch apart: D and R for the heads, which are as wide as the
model (F = D), K and the numbers of query and key heads for attention.
"""

from itertools import product
from typing import Any

import torch

from fastrm_kernels.compact_adamw import BLOCK, MomentCode
from fastrm_kernels.compact_adamw.triton_update import launch_compact_adamw
from fastrm_kernels.launch import Launch, record_launches
from fastrm_kernels.preference_head.autograd import FUSED_REWARDS
from fastrm_kernels.preference_head.triton_backward import launch_reward_head_bwd
from fastrm_kernels.preference_head.triton_forward import launch_reward_head_fwd
from fastrm_kernels.preference_head.triton_linear import launch_linear_head_bwd, launch_linear_head_fwd
from fastrm_kernels.preference_head.triton_loss import launch_preference_loss
from fastrm_kernels.tree_attention import TreeLayout
from fastrm_kernels.tree_attention.tiles import pick_blocks, work_lists
from fastrm_kernels.tree_attention.triton_backward import (
    launch_tree_attention_bwd_key_value,
    launch_tree_attention_bwd_query,
)
from fastrm_kernels.tree_attention.triton_forward import launch_tree_attention_fwd

WIDTHS, ROWS = (1536, 2048, 3584, 5120), (8, 64, 256)
HEADS, HEAD_DIMENSIONS = ((28, 4), (16, 2), (16, 16)), (64, 80, 96, 128)
# A pack's tokens are rarely a multiple of 16, and Triton compiles another kernel where they are.
NUM_TOKENS = 8191
# Inputs of the heads: dtype, final norm or not, rows gathered before or read through anchors.
# The third is the fastrm trainer, which keeps its head in float32.
HEAD_INPUTS = {
    "bf16 with norm": (torch.bfloat16, True, False),
    "bf16": (torch.bfloat16, False, False),
    "fp32 gathered with norm": (torch.float32, True, True),
    "fp32": (torch.float32, False, False),
}

Label = dict[str, Any]


def production_launches() -> list[tuple[Label, Launch]]:
    """Return (label, launch) of everything that training or scoring launches at the sizes above."""
    found: list[tuple[Label, Launch]] = []

    def record(label, run, *arguments):
        with record_launches() as launches:
            run(*arguments)
        found.extend((label, launch) for launch in launches)

    for inputs, settings in HEAD_INPUTS.items():
        for width, num_rows, training in product(WIDTHS, ROWS, (True, False)):
            label = {"D": width, "R": num_rows, "inputs": inputs, "pass": "training" if training else "scoring"}
            record(label, _two_layers, width, num_rows, training, *settings)
            record(label, _one_layer, width, num_rows, training, *settings)
    _record_attention(record)
    for weights in (torch.bfloat16, torch.float32):
        for states in ("8bit", "fp32"):
            label = {"weights": str(weights).removeprefix("torch."), "states": states}
            record(label, _update, weights, states)
    return found


def _update(weights, states) -> None:
    shape = (2**18, BLOCK) if states == "8bit" else (2**26, 1)
    if states == "8bit":
        code = MomentCode(_meta(256), _meta(1, dtype=torch.int32))
        first, second = ((_meta(*shape, dtype=torch.uint8), _meta(shape[0], 1), code) for _ in range(2))
    else:
        first, second = ((_meta(*shape),) for _ in range(2))
    noise = _meta(*shape, dtype=torch.int16) if weights is torch.bfloat16 else None
    launch_compact_adamw(_meta(*shape, dtype=weights), _meta(*shape), first, second, noise, _meta(7))


def _two_layers(width, num_rows, training, dtype, norm, gathered) -> None:
    """Run a two-layer head, with the loss in its launches where it may, else in a launch of its own.

    Of gathered rows, as the trainer's are, the loss is a sum of length-normalised terms.
    """
    inputs = _rows(dtype, width, num_rows, gathered)
    layers = [_meta(*shape, dtype=dtype) for shape in ((width, width), (width,), (1, width), (1,))]
    norm_weight = _meta(width, dtype=dtype) if norm else None
    edges, num_edges = _meta(num_rows // 2, 2, dtype=torch.int64), num_rows // 2
    lengths = _meta(num_rows, dtype=torch.int64) if gathered else None
    loss = (edges, _meta(num_edges), _meta(num_edges), lengths, 0.0, 0.0, "sum" if gathered else "mean")
    rides_along = training and num_rows <= FUSED_REWARDS
    rewards, *saved, _, slopes = launch_reward_head_fwd(
        *inputs, norm_weight, 1e-6, *layers, "silu", training, loss if rides_along else None
    )
    if not training:
        return
    if not rides_along:
        launch_preference_loss(rewards, *loss)
    upstream = (_meta(), slopes, None) if rides_along else (None, None, _meta(num_rows))
    launch_reward_head_bwd(*upstream, *inputs, norm_weight, *layers, *saved, [True] * 6)


def _one_layer(width, num_rows, training, dtype, norm, gathered) -> None:
    inputs = _rows(dtype, width, num_rows, gathered)
    norm_weight, layer = _meta(width, dtype=dtype) if norm else None, (_meta(1, width, dtype=dtype), None)
    _, *saved = launch_linear_head_fwd(*inputs, norm_weight, 1e-6, *layer, training)
    if training:
        launch_linear_head_bwd(_meta(num_rows), *inputs, norm_weight, *layer, *saved, [True] * 4)


def _rows(dtype, width, num_rows, gathered):
    """Return (hidden, anchors)."""
    if gathered:
        return _meta(num_rows, width, dtype=dtype), None
    return _meta(NUM_TOKENS, width, dtype=dtype), _meta(num_rows, dtype=torch.int64)


def _record_attention(record) -> None:
    trees = TreeLayout.build([1300, 301, 300], [-1, 0, 0], device="meta")
    windows = TreeLayout.from_lengths([64] * 16 + [48, 36], device="meta")
    anchors = trees.at_rows([1600, 1900])
    cases = [(width, heads, "trees", trees, None) for width in HEAD_DIMENSIONS for heads in HEADS]
    cases += [(80, (16, 16), "windows", windows, None), (128, (28, 4), "anchors of trees", anchors, None)]
    # Heads before rows: beyond 2^31 elements a head, Triton makes the strides 64-bit.
    cases += [(128, (28, 4), "64-bit strides", trees, 2**31)]
    for width, (heads, key_heads), name, layout, head_stride in cases:
        # The query heads of a key head are taken by one program together, or by one each.
        for num_parts in sorted({1, heads // key_heads}):
            label = {"K": width, "heads": f"{heads}:{key_heads}", "inputs": "bf16", "layout": name}
            label["query heads"] = "divided" if num_parts > 1 else "together"
            record(label, _attention, heads, key_heads, width, layout, num_parts, head_stride)


def _attention(heads, key_heads, width, layout, num_parts, head_stride) -> None:
    def rows(count, heads):
        strides = (heads * width, width, 1) if head_stride is None else (width, head_stride, 1)
        return torch.empty_strided((count, heads, width), strides, dtype=torch.bfloat16, device="meta")

    query, output, upstream, query_grad = (rows(layout.num_queries, heads) for _ in range(4))
    key, value = (rows(layout.num_keys, key_heads) for _ in range(2))
    lse, row_stats = (_meta(heads, layout.num_queries, *pair) for pair in ((), (2,)))
    blocks = pick_blocks(query.dtype, width, layout.query_rows is not None)
    settings = work_lists(layout, blocks, causal=len(layout.lengths) == 3), blocks, width**-0.5
    launch_tree_attention_fwd(query, key, value, output, lse, *settings)
    launch_tree_attention_bwd_query(query, key, value, output, upstream, lse, row_stats, query_grad, *settings)
    dtype = query.dtype if num_parts == 1 else torch.float32
    grads = (_meta(num_parts, *key.shape, dtype=dtype) for _ in range(2))
    launch_tree_attention_bwd_key_value(query, key, value, upstream, row_stats, *grads, *settings)


def _meta(*shape, dtype=torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")

"""Tree attention block by block (blocks.py), on any device and dtype, merged by log-sum-exp.

Blocks of a query see different keys. With o_b and l_b the output and log-sum-exp of block b,

    l = log(sum_b exp(l_b)),    o = sum_b exp(l_b - l) o_b.

The gradients of a block need only P = exp(S - l) of the softmax, and rowsum(dO O). So the
backward pass runs block by block too, with the merged o and l: dQ, dK and dV are sums over blocks, in the
order of the layout. On a CPU a block is PyTorch's flash attention kernel, which reads grouped heads in
place; elsewhere it is the formula, in float32 at least.

The two passes are operators of torch, so that selective checkpointing keeps their result and
torch.compile takes them whole. An operator takes tensors and numbers: a layout goes in as a handle, a tensor with
the number of a layout that is alive.
"""

import itertools
import weakref

import torch

from fastrm_kernels.tree_attention.blocks import Batch, block_layout
from fastrm_kernels.tree_attention.layout import TreeLayout

_FORMULA_SCORES = 1 << 27  # the most scores that the formula holds at once, unless one head alone has more

_numbers = itertools.count()
_layouts: weakref.WeakValueDictionary[int, TreeLayout] = weakref.WeakValueDictionary()


def tree_attention_eager(query, key, value, layout, *, scale=None, causal=True):
    """Compute `tree_attention` in eager PyTorch, under the same contract."""
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    output, _ = eager_forward(query, key, value, handle_of(layout), scale, causal)
    if output.grad_fn is not None:
        output.grad_fn.metadata["layout"] = layout  # it lives until the backward pass is done
    return output


def handle_of(layout: TreeLayout) -> torch.Tensor:
    """Return the number of this layout, (1,) int64 on the CPU, valid as long as the layout lives."""
    if "handle" not in layout._made:
        number = next(_numbers)
        _layouts[number] = layout
        # In a tuple: a tensor would go along when the layout moves to another device, which makes another layout.
        layout._made["handle"] = (torch.tensor([number]),)
    return layout._made["handle"][0]


def layout_of(handle: torch.Tensor) -> TreeLayout:
    """Return the layout of a handle.

    Raises:
        RuntimeError: if the layout is no longer alive.
    """
    try:
        return _layouts[int(handle)]
    except KeyError:
        raise RuntimeError(
            "tree attention: the layout of this pass is gone; keep the pack's layouts until its backward pass is done"
        ) from None


@torch.library.custom_op("fastrm::tree_attention_eager", mutates_args=())
def eager_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, handle: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output (Tq, H, K) in query's dtype and each row's log-sum-exp (Tq, H), in float32 at least."""
    return attend(query, key, value, layout_of(handle), scale, causal)


@eager_forward.register_fake
def _(query, key, value, handle, scale, causal):
    return _new_outputs(query)


@torch.library.custom_op("fastrm::tree_attention_eager_backward", mutates_args=())
def eager_backward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    upstream: torch.Tensor,
    handle: torch.Tensor,
    scale: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key and value, in their dtype."""
    return attend_backward(query, key, value, output, lse, upstream, layout_of(handle), scale, causal)


@eager_backward.register_fake
def _(query, key, value, output, lse, upstream, handle, scale, causal):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))


def _setup(ctx, inputs, output):
    query, key, value, handle, ctx.scale, ctx.causal = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, *output, handle)


def _backward(ctx, upstream, _):
    if upstream is None:
        return None, None, None, None, None, None
    query, key, value, output, lse, handle = ctx.saved_tensors
    gradients = eager_backward(query, key, value, output, lse, upstream, handle, ctx.scale, ctx.causal)
    return (*gradients, None, None, None)


eager_forward.register_autograd(_backward, setup_context=_setup)


def attend(query, key, value, layout, scale, causal) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the forward pass of `eager_forward` for a layout."""
    output, lse = _new_outputs(query)
    query, key, value = _dense_columns(query, key, value)
    for level, batches in enumerate(_levels(query, layout, causal)):
        for batch in batches:
            rows = batch.queries
            part, part_lse = _forward(rows.read(query), batch.keys.read(key), batch.keys.read(value), batch, scale)
            part_lse = part_lse[..., None]
            if level:
                part, part_lse = _merged(rows.read(output), rows.read(lse[..., None]), part, part_lse)
            rows.write(output, part)
            rows.write(lse[..., None], part_lse)
    return output, lse


def attend_backward(query, key, value, output, lse, upstream, layout, scale, causal):
    """Run the backward pass of `eager_backward` for a layout."""
    query, key, value = _dense_columns(query, key, value)
    upstream = upstream.contiguous()
    new = torch.empty if layout.query_rows is None else torch.zeros  # the first level writes every row, or not
    gradients = [torch.empty(query.shape, dtype=query.dtype, device=query.device)]
    gradients += [new(x.shape, dtype=x.dtype, device=x.device) for x in (key, value)]
    for level, batches in enumerate(_levels(query, layout, causal)):
        for batch in batches:
            rows, keys = batch.queries, batch.keys
            # Padding has P = exp(S - inf) = 0, and so adds nothing.
            part_lse = rows.padded(rows.read(lse[..., None]), float("inf"))[..., 0]
            parts = _backward_of_batch(
                rows.read(upstream), rows.read(query), keys.read(key), keys.read(value), rows.read(output), part_lse,
                batch, scale,
            )  # fmt: skip
            for side, gradient, part in zip((rows, keys, keys), gradients, parts, strict=True):
                (side.add if level else side.write)(gradient, part)
    return tuple(gradients)


def _levels(query, layout, causal) -> tuple[tuple[Batch, ...], ...]:
    num_queries, heads, width = query.shape
    return block_layout(layout, causal, query.dtype, heads * width).levels if num_queries else ()


def _new_outputs(query) -> tuple[torch.Tensor, torch.Tensor]:
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    return output, torch.empty(query.shape[:2], dtype=_accurate(query.dtype), device=query.device)


def _accurate(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _dense_columns(*tensors):
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _merged(output, lse, part, part_lse):
    """Merge output (B, H, q, K) and log-sum-exp (B, H, q, 1) over two sets of keys into those over their union."""
    weight = torch.sigmoid(part_lse - lse)
    return torch.lerp(output.to(lse.dtype), part.to(lse.dtype), weight), torch.logaddexp(lse, part_lse)


def _has_flash(query) -> bool:
    """Return whether a kernel gives the log-sum-exp of these queries and takes a merged one back."""
    return query.device.type == "cpu"


def _forward(query, key, value, batch: Batch, scale):
    """Return the output (B, H, q, K) and the log-sum-exp (B, H, q) of a batch."""
    if _has_flash(query):
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return flash(query, key, value, 0.0, batch.causal, attn_mask=batch.mask, scale=scale)
    parts = []
    with torch.autocast(query.device.type, enabled=False):
        for q, k, v in _by_heads(batch, key.shape[1], query, key, value):
            scores = _scores(q, k, batch, scale)
            lse = scores.logsumexp(-1)
            parts.append(((scores - lse[..., None]).exp_() @ v, lse))
    output, lse = (torch.cat(found, 1).flatten(1, 2) for found in zip(*parts, strict=True))
    return output.to(query.dtype), lse


def _backward_of_batch(upstream, query, key, value, output, lse, batch: Batch, scale):
    """Return the gradients of query, key and value, each in its shape.

    With P = exp(S - lse): dV = P^T dO, dS = P (dO V^T - rowsum(dO O)), dQ = scale dS K, dK = scale dS^T Q;
    those of key and value are sums over the query heads that share them.
    """
    if _has_flash(query):
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return flash(
            upstream, query, key, value, output, lse, 0.0, batch.causal, attn_mask=batch.mask, scale=scale
        )  # fmt: skip
    parts = []
    tensors = (query, key, value, upstream, output, lse[..., None])
    with torch.autocast(query.device.type, enabled=False):
        for q, k, v, do, o, total in _by_heads(batch, key.shape[1], *tensors):
            weights = (_scores(q, k, batch, scale) - total).exp_()
            slopes = weights * (do @ v.mT - (do * o).sum(-1, keepdim=True))
            parts.append((scale * slopes @ k, scale * (slopes.mT @ q).sum(2, True), (weights.mT @ do).sum(2, True)))
    return [torch.cat(found, 1).flatten(1, 2).to(query.dtype) for found in zip(*parts, strict=True)]


def _by_heads(batch: Batch, key_heads: int, *tensors):
    """Yield each tensor as (B, some of Hkv, H / Hkv or 1, rows, K), a few key heads at a time, in float32 at least."""
    grouped = [x.to(_accurate(x.dtype)).unflatten(1, (key_heads, -1)) for x in tensors]
    head_scores = batch.queries.count * batch.queries.length * batch.keys.length * grouped[0].shape[2]
    heads = max(1, _FORMULA_SCORES // head_scores)
    return zip(*(x.split(heads, 1) for x in grouped), strict=True)


def _scores(query, key, batch: Batch, scale):
    """Return scores (B, Hkv, H / Hkv, q, k), -inf where a query does not see a key."""
    scores = scale * query @ key.mT
    if batch.causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        return scores.masked_fill_(hidden, float("-inf"))
    return scores if batch.mask is None else scores + batch.mask[:, :, None]

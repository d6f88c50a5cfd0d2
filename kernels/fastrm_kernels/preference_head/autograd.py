"""The Triton kernels as torch operators, so that autograd and torch.compile see them, and their callers.

Operators: fastrm::reward_head (two layers), fastrm::reward_head_loss (the same with the loss in the same
launches), fastrm::linear_head, fastrm::preference_loss, their backward passes, and fastrm::take_rows with
fastrm::dense_rows, a row gather whose gradient adds repeated rows in a fixed order. Every backward pass is
an operator that has none itself, so that torch raises where a second derivative is asked for.

Triton is imported when an operator runs, not before.
"""

from contextlib import nullcontext

import torch
from torch import Tensor

from fastrm_kernels.preference_head.reference import ACTIVATIONS, mlp, rms_norm

# The loss joins the head's last launch, a single program, up to this many rewards and edges.
FUSED_REWARDS, FUSED_EDGES = 128, 1024

# Row blocks of a two-layer head lie along the second axis of a grid, which CUDA ends at 65,535; none is
# smaller than this where there are as many.
MAX_ROWS = 65_535 * 64

_op = torch.library.custom_op


def _device(tensor):
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _num_rows(hidden, anchors):
    return hidden.shape[0] if anchors is None else anchors.shape[0]


# Rows of hidden


@_op("fastrm::take_rows", mutates_args=())
def _take_rows(hidden: Tensor, anchors: Tensor) -> Tensor:
    return hidden.index_select(0, anchors)


@_op("fastrm::dense_rows", mutates_args=())
def _dense_rows(rows: Tensor, anchors: Tensor, num_tokens: int) -> Tensor:
    # index_put_ sorts the index on CUDA; index_add_ would use atomics, whose order changes between runs.
    return rows.new_zeros(num_tokens, rows.shape[1]).index_put_((anchors,), rows, accumulate=True)


@_take_rows.register_fake
def _(hidden, anchors):
    return hidden.new_empty(anchors.shape[0], hidden.shape[1])


@_dense_rows.register_fake
def _(rows, anchors, num_tokens):
    return rows.new_empty(num_tokens, rows.shape[1])


def _setup_take_rows(ctx, inputs, output):
    hidden, anchors = inputs
    ctx.save_for_backward(anchors)
    ctx.num_tokens = hidden.shape[0]


def _take_rows_backward(ctx, grad):
    return _dense(grad, ctx.saved_tensors[0], ctx.num_tokens), None


def _dense(rows, anchors, num_tokens):
    return rows if anchors is None else _dense_rows(rows, anchors, num_tokens)


_take_rows.register_autograd(_take_rows_backward, setup_context=_setup_take_rows)


# Two layers


@_op("fastrm::reward_head", mutates_args=())
def _two_layers(
    hidden: Tensor, anchors: Tensor | None, norm_weight: Tensor | None, norm_eps: float,
    weight: Tensor, bias: Tensor | None, out_weight: Tensor, out_bias: Tensor | None,
    activation: str, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from fastrm_kernels.preference_head.triton_forward import launch_reward_head_fwd

    with _device(hidden):
        return launch_reward_head_fwd(
            hidden, anchors, norm_weight, norm_eps, weight, bias, out_weight, out_bias, activation, save, None
        )[:5]


@_op("fastrm::reward_head_loss", mutates_args=())
def _two_layers_loss(
    hidden: Tensor, anchors: Tensor | None, norm_weight: Tensor | None, norm_eps: float,
    weight: Tensor, bias: Tensor | None, out_weight: Tensor, out_bias: Tensor | None,
    activation: str, save: bool,
    edges: Tensor, margin: Tensor | None, edge_weight: Tensor | None, lengths: Tensor | None,
    label_smoothing: float, center: float, reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from fastrm_kernels.preference_head.triton_forward import launch_reward_head_fwd

    with _device(hidden):
        return launch_reward_head_fwd(
            hidden, anchors, norm_weight, norm_eps, weight, bias, out_weight, out_bias, activation, save,
            (edges, margin, edge_weight, lengths, label_smoothing, center, reduction),
        )  # fmt: skip


@_op("fastrm::reward_head_backward", mutates_args=())
def _two_layers_backward(
    grad_loss: Tensor | None, loss_slopes: Tensor | None, grad_rewards: Tensor | None,
    hidden: Tensor, anchors: Tensor | None, norm_weight: Tensor | None,
    weight: Tensor, bias: Tensor | None, out_weight: Tensor, out_bias: Tensor | None,
    active: Tensor, gains: Tensor, rstd: Tensor, slopes: Tensor, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from fastrm_kernels.preference_head.triton_backward import launch_reward_head_bwd

    with _device(hidden):
        return tuple(launch_reward_head_bwd(
            grad_loss, loss_slopes, grad_rewards, hidden, anchors, norm_weight, weight, bias, out_weight, out_bias,
            active, gains, rstd, slopes, needs,
        ))  # fmt: skip


def _float32(like, *shape):
    return like.new_empty(shape, dtype=torch.float32)


@_two_layers.register_fake
def _(hidden, anchors, norm_weight, norm_eps, weight, bias, out_weight, out_bias, activation, save):
    num_rows, features = _num_rows(hidden, anchors), weight.shape[0]
    kept = num_rows if save and norm_weight is not None else 0
    return (
        _float32(hidden, num_rows), *(_float32(hidden, num_rows if save else 0, features) for _ in range(2)),
        _float32(hidden, kept), _float32(hidden, kept),
    )  # fmt: skip


@_two_layers_loss.register_fake
def _(
    hidden, anchors, norm_weight, norm_eps, weight, bias, out_weight, out_bias, activation, save,
    edges, margin, edge_weight, lengths, label_smoothing, center, reduction,
):  # fmt: skip
    num_rows, features = _num_rows(hidden, anchors), weight.shape[0]
    kept = num_rows if save and norm_weight is not None else 0
    return (
        _float32(hidden, num_rows), *(_float32(hidden, num_rows if save else 0, features) for _ in range(2)),
        _float32(hidden, kept), _float32(hidden, kept), _float32(hidden), _float32(hidden, num_rows),
    )  # fmt: skip


@_two_layers_backward.register_fake
def _(
    grad_loss, loss_slopes, grad_rewards, hidden, anchors, norm_weight, weight, bias, out_weight, out_bias,
    active, gains, rstd, slopes, needs,
):  # fmt: skip
    rows = hidden.new_empty(gains.shape[0], weight.shape[1])
    return _empty_gradients((rows, norm_weight, weight, bias, out_weight, out_bias), needs)


def _empty_gradients(like, needs):
    some = like[0]
    return tuple(
        part.new_empty(part.shape) if need and part is not None else some.new_empty(0)
        for part, need in zip(like, needs, strict=True)
    )


def _setup_two_layers(ctx, inputs, output):
    hidden, anchors, norm_weight, _, weight, bias, out_weight, out_bias = inputs[:8]
    _, *saved = output[:5]
    loss_slopes = output[6] if len(output) > 5 else None
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*saved, *([] if loss_slopes is None else [loss_slopes]))
    ctx.save_for_backward(
        loss_slopes, hidden, anchors, norm_weight, weight, bias, out_weight, out_bias, *saved
    )  # fmt: skip
    ctx.num_inputs = len(inputs)


def _two_layers_gradients(ctx, grad_rewards, _active, _gains, _rstd, _slopes, grad_loss=None, _loss_slopes=None):
    loss_slopes, hidden, anchors, *rest = ctx.saved_tensors
    places = (0, 2, 4, 5, 6, 7)  # of hidden, norm weight, weight, bias, last weight, last bias among the inputs
    needs = [ctx.needs_input_grad[place] for place in places]
    gradients: list[Tensor | None] = [None] * ctx.num_inputs
    if grad_rewards is None and grad_loss is None:
        return tuple(gradients)
    found = _two_layers_backward(
        grad_loss, None if grad_loss is None else loss_slopes, grad_rewards, hidden, anchors, *rest, needs,
    )  # fmt: skip
    for place, need, gradient in zip(places, needs, found, strict=True):
        gradients[place] = gradient if need else None
    if needs[0]:
        gradients[0] = _dense(gradients[0], anchors, hidden.shape[0])
    return tuple(gradients)


_two_layers.register_autograd(_two_layers_gradients, setup_context=_setup_two_layers)
_two_layers_loss.register_autograd(_two_layers_gradients, setup_context=_setup_two_layers)


# One layer


@_op("fastrm::linear_head", mutates_args=())
def _one_layer(
    hidden: Tensor, anchors: Tensor | None, norm_weight: Tensor | None, norm_eps: float,
    weight: Tensor, bias: Tensor | None, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from fastrm_kernels.preference_head.triton_linear import launch_linear_head_fwd

    with _device(hidden):
        return launch_linear_head_fwd(hidden, anchors, norm_weight, norm_eps, weight, bias, save)


@_op("fastrm::linear_head_backward", mutates_args=())
def _one_layer_backward(
    grad_rewards: Tensor, hidden: Tensor, anchors: Tensor | None, norm_weight: Tensor | None,
    weight: Tensor, bias: Tensor | None, dots: Tensor, rstd: Tensor, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from fastrm_kernels.preference_head.triton_linear import launch_linear_head_bwd

    with _device(hidden):
        return tuple(
            launch_linear_head_bwd(grad_rewards, hidden, anchors, norm_weight, weight, bias, dots, rstd, needs)
        )


@_one_layer.register_fake
def _(hidden, anchors, norm_weight, norm_eps, weight, bias, save):
    num_rows = _num_rows(hidden, anchors)
    kept = num_rows if save and norm_weight is not None else 0
    return _float32(hidden, num_rows), _float32(hidden, kept), _float32(hidden, kept)


@_one_layer_backward.register_fake
def _(grad_rewards, hidden, anchors, norm_weight, weight, bias, dots, rstd, needs):
    rows = hidden.new_empty(grad_rewards.shape[0], hidden.shape[1])
    return _empty_gradients((rows, norm_weight, weight, bias), needs)


def _setup_one_layer(ctx, inputs, output):
    hidden, anchors, norm_weight, _, weight, bias, _ = inputs
    _, dots, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(dots, rstd)
    ctx.save_for_backward(hidden, anchors, norm_weight, weight, bias, dots, rstd)


def _one_layer_gradients(ctx, grad_rewards, _dots, _rstd):
    if grad_rewards is None:
        return (None,) * 7
    hidden, anchors, *rest = ctx.saved_tensors
    needs = [ctx.needs_input_grad[place] for place in (0, 2, 4, 5)]
    found = _one_layer_backward(grad_rewards, hidden, anchors, *rest, needs)
    rows, norm, weight, bias = (gradient if need else None for gradient, need in zip(found, needs, strict=True))
    if needs[0]:
        rows = _dense(rows, anchors, hidden.shape[0])
    return rows, None, norm, None, weight, bias, None


_one_layer.register_autograd(_one_layer_gradients, setup_context=_setup_one_layer)


# The loss by itself


@_op("fastrm::preference_loss", mutates_args=())
def _loss(
    rewards: Tensor, edges: Tensor, margin: Tensor | None, weight: Tensor | None, lengths: Tensor | None,
    label_smoothing: float, center: float, reduction: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from fastrm_kernels.preference_head.triton_loss import launch_preference_loss

    with _device(rewards):
        return launch_preference_loss(rewards, edges, margin, weight, lengths, label_smoothing, center, reduction)


@_loss.register_fake
def _(rewards, edges, margin, weight, lengths, label_smoothing, center, reduction):
    return _float32(rewards), _float32(rewards, rewards.shape[0])


@_op("fastrm::preference_loss_backward", mutates_args=())
def _loss_backward(grad_loss: Tensor, slopes: Tensor, rewards: Tensor) -> Tensor:
    # The rewards are there to be differentiated, which raises; the slopes alone would count as constants.
    return grad_loss * slopes


@_loss_backward.register_fake
def _(grad_loss, slopes, rewards):
    return torch.empty_like(slopes)


def _setup_loss(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], inputs[0])


def _loss_gradients(ctx, grad_loss, _slopes):
    gradient = None if grad_loss is None else _loss_backward(grad_loss, *ctx.saved_tensors)
    return gradient, *[None] * 7


_loss.register_autograd(_loss_gradients, setup_context=_setup_loss)


# The functions that api.py calls


def reward_head(hidden, anchors, layers, *, activation, norm_weight, norm_eps):
    """Return the rewards (R,) in float32."""
    hidden, anchors, layers, norm_weight = _last_two(hidden, anchors, layers, activation, norm_weight, norm_eps)
    save = _needs_grad(hidden, norm_weight, *layers)
    if len(layers) == 2:
        return _one_layer(hidden, anchors, norm_weight, norm_eps, *layers, save)[0]
    return _two_layers(hidden, anchors, norm_weight, norm_eps, *layers, activation, save)[0]


def preference_loss(rewards, edges, *, margin, weight, label_smoothing, center, lengths, reduction):
    """Return the loss, a scalar float32."""
    return _loss(rewards, edges, margin, weight, lengths, label_smoothing, center, reduction)[0]


def preference_head_loss(hidden, anchors, layers, edges, *, activation, norm_weight, norm_eps, **options):
    """Return (loss, rewards). The head's launches compute the loss too, where it is small enough."""
    small = edges.shape[0] <= FUSED_EDGES and _num_rows(hidden, anchors) <= FUSED_REWARDS
    if len(layers) == 1 or not small:
        head = {"activation": activation, "norm_weight": norm_weight, "norm_eps": norm_eps}
        rewards = reward_head(hidden, anchors, layers, **head)
        return preference_loss(rewards, edges, **options), rewards
    hidden, anchors, layers, norm_weight = _last_two(hidden, anchors, layers, activation, norm_weight, norm_eps)
    outputs = _two_layers_loss(
        hidden, anchors, norm_weight, norm_eps, *layers, activation, _needs_grad(hidden, norm_weight, *layers),
        edges, options["margin"], options["weight"], options["lengths"], options["label_smoothing"],
        options["center"], options["reduction"],
    )  # fmt: skip
    return outputs[5], outputs[0]


def _last_two(hidden, anchors, layers, activation, norm_weight, norm_eps):
    """Run the layers before the last two; return (hidden, anchors, [weight, bias, ...], norm_weight) for the rest."""
    inner, last = layers[:-2], layers[-2:]
    if inner:
        hidden = hidden if anchors is None else _take_rows(hidden, anchors)
        if norm_weight is not None:
            hidden = rms_norm(hidden, norm_weight, norm_eps)
        hidden, anchors, norm_weight = ACTIVATIONS[activation](mlp(hidden, inner, activation)), None, None
    return hidden, anchors, [part for layer in last for part in layer], norm_weight


def _needs_grad(*tensors):
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)

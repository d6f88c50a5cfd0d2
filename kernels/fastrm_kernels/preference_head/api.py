"""Public functions of the preference head: checks shared by all implementations, then dispatch.

The formulas are in reference.py, the kernels' derivation in README.md.

Indices (anchors, edges) must be in range; they are not checked, since a check would wait for the GPU. README.md
describes the result of an index out of range.
"""

from dataclasses import dataclass

import torch

from fastrm_kernels.dispatch import pick
from fastrm_kernels.preference_head import autograd, reference
from fastrm_kernels.preference_head.reference import ACTIVATIONS, REDUCTIONS


@dataclass(frozen=True)
class HeadGradients:
    """Gradients of the preference loss, without autograd and without anything of size (T, D).

    Attributes:
        loss: scalar float32.
        rewards: (R,) float32.
        rows: (R, D), dtype of hidden: gradient of hidden[anchors]; add row i to row anchors[i].
        anchors: (R,) int64, as given; None where row i is row i of hidden.
        layers: [(gradient of weight, gradient of bias or None), ...] in the parameters' dtypes.
        norm_weight: (D,) gradient of the norm's weight, or None without a norm.
    """

    loss: torch.Tensor
    rewards: torch.Tensor
    rows: torch.Tensor
    anchors: torch.Tensor | None
    layers: list[tuple[torch.Tensor, torch.Tensor | None]]
    norm_weight: torch.Tensor | None


def reward_head(hidden, anchors, layers, *, activation="silu", norm_weight=None, norm_eps=1e-6, impl="auto"):
    """Compute scalar rewards from the hidden states of the anchor tokens.

    Matrix products take their operands in hidden's dtype, also where the weights have another one
    and under autocast; they are accumulated in float32.

    Args:
        hidden: (T, D) float16, bfloat16, float32, or float64 (eager only).
        anchors: (R,) int64 rows of `hidden`, 0 <= anchor < T, repeats allowed; None for all rows in order.
        layers: [(weight, bias or None), ...] shaped as nn.Linear's; the last weight is (1, F). Triton
            runs the last two, layers before those run eagerly on the (R, D) rows.
        activation: one of none, tanh, relu, silu, applied between the layers.
        norm_weight: (D,) weight of a final RMSNorm applied to the anchors first, or None.
        norm_eps: epsilon of that norm.
        impl: auto, triton or eager; an explicit one never falls back, auto is eager where Triton cannot run.
            Triton gives first derivatives, and torch raises RuntimeError for second ones.

    Returns:
        rewards (R,) in float32, or float64 if `hidden` is. Bitwise the same from run to run, with its
        gradients, with impl triton.

    Raises:
        ValueError: for shapes that do not fit, an unknown activation, or an impl that cannot run here.
    """
    num_rewards = _check_head(hidden, anchors, layers, activation, norm_weight)
    chosen = _choose("preference_head", impl, hidden, _head_obstacle(num_rewards, layers))
    run = autograd.reward_head if chosen == "triton" else reference.reward_head
    return run(hidden, anchors, layers, activation=activation, norm_weight=norm_weight, norm_eps=norm_eps)


def preference_loss(
    rewards, edges, *, margin=None, weight=None, label_smoothing=0.0, center=0.0, lengths=None, reduction="mean",
    impl="auto",
):  # fmt: skip
    """Compute the weighted mean or sum of the preference loss over an edge list; the formula is in reference.py.

    Args:
        rewards: (R,) float32, or float64 (eager only).
        edges: (E, 2) int64, winner then loser, indices into `rewards`, 0 <= index < R.
        margin: (E,) subtracted from the reward difference, or None for 0.
        weight: (E,) >= 0, or None for 1.
        label_smoothing: probability in [0, 0.5) that a label is flipped.
        center: coefficient of (r_w + r_l)^2.
        lengths: (R,) response lengths in tokens (>= 1) for length normalisation, or None.
        reduction: mean, or sum for a loss that is not divided by the weights.
        impl: auto, triton or eager, as in `reward_head`. Triton gives gradients of rewards alone: with a
            margin, weight or lengths that requires grad, triton raises and auto is eager.

    Returns:
        scalar: the sum of the weighted terms, with mean divided by the sum of the weights (0 when there are no
        edges or all weights are 0).

    Raises:
        ValueError: for shapes or values that do not fit, or an impl that cannot run here.
    """
    _check_rewards(rewards)
    options = _loss_options(
        rewards.shape[0], rewards, edges, margin, weight, label_smoothing, center, lengths, reduction
    )
    chosen = _choose("preference_loss", impl, rewards, _loss_obstacle(rewards, edges, margin, weight, lengths))
    run = autograd.preference_loss if chosen == "triton" else reference.preference_loss
    return run(rewards, edges, **options)


def preference_head_loss(
    hidden, anchors, layers, edges, *, activation="silu", norm_weight=None, norm_eps=1e-6,
    margin=None, weight=None, label_smoothing=0.0, center=0.0, lengths=None, reduction="mean", impl="auto",
):  # fmt: skip
    """Compute `reward_head` and `preference_loss` in one: return (loss, rewards), both differentiable.

    Arguments, results and errors are those of the two.
    """
    num_rewards = _check_head(hidden, anchors, layers, activation, norm_weight)
    options = _loss_options(num_rewards, hidden, edges, margin, weight, label_smoothing, center, lengths, reduction)
    head = {"activation": activation, "norm_weight": norm_weight, "norm_eps": norm_eps}
    obstacle = _head_obstacle(num_rewards, layers) or _loss_obstacle(hidden, edges, margin, weight, lengths)
    if _choose("preference_head", impl, hidden, obstacle) == "eager":
        rewards = reference.reward_head(hidden, anchors, layers, **head)
        return reference.preference_loss(rewards, edges, **options), rewards
    return autograd.preference_head_loss(hidden, anchors, layers, edges, **head, **options)


def preference_head_gradients(
    hidden, anchors, layers, edges, *, activation="silu", norm_weight=None, norm_eps=1e-6,
    margin=None, weight=None, label_smoothing=0.0, center=0.0, lengths=None, reduction="mean",
    grad_loss=1.0, impl="auto",
) -> HeadGradients:  # fmt: skip
    """Compute loss, rewards and all gradients at once, for engines that run their own backward pass.

    Arguments are those of `preference_head_loss`, and `grad_loss`, a float by which every gradient is
    multiplied, such as a loss scale. The gradient of hidden comes as rows and their index.

    Raises:
        ValueError: as `preference_head_loss`.
    """
    _check_head(hidden, anchors, layers, activation, norm_weight)
    rows = hidden if anchors is None else hidden.index_select(0, anchors)
    leaves = [rows, norm_weight, *(part for layer in layers for part in layer)]
    leaves = [None if leaf is None else leaf.detach().requires_grad_() for leaf in leaves]
    with torch.enable_grad():
        loss, rewards = preference_head_loss(
            leaves[0], None, list(zip(leaves[2::2], leaves[3::2], strict=True)), edges, activation=activation,
            norm_weight=leaves[1], norm_eps=norm_eps, margin=margin, weight=weight,
            label_smoothing=label_smoothing, center=center, lengths=lengths, reduction=reduction, impl=impl,
        )  # fmt: skip
    wanted = [leaf for leaf in leaves if leaf is not None]
    found = iter(torch.autograd.grad(loss, wanted, loss.new_full((), grad_loss)))
    rows, norm, *parts = [None if leaf is None else next(found) for leaf in leaves]
    pairs = list(zip(parts[::2], parts[1::2], strict=True))
    return HeadGradients(loss.detach(), rewards.detach(), rows, anchors, pairs, norm)


def _choose(op, impl, tensor, obstacle) -> str:
    """Resolve `impl` as `dispatch.pick` does, unless an `obstacle` says why Triton cannot run these very inputs."""
    chosen = pick(op, impl, tensor)
    if chosen == "triton" and obstacle is not None:
        if impl == "triton":
            raise ValueError(f"{op} with impl='triton': {obstacle}, or impl='eager'")
        return "eager"
    return chosen


def _head_obstacle(num_rewards, layers) -> str | None:
    if len(layers) > 1 and num_rewards > autograd.MAX_ROWS:
        return f"got {num_rewards} rows, wanted at most {autograd.MAX_ROWS}; pass them in parts"
    return None


def _loss_obstacle(like, edges, margin, weight, lengths) -> str | None:
    """Return why Triton cannot compute this loss, or None.

    The kernels give no gradient of margin, weight and lengths: better an error than a gradient that is silently zero.
    """
    for name, value in {"margin": margin, "weight": weight, "lengths": lengths}.items():
        if value is not None and value.requires_grad and torch.is_grad_enabled():
            return f"{name}: got a tensor that requires grad, wanted a constant; pass {name}.detach()"
    if edges.device != like.device:
        # Eager code indexes a CUDA tensor with a CPU one; a kernel cannot read that.
        return f"edges: got a tensor on {edges.device}, wanted {like.device}; pass edges.to({str(like.device)!r})"
    return None


def _check_head(hidden, anchors, layers, activation, norm_weight) -> int:
    """Raise ValueError for what no implementation accepts; return the number of rewards."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, wanted one of {', '.join(ACTIVATIONS)}")
    if hidden.dim() != 2 or not hidden.is_floating_point():
        raise ValueError(f"hidden: got {tuple(hidden.shape)} {hidden.dtype}, wanted (T, D) floating point")
    num_rewards = hidden.shape[0]
    if anchors is not None:
        if anchors.dim() != 1 or anchors.dtype != torch.int64:
            raise ValueError(f"anchors: got {tuple(anchors.shape)} {anchors.dtype}, wanted (R,) int64; call .long()")
        num_rewards = anchors.shape[0]
        if num_rewards > 0 and hidden.shape[0] == 0:
            raise ValueError(f"anchors: got {num_rewards} rows of a hidden that has none")
    _check_layers(layers, hidden.shape[1])
    if norm_weight is not None and norm_weight.shape != hidden.shape[1:]:
        raise ValueError(f"norm_weight: got {tuple(norm_weight.shape)}, wanted ({hidden.shape[1]},) as hidden's rows")
    return num_rewards


def _check_layers(layers, width) -> None:
    if not layers or layers[-1][0].dim() != 2 or layers[-1][0].shape[0] != 1:
        raise ValueError("layers: wanted a last weight of shape (1, F), for one reward per anchor")
    for number, (weight, bias) in enumerate(layers):
        if weight.dim() != 2 or weight.shape[1] != width or width == 0:
            wanted = f"{width} input columns" if width else "at least one input column"
            raise ValueError(f"layers[{number}]: got a weight {tuple(weight.shape)}, wanted {wanted}")
        width = weight.shape[0]
        if bias is not None and bias.shape != (width,):
            raise ValueError(f"layers[{number}]: got a bias {tuple(bias.shape)}, wanted ({width},) as its weight")


def _check_rewards(rewards) -> None:
    if rewards.dim() != 1 or rewards.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"rewards: got {tuple(rewards.shape)} {rewards.dtype}, wanted (R,) float32; call .float()")


def _loss_options(num_rewards, like, edges, margin, weight, label_smoothing, center, lengths, reduction) -> dict:
    """Return the loss's keyword arguments, checked, with margin and weight in the dtype of the loss."""
    if edges.dim() != 2 or edges.shape[1] != 2 or edges.dtype != torch.int64:
        raise ValueError(f"edges: got {tuple(edges.shape)} {edges.dtype}, wanted (E, 2) int64, winner then loser")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}, wanted one of {', '.join(REDUCTIONS)}")
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing: got {label_smoothing}, wanted 0 <= value < 0.5, a share of flips")
    if not center >= 0.0:
        raise ValueError(f"center: got {center}, wanted a coefficient >= 0")
    wanted = {"margin": (margin, edges.shape[:1]), "weight": (weight, edges.shape[:1]), "lengths": (lengths, None)}
    for name, (value, shape) in wanted.items():
        shape = (num_rewards,) if shape is None else tuple(shape)
        if value is not None and tuple(value.shape) != shape:
            raise ValueError(f"{name}: got {tuple(value.shape)}, wanted {shape}")
    dtype = torch.promote_types(like.dtype, torch.float32)
    return {
        "margin": None if margin is None else margin.to(dtype),
        "weight": None if weight is None else weight.to(dtype),
        "label_smoothing": float(label_smoothing),
        "center": float(center),
        "lengths": lengths,
        "reduction": reduction,
    }

"""The reward head as a module with stock key names, on the shared operations of head and loss."""

import torch
from torch import nn

from fastrm.config import HeadConfig, LossConfig
from fastrm.data.packing import Pack
from fastrm.model.losses import choice_weights, other_loss_sum
from fastrm_kernels import preference_head_loss, preference_loss, reward_head

_MODULES = {"none": nn.Identity, "tanh": nn.Tanh, "relu": nn.ReLU, "silu": nn.SiLU}


def make_head(hidden_size: int, head: HeadConfig) -> nn.Module:
    """Make the head Linear(D, D), activation, ..., Linear(D, 1), with torch's default initialisation.

    Keys: score.0.weight, score.2.weight, ... for several layers; score.weight for one, as in
    transformers' own ForSequenceClassification models.
    """
    if head.layers == 1:
        return nn.Linear(hidden_size, 1, bias=head.bias)
    layers: list[nn.Module] = []
    for _ in range(head.layers - 1):
        layers += [nn.Linear(hidden_size, hidden_size, bias=head.bias), _MODULES[head.activation]()]
    return nn.Sequential(*layers, nn.Linear(hidden_size, 1, bias=head.bias))


def head_rewards(
    score: nn.Module, activation: str, states: torch.Tensor, norm: nn.Module | None, impl: str
) -> torch.Tensor:
    """Compute rewards (R,) float32 from the hidden states (R, D) that the head reads.

    The head runs in its own precision, outside autocast: R rows cost nothing, and the reward is
    what everything else is measured by.

    Args:
        norm: the model's final RMSNorm, for states before it; None for states after it, such as means.
        impl: of `reward_head`.
    """
    with torch.autocast(states.device.type, enabled=False):
        arguments, options = _inputs(score, activation, states, norm)
        return reward_head(*arguments, **options, impl=impl)


def head_loss(
    score: nn.Module, activation: str, states: torch.Tensor, norm: nn.Module | None, impl: str,
    pack: Pack, settings: LossConfig,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Compute (sum of the weighted loss terms, rewards (R,)), float32: `head_rewards` and `loss_sum`.

    With loss.kind bradley_terry they are one operation.

    Args:
        pack: on the device of the states.
    """
    if settings.kind != "bradley_terry":
        rewards = head_rewards(score, activation, states, norm, impl)
        return other_loss_sum(rewards, pack, settings), rewards
    with torch.autocast(states.device.type, enabled=False):
        arguments, options = _inputs(score, activation, states, norm)
        return preference_head_loss(*arguments, pack.edges, **options, **loss_options(pack, settings), impl=impl)


def loss_sum(rewards: torch.Tensor, pack: Pack, settings: LossConfig) -> torch.Tensor:
    """Compute the sum of a pack's weighted loss terms, a float32 scalar, from rewards (R,), as an evaluation has them.

    Args:
        pack: on the device of the rewards.
    """
    if settings.kind != "bradley_terry":
        return other_loss_sum(rewards, pack, settings)
    # Eager on every machine: an evaluation's rewards are a few numbers on the CPU.
    return preference_loss(rewards, pack.edges, **loss_options(pack, settings), impl="eager")


def total_weight(pack: Pack, settings: LossConfig) -> float:
    """Return the weight of a pack's terms, by whose sum over a step its loss is divided.

    Args:
        pack: on the CPU, so that nothing waits for a GPU.
    """
    is_ranking = settings.kind == "plackett_luce"
    weight = choice_weights(pack, len(pack.response_lengths)) if is_ranking else pack.weight
    return float(weight.double().sum())


def loss_options(pack: Pack, settings: LossConfig) -> dict:
    """Return the keyword arguments of `preference_loss` for the sum over a pack's preferences."""
    return {
        "margin": pack.margin,
        "weight": pack.weight,
        "label_smoothing": settings.label_smoothing,
        "center": settings.center,
        "lengths": pack.response_lengths if settings.length_normalization else None,
        "reduction": "sum",
    }


def _inputs(score: nn.Module, activation: str, states: torch.Tensor, norm: nn.Module | None) -> tuple[tuple, dict]:
    """Return the arguments of `reward_head` except `impl`: (hidden, anchors, layers), and the keyword arguments."""
    linears = [module for module in score.modules() if isinstance(module, nn.Linear)]
    layers = [(linear.weight, linear.bias) for linear in linears]
    options = {"activation": activation, "norm_weight": None, "norm_eps": 0.0}
    if norm is not None:
        options |= {"norm_weight": norm.weight, "norm_eps": norm.variance_epsilon}
    return (states.to(layers[0][0].dtype), None, layers), options

"""AdamW with decay on weight matrices only, and the learning rate as a function of the step."""

import math

import torch
from torch import nn

from fastrm.config import OptimConfig


def make_optimizer(network: nn.Module, settings: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, in the order of `named_parameters`.

    Decay applies to the weights of linear and convolution layers. Biases, norms and embeddings have
    none: pulling them to zero is not regularisation but a change of the function.
    """
    embeddings = {id(m.weight) for m in network.modules() if isinstance(m, nn.Embedding)}
    decay, rest = [], []
    for parameter in network.parameters():
        if parameter.requires_grad:
            (decay if parameter.ndim >= 2 and id(parameter) not in embeddings else rest).append(parameter)
    groups = [{"params": decay, "weight_decay": settings.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=tuple(settings.betas), eps=settings.eps, fused=True)


def learning_rate(step: int, num_steps: int, settings: OptimConfig) -> float:
    """Rate of step 0 <= step < num_steps: linear warm-up from 0, then constant or half a cosine."""
    num_warmup = math.ceil(settings.warmup_ratio * num_steps)
    if step < num_warmup:
        return settings.lr * (step + 1) / num_warmup
    if settings.schedule == "constant":
        return settings.lr
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return settings.lr * (settings.min_lr_ratio + (1.0 - settings.min_lr_ratio) * cosine)

"""One process: accumulate the gradients of a step's packs, then update.

Packs add the SUM of their weighted loss terms; the division by the step's total weight happens once,
at the update. So the result does not depend on how the step was cut into packs, and the total need
not be known before the first backward pass.
"""

import math
from dataclasses import dataclass

import torch

from fastrm.config import Config
from fastrm.data.packing import Pack
from fastrm.model.network import RewardNetwork
from fastrm.train.optim import make_optimizer
from fastrm_kernels import preference_loss


@dataclass(frozen=True)
class Update:
    """What an optimizer step did. If loss or gradient was not finite, it changed nothing."""

    loss: float
    grad_norm: float
    finite: bool


class LocalEngine:
    """Training state of a single process: network, optimizer and the gradient under way."""

    def __init__(self, network: RewardNetwork, config: Config):
        self.network = network
        self.config = config
        self.optimizer = make_optimizer(network, config.optim)
        self._parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._loss_sum = 0.0
        self._weight_sum = 0.0

    def rewards(self, pack: Pack) -> torch.Tensor:
        """Rewards (R,) in the configured precision."""
        pack = pack.to(self.network.device)
        enabled = self.config.precision.dtype == "bf16"
        with torch.autocast(self.network.device.type, dtype=torch.bfloat16, enabled=enabled):
            return self.network(pack)

    def loss(self, rewards: torch.Tensor, pack: Pack) -> torch.Tensor:
        """Weighted mean loss of a pack's preferences, float32."""
        pack, settings = pack.to(rewards.device), self.config.loss
        return preference_loss(
            rewards,
            pack.edges,
            margin=pack.margin,
            weight=pack.weight,
            label_smoothing=settings.label_smoothing,
            center=settings.center,
            lengths=pack.response_lengths if settings.length_normalization else None,
            impl=self.network.head_kernels[0],
        )

    def accumulate(self, pack: Pack) -> torch.Tensor:
        """Add a pack's gradient; returns its rewards (R,) on the CPU."""
        weight = float(pack.weight.double().sum())  # read before it is on a GPU, which would have to be waited for
        pack = pack.to(self.network.device)
        rewards = self.rewards(pack)
        total = self.loss(rewards, pack) * weight
        total.backward()
        self._loss_sum += float(total.detach())
        self._weight_sum += weight
        return rewards.detach().cpu()

    def update(self, lr: float) -> Update:
        """Normalise, clip and apply the accumulated gradient, then forget it.

        A non-finite loss or gradient changes no weight and no moment.
        """
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        scale = 1.0 / self._weight_sum if self._weight_sum > 0 else 0.0
        norm = float(torch.nn.utils.get_total_norm(gradients)) * scale if gradients else 0.0
        loss = self._loss_sum * scale
        finite = math.isfinite(norm) and math.isfinite(loss)
        # A step has no gradient when all of its records were refused.
        if finite and gradients:
            limit = self.config.optim.max_grad_norm
            clip = min(1.0, limit / (norm + 1e-6)) if limit else 1.0
            torch._foreach_mul_(gradients, scale * clip)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.discard()
        return Update(loss, norm, finite)

    def discard(self) -> None:
        """Forget the accumulated gradient."""
        self.optimizer.zero_grad(set_to_none=True)
        self._loss_sum = self._weight_sum = 0.0

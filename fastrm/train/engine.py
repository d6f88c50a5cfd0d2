"""The engine of one process: accumulate the gradients of a step's packs, then update.

Packs add the SUM of their weighted loss terms; the division by the step's total weight happens once,
at the update. So the result does not depend on how the step was cut into packs, and the total need
not be known before the first backward pass.

On a GPU nothing waits for the device until the update, which reads loss and gradient norm at once.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from fastrm.config import Config
from fastrm.data.packing import Pack
from fastrm.model.head import loss_sum, total_weight
from fastrm.model.lora import kept_tensors, load_kept_tensors
from fastrm.model.network import RewardNetwork
from fastrm.train.compact_adamw import CompactAdamW
from fastrm.train.optim import load_state_tensors, make_optimizers, state_tensors, store_matrices_in_bf16


@dataclass(frozen=True)
class Update:
    """The result of an optimizer step. If loss or gradient was not finite, nothing was changed.

    `parts` are the losses of a critic's preferences and turns, whose sum is `loss`; of others nothing.
    """

    loss: float
    grad_norm: float
    finite: bool
    parts: tuple[float, ...] = ()


class LocalEngine:
    """The training state of a single process: network, optimizers and the accumulated gradient.

    With precision.weights bf16 it rounds the network's matrices when it is made.
    """

    rank, num_ranks = 0, 1

    def __init__(self, network: RewardNetwork, config: Config):
        self.network = network
        self.config = config
        if config.precision.weights == "bf16":
            store_matrices_in_bf16(network)
        self.optimizers = make_optimizers(network, config)
        parts = [part for optimizer in self.optimizers for part in optimizer.param_groups]
        self._parameters = [parameter for part in parts for parameter in part["params"]]
        self.discard()

    def rewards(self, pack: Pack) -> torch.Tensor:
        """Return rewards (R,) in the configured precision."""
        return self._forward(pack)

    def loss_and_rewards(self, pack: Pack) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (sum of a pack's weighted loss terms, rewards (R,)), both differentiable; a critic's sum is two (2,).
        """
        return self._forward(pack, self.config.loss)

    def loss(self, rewards: torch.Tensor, pack: Pack) -> torch.Tensor:
        """Sum a pack's weighted loss terms, float32, from rewards (R,) on any device, as an evaluation has them."""
        return loss_sum(rewards, pack.to(rewards.device), self.config.loss)

    def accumulate(self, pack: Pack | None) -> torch.Tensor | None:
        """Add a pack's gradient; return its rewards (R,) on the CPU, or None for no pack.

        The rewards are being copied from the device: read them after `update`, which waits for that.
        """
        if pack is None:
            return None
        weight = total_weight(pack, self.config.loss)  # read before it is on a GPU, which would be waited for
        total, rewards = self.loss_and_rewards(pack)
        if total.requires_grad:  # not of a judge whose vision tower alone is trained, for a pack without an image
            total.sum().backward()
        self._loss_sum += total.detach()
        self._weight_sum += weight
        return rewards.detach().to("cpu", non_blocking=True)

    def update(self, lr: float, step: int) -> Update:
        """Normalise, clip and apply the accumulated gradient, then forget it.

        A non-finite loss or gradient changes no weight and no moment.

        Args:
            lr: learning rate of this step.
            step: of the run, from 0; it seeds stochastic rounding.
        """
        gradients = self._gradients()
        norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros((), device=self.network.device)
        *losses, norm = torch.cat([self._loss_sum.view(-1), norm.double().view(1)]).tolist()  # the one wait for it
        scale = 1.0 / self._weight_sum if self._weight_sum > 0 else 0.0
        losses, norm = tuple(loss * scale for loss in losses), norm * scale
        loss = sum(losses)
        finite = math.isfinite(norm) and math.isfinite(loss)
        # A step has no gradient when all of its records were refused.
        if finite and gradients:
            limit = self.config.optim.max_grad_norm
            clip = min(1.0, limit / (norm + 1e-6)) if limit else 1.0
            for optimizer in self.optimizers:
                self._step(optimizer, lr, step, scale * clip)
        self.discard()
        return Update(loss, norm, finite, losses if len(losses) > 1 else ())

    def _forward(self, pack: Pack, *loss):
        pack = pack.to(self.network.device)
        enabled = self.config.precision.dtype == "bf16"
        with torch.autocast(self.network.device.type, dtype=torch.bfloat16, enabled=enabled):
            return self.network(pack, *loss)

    def _step(self, optimizer: torch.optim.Optimizer, lr: float, step: int, gradient_scale: float) -> None:
        for group in optimizer.param_groups:
            group["lr"], group["step"] = lr * group["lr_scale"], step
            if isinstance(optimizer, CompactAdamW):  # it scales gradients as it reads them, without a pass of its own
                group["gradient_scale"] = gradient_scale
            else:
                torch._foreach_mul_([parameter.grad for parameter in group["params"]], gradient_scale)
        optimizer.step()

    def _gradients(self) -> list[torch.Tensor]:
        """Return the gradients of all parameters; none if the step had no preference.

        A parameter that the step did not reach, such as the vision tower's in a step of texts, has a gradient of zero
        and not none: its moments decay as they do on several ranks, where some rank may have reached it.
        """
        if self._weight_sum == 0:
            return []
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)
        return [p.grad for p in self._parameters]

    def discard(self) -> None:
        """Forget the accumulated gradient."""
        for parameter in self._parameters:
            parameter.grad = None
        # Float64, like a sum in Python of the packs' losses, read one by one.
        self._loss_sum = no_loss(self.network)
        self._weight_sum = 0.0

    def model_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (stock state-dict name, tensor) of all weights, or under adapters what is trained (`kept_tensors`)."""
        yield from kept_tensors(self.network)

    def optimizer_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (`<state>.<parameter name>`, tensor) of the optimizers' states, such as exp_avg.score.0.weight."""
        yield from state_tensors(self.optimizers)

    def load_tensors(self, model: Mapping[str, torch.Tensor], optimizer: Mapping[str, torch.Tensor]) -> None:
        """Load tensors of `model_tensors` and `optimizer_tensors`.

        Raises:
            StorageError: if they are not those of this network and these optimizers.
        """
        load_kept_tensors(self.network, model)
        load_state_tensors(self.optimizers, optimizer)


def no_loss(network: RewardNetwork) -> torch.Tensor:
    """Return zeros in float64 to which the losses of packs are added: (), or of a critic (2,)."""
    return torch.zeros((2,) if network.paradigm == "critic" else (), dtype=torch.float64, device=network.device)

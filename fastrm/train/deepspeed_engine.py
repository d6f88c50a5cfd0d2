"""The engine of many processes: the step of `LocalEngine`, with its state divided by DeepSpeed.

Every rank adds the gradients of its packs, DeepSpeed sums them over the ranks, and the division by the
step's total weight happens once, at the update, as on one process. DeepSpeed averages over ranks and has
no such division; but it divides all gradients by its loss scale before it clips them. So the loss scale
is 1 while gradients are added, and (total weight) / (number of ranks) for the update:

    g / R / (W / R) = g / W       R ranks, W total weight, g sum of the gradients

Its clipping is ours: the norm of g / W in float64 or float32, and a factor min(1, limit / (norm + 1e-6)).

Ranks wait for one another in every backward pass (and, with divided weights, in every layer). So they run
equally many packs, and all the same modules: a rank that has nothing runs a pack of one token whose
rewards count nothing, and packs without images send a blank one through a vision tower that is trained.
"""

import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from fastrm.config import Config
from fastrm.data.packing import EncodedGroup, Pack, build_pack
from fastrm.data.template import ConversationEncoder, EncodedResponse
from fastrm.errors import ConfigError, StorageError
from fastrm.model.fusion import join_parts, split_fused, stored_buffers, whole_shape
from fastrm.model.head import total_weight
from fastrm.model.lm_head import load_lm_head
from fastrm.model.loading import Backbone, PickDtype
from fastrm.model.network import RewardNetwork, pick_device
from fastrm.model.precision import token_multiple
from fastrm.train.engine import LocalEngine, Update, no_loss
from fastrm.train.optim import make_optimizer, trainable

# The number of gradient elements that are reduced together, 0.8 GB of float32: large enough for any network.
BUCKET = 200_000_000
_STATES = ("exp_avg", "exp_avg_sq")


class DeepSpeedEngine:
    """The training state of one rank of several, with the interface of `LocalEngine`.

    Every method but `loss` and `discard` must be called on all ranks, those that run the network with None
    where a rank has no pack.

    Raises:
        ConfigError: for what is not possible on several ranks.
    """

    def __init__(self, network: RewardNetwork, config: Config):
        _refuse(config)
        self.network, self.config = network, config
        self.rank, self.num_ranks = dist.get_rank(), dist.get_world_size()
        self._stage = config.engine.zero_stage
        trains_tower = network.tower is not None and any(p.requires_grad for p in network.tower.parameters())
        network.always_run_tower = self._stage == 3 or trains_tower
        self._empty_pack = _pack_of_one_token(token_multiple(config.precision.fp8), network.encoder)
        self._trained = trainable(network)
        self._names = dict(network.named_parameters())
        self._deepspeed = _initialize(network, config)
        self._zero = self._deepspeed.optimizer
        self._reset_states(torch.zeros(()))
        self._forget_sums()

    loss = LocalEngine.loss

    def rewards(self, pack: Pack | None) -> torch.Tensor | None:
        """Return rewards (R,) in the configured precision; None for no pack."""
        rewards = self._deepspeed(self._pack(pack))
        return None if pack is None else rewards

    def loss_and_rewards(self, pack: Pack | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (sum of a pack's loss terms, rewards (R,)), both differentiable; for no pack 0 and one reward."""
        return self._deepspeed(self._pack(pack), self.config.loss)

    def accumulate(self, pack: Pack | None) -> torch.Tensor | None:
        """Add a pack's gradient; return its rewards (R,) on the CPU, or None for no pack.

        The rewards are being copied from the device: read them after `update`, which waits for that.
        """
        weight = 0.0 if pack is None else total_weight(pack, self.config.loss)
        total, rewards = self.loss_and_rewards(pack)
        self._deepspeed.backward(total.sum(), scale_wrt_gas=False)
        if pack is None:
            return None
        self._loss_sum += total.detach()
        self._weight_sum += weight
        return rewards.detach().to("cpu", non_blocking=True)

    def update(self, lr: float, step: int) -> Update:
        """Normalise, clip and apply the accumulated gradient of all ranks, then forget it.

        A non-finite loss or gradient on any rank changes no weight and no moment on any.

        Args:
            lr: learning rate of this step.
            step: of the run; nothing here depends on it.
        """
        sums = torch.cat([self._loss_sum.view(-1), self._loss_sum.new_full((1,), self._weight_sum)])
        dist.all_reduce(sums)
        *losses, weight = sums.tolist()
        loss = sum(losses)
        if weight == 0:  # all records of the step were refused
            self.discard()
            return Update(0.0, 0.0, True, tuple(losses) if len(losses) > 1 else ())
        if not math.isfinite(loss):
            self.discard()
            return Update(loss / weight, math.nan, False)  # of which no part is averaged
        for group in self._zero.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self._zero.loss_scale = weight / self.num_ranks
        self._deepspeed.step()
        self._zero.loss_scale = 1.0
        self._forget_sums()
        parts = tuple(part / weight for part in losses) if len(losses) > 1 else ()
        return Update(loss / weight, float(self._deepspeed.get_global_grad_norm()), not self._zero.overflow, parts)

    def discard(self) -> None:
        """Forget the accumulated gradient."""
        self._zero.zero_grad()  # with divided weights this is enough
        if self._stage < 3:
            # DeepSpeed does the same when it skips a step.
            from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID

            self._zero.micro_step_id = INITIAL_MICRO_STEP_ID
            for gradients in (self._zero.averaged_gradients, self._zero.all_grad_tensors):
                for group in gradients:
                    gradients[group] = None
        self._forget_sums()

    def model_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (stock state-dict name, full tensor) of what a run keeps, as `kept_tensors`, each valid until the next.
        """
        if self.network.lora is None:
            yield from self.all_tensors()
            return
        for name, parameter in self._trained.items():
            with _gathered(parameter):
                yield name, parameter.detach()

    def all_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (state-dict name, full tensor) of all weights, frozen ones too, each valid until the next."""
        for name, parameter in self._names.items():
            with _gathered(parameter):
                yield from split_fused(self.network, name, parameter.detach())
        yield from stored_buffers(self.network)

    def optimizer_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (`<state>.<parameter name>`, full tensor) of AdamW's states, one at a time."""
        from deepspeed.utils import safe_get_full_optimizer_state

        num_updates = self._zero.optimizer.state[self._partitions()[0]]["step"]
        for name, parameter in self._trained.items():
            yield f"step.{name}", num_updates.clone()
            for key in _STATES:
                yield f"{key}.{name}", safe_get_full_optimizer_state(parameter, key)

    def load_tensors(self, model: Mapping[str, torch.Tensor], optimizer: Mapping[str, torch.Tensor]) -> None:
        """Load tensors of `model_tensors` and `optimizer_tensors`, from any number of ranks.

        Raises:
            StorageError: if they are not those of this network and this optimizer.
        """
        try:
            kept = self._names if self.network.lora is None else self._trained
            for name, parameter in kept.items():
                _fill(parameter, join_parts(self.network, name, model), name)
            for name, buffer in stored_buffers(self.network) if self.network.lora is None else ():
                buffer.copy_(model[name])
        except KeyError as error:
            raise StorageError(f"not a checkpoint of this model: {error.args[0]} is missing") from None
        self._zero.refresh_fp32_params()
        self._load_states(optimizer)

    def _pack(self, pack: Pack | None) -> Pack:
        return (self._empty_pack if pack is None else pack).to(self.network.device)

    def _forget_sums(self) -> None:
        self._loss_sum = no_loss(self.network)
        self._weight_sum = 0.0

    def _partitions(self) -> list[torch.Tensor]:
        """Return the flat float32 tensors that this rank's optimizer updates."""
        zero = self._zero
        return zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups

    def _reset_states(self, num_updates: torch.Tensor) -> None:
        """Set moments to 0, as torch's AdamW makes them, for parameters with this number () of updates."""
        base = self._zero.optimizer
        base.state.clear()
        for flat in self._partitions():
            step = num_updates.to(flat.device, copy=True)  # a copy for each: it is added to in place
            base.state[flat] = {"step": step, **{key: torch.zeros_like(flat) for key in _STATES}}
        if self._stage < 3:
            # DeepSpeed does so after the first group's first step, when the other groups have no states yet.
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def _load_states(self, tensors: Mapping[str, torch.Tensor]) -> None:
        # Older checkpoints of one process count fewer updates of parameters that some step did not reach.
        updates = [tensors[name] for name in tensors if name.startswith("step.")]
        self._reset_states(torch.stack(updates).max() if updates else torch.zeros(()))
        for full_name in tensors:
            key, _, name = full_name.partition(".")
            if name not in self._trained or key not in ("step", *_STATES):
                raise StorageError(
                    f"optimizer state {full_name}: not one of float32 AdamW's on these parameters; the checkpoint is "
                    "of another model, or of other settings of model or optim; use those, or a new run.dir"
                )
            if key != "step":
                _check_shape(tensors[full_name], self._trained[name], f"optimizer state {full_name}")
                self._set_state(self._trained[name], tensors[full_name], key)

    def _set_state(self, parameter: nn.Parameter, value: torch.Tensor, key: str) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self._stage < 3:
            safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)
            return
        # The function for whole tensors fails if the ranks' shares differ in size.
        share = parameter.ds_tensor.numel()
        padded = torch.zeros(share * self.num_ranks, dtype=value.dtype)
        padded[: value.numel()] = value.flatten()
        mine = padded[share * self.rank : share * (self.rank + 1)]
        safe_set_local_optimizer_state(parameter, mine.to(parameter.device), key)


def load_divided(network: RewardNetwork, files: Backbone, pick_dtype: PickDtype, config: Config) -> None:
    """Read a backbone under ZeRO-3: each weight is divided over the ranks before the next one is read.

    The first rank reads; the others get each weight from it, whole, and keep their part. So no rank ever holds more
    than its part of the model and one weight, and the files are read once.

    Args:
        network: with the backbone of `files`, frozen and fused as it is to be, and its head.

    Raises:
        ConfigError: for what is not possible on several ranks.
        StorageError: on the first rank, if a file cannot be read to the end.
    """
    _refuse(config)
    device = pick_device(config.run.device)
    deepspeed = _import_deepspeed(device)
    # This divides the head, and gives its parameters the method that divides others. A judge has none.
    head = network.score if len(list(network.score.parameters())) else nn.Linear(1, 1)
    deepspeed.zero.Init(module=head, config_dict_or_path=_settings(network, config), dtype=torch.float32)
    known = next(head.parameters())

    def divide(parameter: nn.Parameter) -> None:
        known.convert_to_zero_parameters(param_list=[parameter])

    reads = dist.get_rank() == 0
    files.load(pick_dtype, device, reads=reads, placed=lambda _, parameter: divide(parameter))
    if network.lm_head is not None:
        load_lm_head(network.lm_head, files, pick_dtype, device, reads=reads)
        divide(network.lm_head.weight)


def _import_deepspeed(device: torch.device):
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    import deepspeed

    # DeepSpeed would compile collectives for CPUs here, with any compiler that it finds; gloo has its own.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed calls collectives by names of which newer versions of torch warn at every step.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed


def _initialize(network: RewardNetwork, config: Config):
    """Return DeepSpeed's engine around a network."""
    deepspeed = _import_deepspeed(network.device)
    engine, *_ = deepspeed.initialize(
        model=network, optimizer=make_optimizer(network, config.optim), config=_settings(network, config),
        dist_init_required=False,
    )  # fmt: skip
    # Parameters that we read without a call of the module they are in (the head, the final norm, patch embeddings,
    # InternVL's layer scales) need no registration: DeepSpeed gathers them when they are first read in a forward pass.
    return engine


def _settings(network: RewardNetwork, config: Config) -> dict:
    """Return DeepSpeed's configuration."""
    stage = config.engine.zero_stage
    num_trained = sum(math.prod(whole_shape(parameter)) for parameter in trainable(network).values())
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # a step is all work between two calls of `step`
        "gradient_clipping": config.optim.max_grad_norm,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": min(BUCKET, num_trained)},
    }
    if config.precision.dtype == "bf16":
        # Like one process: float32 weights, which matrix products read in bfloat16. No module is named safe
        # for lower precision: their gradients would be summed over the ranks in bfloat16.
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return settings


def _refuse(config: Config) -> None:
    """Refuse what DeepSpeed cannot do, before anything is divided.

    Raises:
        ConfigError: naming the key and what to set.
    """
    wanted = {"optim.states": (config.optim.states, "fp32", "it divides flat float32 states over the ranks")}
    if config.model.quantize is not None:
        wanted["model.quantize"] = (config.model.quantize, None, "it divides float32 weights")
    if config.precision.weights == "bf16":
        wanted["precision.weights"] = ("bf16", "fp32", "it keeps float32 weights")
    if config.engine.zero_stage == 3:
        why = "with engine.zero_stage 3 the weights of a layer are gathered between its operations"
        wanted["compile"] = (config.compile, "off", why)
    for key, (found, needed, why) in wanted.items():
        if found != needed:
            way = "remove the key" if needed is None else f"set {key}: {needed}"
            raise ConfigError(f"{key}: {found} is not possible on several ranks ({why}); {way}")


def _pack_of_one_token(multiple: int, encoder: ConversationEncoder | None) -> Pack:
    """Return a pack of one response of one token, without preferences and without anything to learn."""
    response = EncodedResponse(np.zeros(1, dtype=np.int64), (), 1, turn=(1, 1))
    turns = None if encoder is None else encoder.turns
    return build_pack([EncodedGroup("", "", "", (response,))], {}, multiple=multiple, turns=turns)


def _gathered(parameter: nn.Parameter, modifier_rank: int | None = None):
    """Return a context in which the whole parameter is there; rank `modifier_rank`'s changes are kept by all."""
    import deepspeed

    is_divided = hasattr(parameter, "ds_id")
    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=modifier_rank, enabled=is_divided)


@torch.no_grad()
def _fill(parameter: nn.Parameter, value: torch.Tensor, name: str) -> None:
    _check_shape(value, parameter, name)
    with _gathered(parameter, modifier_rank=0):
        if not hasattr(parameter, "ds_id") or dist.get_rank() == 0:
            parameter.copy_(value)


def _check_shape(value: torch.Tensor, parameter: nn.Parameter, name: str) -> None:
    if value.shape != (shape := whole_shape(parameter)):
        raise StorageError(
            f"not a checkpoint of this model: {name}: got shape {tuple(value.shape)}, wanted {tuple(shape)}"
        )

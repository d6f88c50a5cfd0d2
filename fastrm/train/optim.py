"""The optimizer AdamW with decay on weight matrices only, the storage of weights, and the learning rate."""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from fastrm.config import Config, OptimConfig, PrecisionConfig
from fastrm.errors import ConfigError, StorageError
from fastrm.model.fusion import whole_shape
from fastrm.model.loading import PickDtype, stored_dtype
from fastrm.model.lora import is_adapter_weight, nf4_weights
from fastrm.train.compact_adamw import BLOCK, CompactAdamW, is_quantizable

_OTHER = "the checkpoint is of another model, or of other settings of model or optim; use those, or a new run.dir"


def make_optimizer(network: nn.Module, settings: OptimConfig) -> torch.optim.AdamW:
    """Make torch's AdamW over all trainable parameters, in the order of `named_parameters`.

    Decay applies to the weights of linear and convolution layers. Biases, norms and embeddings have
    none: pulling them to zero is not regularisation but a change of the function.
    """
    return _torch_adamw(_groups(network, settings, trainable(network)), settings)


def make_optimizers(network: nn.Module, config: Config) -> list[torch.optim.Optimizer]:
    """Make the optimizers of one process: torch's AdamW for parameters wholly in float32, ours for the rest.

    With optim.states fp32 and float32 weights that is torch's alone.

    Raises:
        ConfigError: if ours needs something that is not installed.
    """
    settings = config.optim
    compact = {
        name
        for name, parameter in backbone_matrices(network).items()
        if parameter.requires_grad
        and (parameter.dtype is torch.bfloat16 or (settings.states == "8bit" and is_quantizable(parameter)))
    }
    optimizers: list[torch.optim.Optimizer] = []
    if rest := set(trainable(network)) - compact:
        optimizers.append(_torch_adamw(_groups(network, settings, rest), settings))
    if compact:
        optimizers.append(
            CompactAdamW(
                _groups(network, settings, compact),
                lr=settings.lr, betas=settings.betas, eps=settings.eps, states=settings.states, seed=config.run.seed,
            )
        )  # fmt: skip
    return optimizers


def trainable(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters with a gradient, by name."""
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def backbone_matrices(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights of linear and convolution layers of the backbone, an LM head's of its own among them, by name.

    Frozen ones and adapters' are there too.

    They are 93 % of Qwen2.5-VL-7B, and all that may be stored in bfloat16 or have 8-bit moments:
    autocast reads them in bfloat16 in any case. Norms and biases are small, and their values near 1 are
    where bfloat16 is coarsest. An embedding is not multiplied but added to the float32 residual stream;
    most of its rows get no gradient in a step, and 8-bit second moments are unstable there (Dettmers et
    al. 2022, section 2.3); so is an LM head that is tied to it. The reward head is new, small, and runs in float32.
    """
    embeddings, parts = _embeddings(network), ("model.", "lm_head.")
    return {
        name: parameter
        for name, parameter in network.named_parameters()
        if name.startswith(parts) and len(whole_shape(parameter)) >= 2 and id(parameter) not in embeddings
    }


def storage_dtype(network: nn.Module, precision: PrecisionConfig, alone: bool) -> PickDtype:
    """Return a function that says in which dtype a weight from files is held for training.

    float32, but for backbone matrices under precision.weights bf16, and under auto for the frozen weights of linear and
    convolution layers: these keep the two bytes an element that their files have. Autocast reads them in bfloat16
    in any case, so that every product is the same to the bit.

    Args:
        network: with its parts frozen. Its weights may be on the meta device.
        alone: one process; DeepSpeed takes float32 only.

    Returns:
        a function of the name in the backbone, its parameter and the dtype of the files.
    """
    layers = (nn.Linear, nn.Conv2d, nn.Conv3d)
    multiplied = {id(module.weight) for module in network.modules() if isinstance(module, layers)}
    matrices = {name.removeprefix("model.") for name in backbone_matrices(network)}
    keeps = precision.weights == "auto" and precision.dtype == "bf16" and alone

    def pick(name: str, parameter: nn.Parameter, stored: torch.dtype) -> torch.dtype:
        if precision.weights == "bf16" and name in matrices and not is_adapter_weight(name):
            return torch.bfloat16
        is_kept = keeps and stored.itemsize == 2 and id(parameter) in multiplied and not parameter.requires_grad
        return stored if is_kept else torch.float32

    return pick


def store_matrices_in_bf16(network: nn.Module) -> None:
    """Round `backbone_matrices` but adapters to bfloat16, in place; their gradients accumulate in float32.

    A pack's gradient of a matrix is a bfloat16 product of autocast with either storage. Summed over
    packs in bfloat16, it would depend on how a step is cut into packs.
    """
    for name, parameter in backbone_matrices(network).items():
        if is_adapter_weight(name) or not parameter.is_floating_point():
            continue
        parameter.data = parameter.data.to(torch.bfloat16)
        if parameter.requires_grad:
            parameter.grad_dtype = torch.float32


def state_tensors(optimizers: list[torch.optim.Optimizer]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (`<state>.<parameter name>`, tensor) of every state of every parameter that was ever updated."""
    for optimizer in optimizers:
        for name, parameter in _named(optimizer):
            for key, tensor in optimizer.state.get(parameter, {}).items():
                yield f"{key}.{name}", tensor


def load_state_tensors(optimizers: list[torch.optim.Optimizer], tensors: Mapping[str, torch.Tensor]) -> None:
    """Replace all states by those of `state_tensors`, from any device.

    Raises:
        StorageError: if the tensors are not those of these optimizers.
    """
    found: dict[str, set[str]] = {}
    for full_name in tensors:
        key, _, name = full_name.partition(".")
        found.setdefault(name, set()).add(key)
    for optimizer in optimizers:
        optimizer.state.clear()
        for name, parameter in _named(optimizer):
            if name not in found:
                continue
            state = _new_state(optimizer, parameter)
            if (keys := found.pop(name)) != state.keys():
                raise StorageError(f"optimizer state of {name}: got {_list(keys)}, wanted {_list(state)}; {_OTHER}")
            for key, tensor in state.items():
                saved = tensors[f"{key}.{name}"]
                if saved.shape != tensor.shape:
                    raise StorageError(
                        f"optimizer state {key}.{name}: got shape {tuple(saved.shape)}, wanted {tuple(tensor.shape)}; "
                        f"{_OTHER}"
                    )
                tensor.copy_(saved)
            optimizer.state[parameter] = state
    if found:
        raise StorageError(f"optimizer state of {min(found)}: no such parameter is trained here; {_OTHER}")


@dataclass(frozen=True)
class TrainingBytes:
    """The bytes of one process's training state, between two steps except for the gradients."""

    weights: int
    gradients: int
    states: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.states


def training_bytes(network: nn.Module, config: Config) -> TrainingBytes:
    """Compute the exact size of all weights, gradients and AdamW states under a configuration.

    Per trained element 4 + 4 + 8 bytes (weight, gradient, moments). Of a backbone matrix the weight may
    take 2 (precision.weights bf16), the moments 2 + 8 / 256 (optim.states 8bit). A frozen element has its
    weight alone, of a matrix in 2 bytes where `storage_dtype` keeps it so.

    Args:
        network: may be on the meta device; the dtypes that its weights have now do not count, but those of the files
            of model.path, or bfloat16 where they are not here.
    """
    matrices = backbone_matrices(network)
    pick_dtype, stored = storage_dtype(network, config.precision, alone=True), stored_dtype(config.model.path)
    weights = gradients = states = 0
    packed = nf4_weights(network) if config.model.quantize is not None else set()
    for name, parameter in network.named_parameters():
        size, is_matrix = parameter.numel(), name in matrices
        if id(parameter) in packed:
            weights += size // 2 + 4 * size // 64  # and a float32 scale for each block
            continue
        is_backbone = name.startswith(("model.", "lm_head."))
        weights += size * (pick_dtype(name.removeprefix("model."), parameter, stored).itemsize if is_backbone else 4)
        if parameter.requires_grad:
            gradients += 4 * size
            quantized = is_matrix and config.optim.states == "8bit" and is_quantizable(parameter)
            states += 4 + (2 * (size + 4 * size // BLOCK) if quantized else 8 * size)  # 4: the number of updates
    return TrainingBytes(weights, gradients, states)


def learning_rate(step: int, num_steps: int, settings: OptimConfig) -> float:
    """Return the rate of step 0 <= step < num_steps: linear warm-up from 0, then as optim.schedule says.

    Behind the warm-up, with progress x from 0 to 1, these are the formulas of transformers' `get_scheduler`: cosine,
    (1 + cos(pi x)) / 2; linear, 1 - x; wsd (warmup_stable_decay, by a cosine), 1 before the last decay_ratio of the
    steps. Transformers begins its warm-up with a step of rate 0, and is one step later throughout it.
    """
    num_warmup = math.ceil(settings.warmup_ratio * num_steps)
    if step < num_warmup:
        return settings.lr * (step + 1) / num_warmup
    if settings.schedule == "constant":
        return settings.lr
    start = num_warmup
    if settings.schedule == "wsd":
        start = max(num_warmup, num_steps - math.ceil(settings.decay_ratio * num_steps))
    progress = max(0, step - start) / max(1, num_steps - start)
    share = 1.0 - progress if settings.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return settings.lr * (settings.min_lr_ratio + (1.0 - settings.min_lr_ratio) * share)


def check_lr_parts(network: nn.Module, settings: OptimConfig) -> None:
    """Refuse a learning rate for a part that the network lacks, or of which nothing is trained.

    Raises:
        ConfigError: naming the part.
    """
    network.check_parts(settings.lr_parts, "optim.lr_parts", "name language and head only")
    for part in settings.lr_parts:
        if not any(parameter.requires_grad for parameter in network.parameters_of(part)):
            raise ConfigError(f"optim.lr_parts: no weight of {part} is trained; leave {part} out")


def part_rates(lr: float, settings: OptimConfig) -> dict[str, float]:
    """Return the rates of the parts that have their own, as metrics.jsonl names them, where the others have `lr`."""
    return {f"lr/{part}": lr * (peak / settings.lr) for part, peak in settings.lr_parts.items()}


def _groups(network: nn.Module, settings: OptimConfig, names: Collection[str]) -> list[dict]:
    """Return groups of the named trainable parameters: those with decay, those without; of each part with its own rate.

    `lr_scale` of a group is its rate in units of the step's.
    """
    embeddings = _embeddings(network)
    members = {part: network.parameters_of(part) for part in settings.lr_parts}
    scales = {id(p): settings.lr_parts[part] / settings.lr for part, own in members.items() for p in own}
    groups: dict[tuple[float, bool], list] = {}
    for name, parameter in trainable(network).items():
        if name in names:
            has_decay = len(whole_shape(parameter)) >= 2 and id(parameter) not in embeddings
            groups.setdefault((scales.get(id(parameter), 1.0), has_decay), []).append((name, parameter))
    return [
        {"params": groups[scale, decays], "weight_decay": settings.weight_decay * decays, "lr_scale": scale}
        for scale, decays in sorted(groups, key=lambda key: (key[0], not key[1]))
    ]


def _torch_adamw(groups: list[dict], settings: OptimConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=settings.lr, betas=tuple(settings.betas), eps=settings.eps, fused=True)


def _embeddings(network: nn.Module) -> set[int]:
    return {id(module.weight) for module in network.modules() if isinstance(module, nn.Embedding)}


def _named(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
    for group in optimizer.param_groups:
        yield from zip(group["param_names"], group["params"], strict=True)


def _new_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    """Return the state of a parameter before its first update."""
    if isinstance(optimizer, CompactAdamW):
        return optimizer.new_state(parameter)
    # The same as in torch's fused AdamW.
    step = torch.zeros((), dtype=torch.float32, device=parameter.device)
    return {"step": step, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))

"""Low-rank adapters in a network: PEFT's layers around the stock ones, and what of such a network is trained and kept.

PEFT replaces a linear layer by a module that computes `base_layer(x) + scale * B(A(x))`; the layers of layers.py call
it as they call any linear layer, and nothing of LoRA is computed here. All other weights of the backbone are frozen.
The head is trained whole. A network with adapters has no weights by stock names; `kept_tensors` gives what a
checkpoint or an export holds of it. A network is a RewardNetwork (network.py) throughout.
"""

import importlib.util
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from fastrm.errors import ConfigError, StorageError
from fastrm.json_files import to_json
from fastrm.lora_config import LoraConfig
from fastrm.model.experts import has_experts
from fastrm.model.places import ModelPlace

NAME = "default"  # PEFT's name of an adapter


def add_lora(
    network: nn.Module, settings: LoraConfig, targets: Sequence[str] | None = None, base: str | None = None
) -> None:
    """Put adapters on linear layers of a network, in place, and freeze its backbone; their weights are float32.

    A starts at random from torch's global generator and B at 0, so that rewards do not change. On the meta device the
    adapters are there too.

    Args:
        network: its weights loaded, on their device, in FP8 or quantised if they are to be; not compiled yet.
        targets: names of the layers in the network; None: as the settings say.
        base: the folder or hub id of the base model, which adapter_config.json is to name.

    Raises:
        ConfigError: if PEFT is missing, the model has experts, or a target matches no layer.
    """
    if any(map(has_experts, network.modules())):
        raise ConfigError(
            f"model.lora: {network.model.config.model_type} has experts, for which PEFT would take adapters of other "
            "layers; leave model.lora out, and train it whole"
        )
    names = choose_targets(network, settings) if targets is None else list(targets)
    peft = _import_peft()
    alpha = settings.alpha_or_default
    config = peft.LoraConfig(
        r=settings.rank, lora_alpha=int(alpha) if alpha == int(alpha) else alpha, lora_dropout=settings.dropout,
        base_model_name_or_path=base, target_modules=names, use_dora=settings.dora, use_rslora=settings.rslora,
    )  # fmt: skip
    peft.inject_adapter_in_model(config, network, NAME, low_cpu_mem_usage=network.device.type == "meta")
    network.score.requires_grad_(True)
    network.lora = settings
    for name, parameter in network.named_parameters():
        if is_adapter_weight(name):  # PEFT makes them in the dtype of the layer's own weight
            parameter.data = parameter.data.float()
    draws_random = settings.dropout > 0
    for layer in (*network.language.layers, *(network.tower.blocks if network.tower else ())):
        layer.draws_random = draws_random
    for module in network.modules():
        # Under autocast the input would be widened to float32 and rounded back; the product is the same to the bit.
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.cast_input_dtype_enabled = False


def _import_peft():
    # PEFT imports bitsandbytes where it is, which warns on CPUs of a faster product that nothing here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import peft
    except ImportError as error:
        message = f'model.lora needs PEFT, which does not load here ({error}); pip install "fastrm[lora]"'
        raise ConfigError(message) from None
    return peft


def base_of(place: ModelPlace) -> str:
    """Return the name of a base model for adapter_config.json: a folder by its whole path, or a hub id.

    Raises:
        ConfigError: for an adapter, on which PEFT puts no other.
    """
    if place.adapter is not None:
        raise ConfigError(
            f"model.path {place.given}: is an adapter, and model.lora would put another one on it; merge it first: "
            f"fastrm export {place.given} --out MERGED --for transformers, then model.path: MERGED"
        )
    return str(Path(place.base).absolute()) if Path(place.base).exists() else place.base


def choose_targets(network: nn.Module, settings: LoraConfig) -> list[str]:
    """Return the names in a network of the linear layers that the settings give adapters to.

    Raises:
        ConfigError: for a target that matches none, naming those that there are, or `vision` without a tower.
    """
    if settings.vision and network.tower is None:
        raise ConfigError(f"model.lora.vision: {network.model.config.model_type} has no vision tower; remove the key")
    names = list(linear_layers(network, settings.vision))
    if settings.targets == "all-linear":
        return names
    wanted = settings.targets
    for target in wanted:
        if not any(_ends_with(name, target) for name in names):
            there = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
            raise ConfigError(
                f"model.lora.targets: {target!r} is the end of no linear layer's name; there are {there}; or set "
                "all-linear"
            )
    return [name for name in names if any(_ends_with(name, target) for target in wanted)]


def _ends_with(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


def linear_layers(network: nn.Module, vision: bool = False) -> dict[str, nn.Linear]:
    """Return the linear layers of the language model's layers by name, without what adapters have brought.

    Args:
        vision: those of the vision tower and its projector as well.
    """
    parts = list(network.language.layers)
    if vision:
        parts += [network.tower.module, network.tower.projector]
    inside = {id(module) for part in parts for module in part.modules() if isinstance(module, nn.Linear)}
    return {name: module for name, module in network.named_modules() if id(module) in inside and ".lora_" not in name}


def nf4_layers(language: nn.Module) -> dict[str, nn.Linear]:
    """Return the layers that model.quantize stores in NF4, by their names in a stock language model.

    Those whose inputs are no multiple of 64 are left as they are: bitsandbytes on a CPU reads their blocks wrongly.
    """
    found = {name: part for name, part in language.named_modules() if isinstance(part, nn.Linear)}
    inside = {name: part for name, part in found.items() if name.startswith("layers.") and not is_adapter_weight(name)}
    return {name: part for name, part in inside.items() if part.in_features % 64 == 0}


def nf4_weights(network: nn.Module) -> set[int]:
    """Return the ids of the weights that model.quantize stores in NF4, of a network that is not quantised yet."""
    return {id(layer.weight) for layer in nf4_layers(network.language).values()}


def require_bitsandbytes() -> None:
    """Raise ConfigError if bitsandbytes is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            'model.quantize nf4 needs bitsandbytes, which is not installed here; pip install "fastrm[qlora]", or '
            "remove the key"
        )


def plain_state(network: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of the state dict, with weights as their layers multiply with them where these quantise."""
    quantised = {f"{name}.weight": module for name, module in quantised_modules(network).items()}
    for name, tensor in network.state_dict().items():
        yield name, quantised[name].dequantize() if name in quantised else tensor


def num_elements(parameter: nn.Parameter) -> int:
    """Return the number of a parameter's elements, of which NF4 packs two into a byte."""
    return parameter.numel() * (2 if parameter.dtype is torch.uint8 else 1)


def quantised_modules(network: nn.Module) -> dict[str, nn.Module]:
    """Return the layers in NF4 of a network, or of a part of one, by name."""
    return {name: module for name, module in network.named_modules() if hasattr(module, "quant_state")}


def is_adapter_weight(name: str) -> bool:
    """Return whether a parameter's or module's name in a network is that of an adapter's part."""
    return ".lora_" in name


def lora_modules(network: nn.Module) -> dict[str, nn.Module]:
    """Return PEFT's layers of a network, or of a part of one, by name; none without adapters."""
    return {name: module for name, module in network.named_modules() if hasattr(module, "lora_A")}


def kept_tensors(network: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of all that a run keeps: the state dict, or under adapters the trained weights alone."""
    if network.lora is None:
        yield from network.state_dict().items()
    else:
        yield from ((name, p.detach()) for name, p in network.named_parameters() if p.requires_grad)


def load_kept_tensors(network: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Load what `kept_tensors` gave.

    Raises:
        StorageError: if they are not those of this network.
    """
    if network.lora is not None and (wanted := {name for name, _ in kept_tensors(network)}) != set(tensors):
        odd = min(wanted ^ set(tensors))
        raise StorageError(f"not a checkpoint of this model: {odd} is {'missing' if odd in wanted else 'unexpected'}")
    try:
        network.load_state_dict(tensors, strict=network.lora is None)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise StorageError(f"not a checkpoint of this model: {reason}") from None


def adapter_files(network: nn.Module, tensors: Mapping[str, torch.Tensor], **settings) -> tuple[str, dict]:
    """Return the text of adapter_config.json, and the adapter's tensors by PEFT's names in files.

    The names are those in a stock model whose base model is `model`: transformers' classes for causal language models,
    for sequence classification and for images and text.

    Args:
        tensors: what `kept_tensors` gives.
        settings: of PEFT's LoraConfig besides those that it was made with.
    """
    import peft

    config = network.peft_config[NAME].to_dict() | {"inference_mode": True} | settings
    adapter = {name: tensor for name, tensor in tensors.items() if is_adapter_weight(name)}
    named = peft.get_peft_model_state_dict(network, adapter, NAME, save_embedding_layers=False)
    files = {f"base_model.model.{name}": tensor for name, tensor in named.items()}
    return to_json(config, indent=2, sort_keys=True, default=_plain) + "\n", files


def _plain(value):
    return sorted(value) if isinstance(value, set | frozenset) else str(getattr(value, "value", value))

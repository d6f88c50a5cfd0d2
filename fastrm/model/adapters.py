"""LoRA adapters in PEFT's files, added to the base model's weights while these are read.

    W' = W + scale * B @ A,    scale = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora

(Hu et al., arXiv 2106.09685; Kalajdzievski, arXiv 2312.03732). The sum is made in float32, some rows at a time, and
rounded once. Modules that were trained whole (modules_to_save, biases) take the place of the base model's. The files
are those of https://huggingface.co/docs/peft/developer_guides/checkpoint; what else PEFT can do to a model is refused
by the name of its setting.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from fastrm.errors import ConfigError, StorageError
from fastrm.model.places import ADAPTER_CONFIG, ModelPlace, read_json
from fastrm.model.weight_files import CHUNK_BYTES, StoredTensor, finder, read_header

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PART = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")
# Settings that do not change the merged weights, or are read below. Any other one that is set is refused.
_KNOWN = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "eva_config",
    "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core", "modules_to_save", "peft_type", "peft_version",
    "qalora_group_size", "r", "rank_pattern", "revision", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
# Initialisations that change the base model's own weights.
_CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")


@dataclass(frozen=True)
class MergedTensor(StoredTensor):
    """A matrix in a file with a low-rank product added to it.

    Attributes:
        down: A, (r, columns).
        up: B, (rows, r).
        scale: of the product.
    """

    down: StoredTensor
    up: StoredTensor
    scale: float

    def read_into(self, out: torch.Tensor, first: int = 0) -> None:
        """Fill `out` as `StoredTensor.read_into`.

        At most twice CHUNK_BYTES are held besides `out`, and A and B in float32.
        """
        down, up = self.down.read().float(), self.up.read().float() * self.scale
        columns = self.shape[1]
        step = max(1, CHUNK_BYTES // 4)
        for begin in range(first, first + out.numel(), step):
            end = min(begin + step, first + out.numel())
            part = torch.empty(end - begin)
            super().read_into(part, begin)
            rows = begin // columns, -(-end // columns)
            product = (up[slice(*rows)] @ down).view(-1)
            part += product[begin - rows[0] * columns : end - rows[0] * columns]
            out[begin - first : end - first].copy_(part)


@dataclass(frozen=True)
class Adapter:
    """The weights of an adapter, by the names that their modules have in the model that it was trained on.

    Attributes:
        where: its folder or hub id.
        products: module -> (A, B, scale).
        replaced: name of a whole weight -> the weight that takes its place.
    """

    where: str
    products: dict[str, tuple[StoredTensor, StoredTensor, float]]
    replaced: dict[str, StoredTensor]

    @classmethod
    def open(cls, place: ModelPlace) -> "Adapter":
        """Read settings and headers of an adapter.

        Raises:
            ConfigError: for kinds of adapters, or settings, that are not merged here.
            StorageError: for weights that are missing or damaged.
        """
        settings = read_json(place.adapter, ADAPTER_CONFIG)
        _check(place.adapter, settings)
        file = finder(place.adapter)(WEIGHTS)
        if file is None:
            raise StorageError(
                f"{place.adapter}: has {ADAPTER_CONFIG} but no {WEIGHTS}; other formats can run code and are not read: "
                "save the adapter again with PEFT's save_pretrained"
            )
        parts: dict[str, dict[str, StoredTensor]] = {}
        replaced, unknown = {}, []
        for name, tensor in read_header(file).items():
            plain = name.removeprefix(_PREFIX)
            if match := _PART.fullmatch(plain):
                parts.setdefault(match[1], {})[match[2]] = tensor
            elif plain == name or "lora_" in plain:
                unknown.append(name)
            else:
                replaced[re.sub(r"\.(modules_to_save(\.default)?|base_layer)(?=\.)", "", plain)] = tensor
        unknown += [f"{module}.lora_*" for module, found in parts.items() if found.keys() != {"A", "B"}]
        if unknown:
            raise ConfigError(
                f"{file}: {', '.join(unknown[:3])}{' ...' * (len(unknown) > 3)}: not the two matrices of a linear "
                "layer's LoRA; merge the adapter with PEFT's merge_and_unload and save the model"
            )
        if not parts and not replaced:
            raise StorageError(f"{file}: holds no weight, and would leave the base as it is; save the adapter again")
        return cls(place.adapter, {name: _product(file, name, p, settings) for name, p in parts.items()}, replaced)


def _check(where: str, settings: dict) -> None:
    """Refuse an adapter that is no plain LoRA, by the name of the setting."""
    refused = {name: value for name, value in settings.items() if value and name not in _KNOWN}
    if settings.get("peft_type") != "LORA":
        refused["peft_type"] = settings.get("peft_type")
    started = settings.get("init_lora_weights")
    if isinstance(started, str) and started.lower().startswith(_CHANGES_BASE):
        refused["init_lora_weights"] = started
    if settings.get("revision") and not Path(str(settings.get("base_model_name_or_path"))).is_dir():
        refused["revision"] = settings["revision"]
    if refused:
        name, value = next(iter(refused.items()))
        raise ConfigError(
            f"{where}/{ADAPTER_CONFIG}: {name} is {value!r}; only plain LoRA of linear layers is merged here: merge "
            "the adapter with PEFT's merge_and_unload and save the model"
        )


def _product(file: Path, module: str, parts: dict[str, StoredTensor], settings: dict):
    """Return (A, B, scale) of one module."""
    down, up = parts["A"], parts["B"]
    rank = _by_pattern(settings.get("rank_pattern"), module, settings.get("r"))
    alpha = _by_pattern(settings.get("alpha_pattern"), module, settings.get("lora_alpha"))
    if not isinstance(rank, int) or not isinstance(alpha, (int, float)):
        raise ConfigError(
            f"{file.parent / ADAPTER_CONFIG}: r is {rank!r} and lora_alpha {alpha!r} for {module}, wanted two numbers; "
            "copy the file from where the adapter was trained"
        )
    if len(down.shape) != 2 or len(up.shape) != 2 or not down.shape[0] == up.shape[1] == rank:
        raise StorageError(
            f"{file}: {module}: A is {list(down.shape)} and B {list(up.shape)}, wanted matrices of rank {rank}, as "
            f"{ADAPTER_CONFIG} says; the two files are not of one adapter"
        )
    return down, up, alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _by_pattern(patterns: dict | None, module: str, default):
    """Return a module's value by PEFT's rule: the first pattern that matches whole parts at the end of its name."""
    return next((value for key, value in (patterns or {}).items() if re.fullmatch(rf"(.*\.)?({key})", module)), default)

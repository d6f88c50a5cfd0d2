"""LoRA adapters in PEFT's files, added to the base model's weights while these are read.

    W' = W + scale * B @ A,    scale = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora

(Hu et al., arXiv 2106.09685; Kalajdzievski, arXiv 2312.03732). With use_dora each row of W' is scaled to the length
that was trained for it (Liu et al., arXiv 2402.09353). The sum is made in float32, some rows at a time, and rounded
once. Modules that were trained whole (modules_to_save, biases) take the place of the base model's. The files
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
_PART = re.compile(r"(.+)\.lora_(?:([AB])(?:\.default)?\.weight|(magnitude_vector)(?:\.default)?(?:\.weight)?)")
# Settings that do not change the merged weights, or are read below. Any other one that is set is refused.
_KNOWN = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "eva_config",
    "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core", "modules_to_save", "peft_type", "peft_version",
    "qalora_group_size", "r", "rank_pattern", "revision", "target_modules", "task_type", "use_dora",
    "use_rslora",
}  # fmt: skip
# Initialisations that change the base model's own weights.
_CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")


@dataclass(frozen=True)
class Product:
    """A low-rank product that an adapter adds to a matrix (rows, columns).

    Attributes:
        down: A, (r, columns).
        up: B, (rows, r).
        scale: of the product.
        lengths: (rows,) of the rows of the sum; None: they are as they come out.
    """

    down: StoredTensor
    up: StoredTensor
    scale: float
    lengths: StoredTensor | None = None


@dataclass(frozen=True)
class MergedTensor(StoredTensor):
    """A matrix in a file with an adapter's product added to it."""

    base: StoredTensor
    product: Product

    def read_into(self, out: torch.Tensor, first: int = 0) -> None:
        """Fill `out` as `StoredTensor.read_into`.

        At most twice CHUNK_BYTES, or twice a row, are held besides `out`, and A and B in float32.
        """
        product, columns, end = self.product, self.shape[1], first + out.numel()
        down, up = product.down.read().float(), product.up.read().float() * product.scale
        lengths = None if product.lengths is None else product.lengths.read().float()
        bottom, step = -(-end // columns), max(1, CHUNK_BYTES // (4 * columns))
        for top in range(first // columns, bottom, step):
            rows = slice(top, min(top + step, bottom))
            part = torch.empty(rows.stop - top, columns)
            self.base.read_into(part.view(-1), top * columns)
            part += up[rows] @ down
            if lengths is not None:
                part *= (lengths[rows] / part.norm(dim=1))[:, None]
            wanted = slice(max(first, top * columns), min(end, rows.stop * columns))
            piece = part.view(-1)[wanted.start - top * columns : wanted.stop - top * columns]
            out[wanted.start - first : wanted.stop - first].copy_(piece)


@dataclass(frozen=True)
class Adapter:
    """The weights of an adapter, by the names that their modules have in the model that it was trained on.

    Attributes:
        where: its folder or hub id.
        products: by module.
        replaced: name of a whole weight -> the weight that takes its place.
    """

    where: str
    products: dict[str, Product]
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
                parts.setdefault(match[1], {})[match[2] or match[3]] = tensor
            elif plain == name or "lora_" in plain:
                unknown.append(name)
            else:
                replaced[re.sub(r"\.(modules_to_save(\.default)?|base_layer)(?=\.)", "", plain)] = tensor
        wanted = {"A", "B", *(["magnitude_vector"] if settings.get("use_dora") else [])}
        unknown += [f"{module}.lora_*" for module, found in parts.items() if found.keys() != wanted]
        if unknown:
            raise ConfigError(
                f"{file}: {', '.join(unknown[:3])}{' ...' * (len(unknown) > 3)}: not the matrices of a linear "
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


def _product(file: Path, module: str, parts: dict[str, StoredTensor], settings: dict) -> Product:
    """Return what the adapter does to one module."""
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
    lengths = parts.get("magnitude_vector")
    if lengths is not None and lengths.shape != up.shape[:1]:
        raise StorageError(
            f"{file}: {module}: lora_magnitude_vector has shape {list(lengths.shape)}, wanted {list(up.shape[:1])}; "
            "the file is damaged, save the adapter again"
        )
    return Product(down, up, alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank), lengths)


def _by_pattern(patterns: dict | None, module: str, default):
    """Return a module's value by PEFT's rule: the first pattern that matches whole parts at the end of its name."""
    return next((value for key, value in (patterns or {}).items() if re.fullmatch(rf"(.*\.)?({key})", module)), default)

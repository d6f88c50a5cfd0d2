"""Stock backbones from their files: every weight is read once, into its place, in the dtype of its use.

The model is built without memory for its weights. Which tensor of the files belongs to which of them is known from
the headers, by the names that transformers itself gives them; so a checkpoint that does not fit is refused before
anything is read. Then each parameter gets its memory and is filled from its file. Besides the model there are never
more than 16 MiB (weight_files.py).
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fastrm.errors import ConfigError, StorageError
from fastrm.model.adapters import Adapter, MergedTensor
from fastrm.model.experts import is_of_expert, stack_experts
from fastrm.model.families import VISION_FAMILIES, check_family
from fastrm.model.fusion import stock_names
from fastrm.model.lora import nf4_layers, require_bitsandbytes
from fastrm.model.places import ADAPTER_CONFIG, ModelPlace, locate
from fastrm.model.weight_files import (
    INDEX,
    SINGLE,
    VALUE_HEAD,
    StoredTensor,
    WeightFiles,
    digest_of,
    finder,
    read_header,
)
from fastrm.ui import counted

# Weights of published files that a model which only rewards has no use for: the LM head, and buffers that are computed
# from the configuration. Every other weight of a checkpoint that is left out is named.
UNUSED = re.compile(r"(.*\.)?(lm_head\.(weight|bias)|inv_freq|position_ids)")
# The prefix that TRL's wrapper class adds to the names of a model that a Trainer saves.
_WRAPPER = "pretrained_model."
LM_HEAD = "lm_head.weight"

# A function (name in the backbone, parameter, most frequent dtype of the files) -> dtype in memory.
PickDtype = Callable[[str, nn.Parameter, torch.dtype], torch.dtype]


@dataclass(frozen=True)
class Backbone:
    """A stock base model whose weights are still in files.

    Attributes:
        model: without memory for its weights; buffers, which are computed from the configuration, are there.
        tensors: of the files, by the names of the model's state dict.
        dtype: that most elements of the files have.
        place: of its files.
        lm_head: the weight of the LM head in the files, which may hold it though it is tied to the embeddings; None:
            they hold none.
        rest: by their names in the files, weights that are not of the backbone, such as a reward head's; without those
            that are of no use (UNUSED).
        left_out: names of weights that an adapter adds to, and which are of no use to a reward model and not in the
            files: an LM head that is tied to the embeddings.
    """

    model: nn.Module
    tensors: dict[str, StoredTensor]
    dtype: torch.dtype
    place: ModelPlace
    lm_head: StoredTensor | None = None
    rest: dict[str, StoredTensor] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    def num_bytes(self, pick_dtype: PickDtype) -> int:
        """Return the bytes of all parameters as `load` will place them."""
        return sum(
            parameter.numel() * pick_dtype(name, parameter, self.dtype).itemsize
            for name, parameter in self.model.named_parameters()
        )

    @torch.no_grad()
    def load(
        self,
        pick_dtype: PickDtype,
        device: torch.device,
        *,
        reads: bool = True,
        placed: Callable[[str, nn.Parameter], None] = lambda name, parameter: None,
    ) -> nn.Module:
        """Give every parameter its memory and fill it from the files; return the model in evaluation mode.

        Projections may have been fused before: their parts are read into the rows that they have there.

        Args:
            reads: fill the parameters; False leaves that to what `placed` does.
            placed: called with each name and parameter when it is filled, before the next has memory.

        Raises:
            StorageError: if a file cannot be read to the end.
        """
        parts = {
            name: [self.tensors[part] for part in stock_names(self.model, name)]
            for name, _ in self.model.named_parameters()
        }
        in_order = sorted(parts, key=lambda name: (parts[name][0].file, parts[name][0].start))
        for name in counted("loading weights", in_order, len(in_order)):
            path, _, attribute = name.rpartition(".")
            owner = self.model.get_submodule(path)
            empty = getattr(owner, attribute)
            dtype = pick_dtype(name, empty, self.dtype)
            filled = torch.empty(empty.shape, dtype=dtype, device=device)
            if reads:
                first = 0
                for stored in parts[name]:
                    stored.read_into(filled.view(-1)[first : first + stored.numel])
                    first += stored.numel
            parameter = nn.Parameter(filled, requires_grad=empty.requires_grad)
            setattr(owner, attribute, parameter)
            del filled
            placed(name, parameter)
        for name, buffer in self.model.named_buffers():
            if name in self.tensors:
                buffer.copy_(self.tensors[name].read())
        return self.model.eval()


def open_backbone(path: str) -> Backbone:
    """Open the backbone in a folder or at a hub id: check that all its weights are there and used, and read none.

    The weights of a LoRA adapter are added to the base model's where they are read.

    Raises:
        ConfigError: if there is no such model, it is in another format, or its family is not supported.
        StorageError: if files or weights are missing, damaged, or of another shape than the configuration says, or if
            weights of layers would be left out.
    """
    place = locate(path)
    config = load_backbone_config(path)
    files = WeightFiles.open(place.base)
    full, model = _empty_models(path, config)
    find_name = _renamer(full)
    stored, rest = _assign(place, files, find_name)
    prefix = "model." if full is not model else ""
    wanted = model.state_dict()
    if "base_digest" in place.below:
        own = {name: stored[prefix + name] for name in wanted if prefix + name in stored}
        _check_base(place, digest_of(own))
    if "quantize" in place.below:
        _quantize(stored, full, model)
    left_out: tuple[str, ...] = ()
    if place.adapter is not None:
        left_out = _merge(Adapter.open(place), stored, rest, find_name, _part_names(full, model))
    stored |= stack_experts(rest, find_name)
    tensors = {name: stored[prefix + name] for name in wanted if prefix + name in stored}
    _check_all_there(path, tensors, wanted)
    lm_head = next((t for name, t in (stored | rest).items() if name.removeprefix(_WRAPPER) == LM_HEAD), None)
    # A tensor without elements holds nothing: exports have one that stock classifiers refuse (stock_classes.py).
    rest = {name: tensor for name, tensor in rest.items() if tensor.numel and not UNUSED.fullmatch(name)}
    _check_all_used(path, rest, full, model)
    return Backbone(model, tensors, files.dtype, place, lm_head, rest, left_out)


def _assign(place: ModelPlace, files: Mapping[str, StoredTensor], find_name) -> tuple[dict, dict]:
    """Return (weights by their names in the model, other weights by their names in the files)."""
    stored, rest = {}, {}
    for name, tensor in files.items():
        found = find_name(name)
        (rest if found is None else stored)[found or name] = tensor
    if place.has_own_head:
        rest = {name: tensor for name, tensor in rest.items() if is_of_expert(name) or UNUSED.fullmatch(name)}
    for where in [place.adapter] if place.has_own_head else dict.fromkeys((place.base, place.adapter or place.base)):
        if (file := finder(where)(VALUE_HEAD)) is not None:
            rest |= read_header(file)
    return stored, rest


def _check_base(place: ModelPlace, found: str) -> None:
    if found != place.below["base_digest"]:
        raise ConfigError(
            f"{place.given}: is an adapter of another base: the weights in {place.base} are not those that it was "
            f"trained on; set base_model_name_or_path in {ADAPTER_CONFIG} to that model"
        )


def _quantize(stored: dict[str, StoredTensor], full: nn.Module, model: nn.Module) -> None:
    """Read the base's weights as the layers of the run had them on which the adapter was trained."""
    require_bitsandbytes()
    from fastrm.model.nf4 import Nf4Tensor

    language = getattr(model, "language_model", model)
    prefix = next(f"{name}." if name else "" for name, module in full.named_modules() if module is language)
    for name in nf4_layers(language):
        if (base := stored.get(key := f"{prefix}{name}.weight")) is not None:
            stored[key] = Nf4Tensor(base.file, base.dtype, base.shape, base.start)


def _merge(
    adapter: Adapter, stored: dict[str, StoredTensor], rest: dict[str, StoredTensor], find_name, parts: set[str]
) -> tuple[str, ...]:
    """Put an adapter's weights into `stored` and `rest`, among which is a reward head of the base model.

    Args:
        parts: names of modules that lie inside the backbone.

    Returns:
        names of weights of no use (UNUSED) that the base's files lack, so that what is added to them is left out.
    """
    left_out = []
    for name, tensor in adapter.replaced.items():
        found = find_name(name)
        (rest if found is None else stored)[found or name] = tensor
    for module, product in adapter.products.items():
        down, up = product.down, product.up
        name = f"{module}.weight"
        found = find_name(name)
        weights, found = (rest, name) if found is None else (stored, found)
        base = weights.get(found)
        if base is None and UNUSED.fullmatch(name):
            left_out.append(name)
            continue
        if base is None and not parts & set(name.split(".")[:3]):
            raise StorageError(
                f"{adapter.where}: adds to {name}, which lies outside of the backbone and in no file of the base: "
                "a head that was drawn at random under the adapter is lost. Train it whole (modules_to_save of PEFT), "
                "or save the model that PEFT's merge_and_unload makes"
            )
        if base is None or base.shape != (up.shape[0], down.shape[1]):
            got = "no weight of this model" if base is None else f"{list(base.shape)} in the base model"
            raise StorageError(
                f"{adapter.where}: changes {name} by {[up.shape[0], down.shape[1]]}, which is {got}; was the adapter "
                "trained on this base model?"
            )
        weights[found] = MergedTensor(base.file, base.dtype, base.shape, base.start, base, product)
    return tuple(left_out)


def _check_all_there(path: str, tensors: Mapping[str, StoredTensor], wanted: Mapping[str, torch.Tensor]) -> None:
    broken = [
        f"{name} is missing" if name not in tensors
        else f"{name} has shape {list(tensors[name].shape)}, wanted {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name not in tensors or tensors[name].shape != tensor.shape
    ]  # fmt: skip
    if broken:
        raise StorageError(
            f"model.path {path!r}: {len(broken):,} of {len(wanted):,} weights are missing or have another shape, "
            f"first: {broken[0]}; is it the whole checkpoint of this architecture?"
        )


def _check_all_used(path: str, rest: Mapping[str, StoredTensor], full: nn.Module, model: nn.Module) -> None:
    """Refuse weights that lie inside the backbone and have no place there: without them it is another model."""
    parts = _part_names(full, model)
    # vLLM's name of a vision model's head begins like a weight of its language model.
    inside = [name for name in rest if not name.startswith("language_model.score.")]
    lost = [name for name in inside if parts & set(name.removeprefix(_WRAPPER).split(".")[:3])]
    if lost:
        raise StorageError(
            f"model.path {path!r}: {len(lost):,} weights of the files have no place in the {model.config.model_type} "
            f"model that config.json describes, and would be left out: {shortened(lost)}; is config.json that of this "
            "checkpoint?"
        )


def _part_names(full: nn.Module, model: nn.Module) -> set[str]:
    modules = (full, model, getattr(model, "language_model", model))
    return {name for module in modules for name, _ in module.named_children()} - {"model"}


def shortened(names, most: int = 4) -> str:
    """Shorten names for a message: the first few, and the number of the others."""
    names = list(names)
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def load_backbone(path: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load a stock base model with published or exported weights, all of one dtype, into the host's memory.

    Raises:
        ConfigError, StorageError: as `open_backbone`, and if a file cannot be read to the end.
    """
    return open_backbone(path).load(lambda *_: dtype, torch.device("cpu"))


def stored_dtype(path: str | None) -> torch.dtype:
    """Return the dtype of most weights in the files of model.path; for absent files that of published checkpoints.

    Args:
        path: a folder or hub id; None for random weights, which are float32.

    Raises:
        ConfigError, StorageError: as `WeightFiles.open`, for a folder with weights.
    """
    if path is None:
        return torch.float32
    return WeightFiles.open(locate(path).base).dtype if has_weights(path) else torch.bfloat16


def has_weights(path: str) -> bool:
    """Return whether the weights of model.path are in a folder on this disk."""
    if not Path(path).is_dir():
        return False
    base = Path(locate(path).base)
    return any((base / name).is_file() for name in (SINGLE, INDEX))


def load_backbone_config(path: str):
    """Load the transformers config of a folder or hub id.

    Raises:
        ConfigError: if there is no such model, it is in another format, or its family is not supported.
    """
    from transformers import AutoConfig

    place = locate(path)
    place.read_config()  # says whose file is not there, or what is wrong with it
    try:
        config = AutoConfig.from_pretrained(place.base, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"model.path {path!r}: no model configuration there ({reason}); wanted the model/ folder of a run, "
            "a folder with config.json and safetensors, or a reachable hub id"
        ) from None
    except Exception as error:
        raise _refused(path, error) from error
    check_family(config)
    return config


def _refused(path: str, error: Exception) -> ConfigError:
    """Return the error for a wrong value in config.json, which may fail anywhere inside transformers."""
    reason = " ".join((str(error).strip() or type(error).__name__).split())
    return ConfigError(f"model.path {path!r}: config.json: transformers refuses it: {reason}; correct the file")


class WeightsOnMeta(TorchFunctionMode):
    """A mode in which weights take no memory: modules make them with `torch.empty`, buffers otherwise.

    The few that are made otherwise (norms, class tokens) are small. Buffers that no file holds, the frequencies of
    rotary embeddings, come out as in any stock model, in float32.
    """

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = options or {}
        return function(*arguments, **(options | {"device": "meta"} if function is torch.empty else options))


def empty_backbone(path: str) -> nn.Module:
    """Make the backbone of a folder or hub id without memory for its weights, of which no file is read.

    Raises:
        ConfigError: as `load_backbone_config`, or if transformers refuses the configuration.
    """
    return _empty_models(path, load_backbone_config(path))[1]


def _empty_models(path: str, config) -> tuple[nn.Module, nn.Module]:
    """Return the stock model whose class knows the names of published files, and its part that is used here."""
    from transformers import AutoModel, AutoModelForImageTextToText

    is_vision = config.model_type in VISION_FAMILIES
    # Only the full vision classes know both names of published weights, `visual.*` and `model.visual.*`.
    auto_class = AutoModelForImageTextToText if is_vision else AutoModel
    try:
        with WeightsOnMeta():
            # eager needs no package: `set_kernels` chooses the attention later.
            full = auto_class.from_config(config, dtype=torch.float32, attn_implementation="eager")
    except Exception as error:
        raise _refused(path, error) from error
    return full, full.model if is_vision else full


def _renamer(full: nn.Module) -> Callable[[str], str | None]:
    """Return a function from a weight's name in files to that in the stock model, as transformers' loading pairs them.

    None: the model has no such weight.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    # Weights computed from several tensors (a WeightConverter) are those of experts alone, which `stack_experts` joins;
    # any other would be named as missing.
    renamings = [entry for entry in get_model_conversion_mapping(full) if isinstance(entry, WeightRenaming)]
    state, prefix = full.state_dict(), full.base_model_prefix

    def find(name: str) -> str | None:
        name = name.removeprefix(_WRAPPER)
        found, _ = rename_source_key(name, renamings, [], prefix, state)
        if found not in state and name in state:
            found, _ = rename_source_key(name, [], [], prefix, state)
        return found if found in state else None

    return find

"""Stock backbones from their files: every weight is read once, into its place, in the dtype that it is used in.

The model is built without memory for its weights. Which tensor of the files belongs to which of them is known from
the headers, by the names that transformers itself gives them; so a checkpoint that does not fit is refused before
anything is read. Then each parameter gets its memory and is filled from its file. Besides the model there are never
more than 16 MiB (weight_files.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fastrm.errors import ConfigError, StorageError
from fastrm.model.families import VISION_FAMILIES, check_family
from fastrm.model.fusion import stock_names
from fastrm.model.weight_files import INDEX, SINGLE, StoredTensor, WeightFiles, check_format

# (name in the backbone, parameter, dtype of most of the files) -> dtype in memory.
ChooseDtype = Callable[[str, nn.Parameter, torch.dtype], torch.dtype]


@dataclass(frozen=True)
class Backbone:
    """A stock base model whose weights are still in files.

    Attributes:
        model: without memory for its weights; buffers, which are computed from the configuration, are there.
        tensors: of the files, by the names of the model's state dict.
        dtype: that most elements of the files have.
    """

    model: nn.Module
    tensors: dict[str, StoredTensor]
    dtype: torch.dtype

    def num_bytes(self, choose_dtype: ChooseDtype) -> int:
        """Bytes of all parameters, as `load` will place them."""
        return sum(
            parameter.numel() * choose_dtype(name, parameter, self.dtype).itemsize
            for name, parameter in self.model.named_parameters()
        )

    @torch.no_grad()
    def load(
        self,
        choose_dtype: ChooseDtype,
        device: torch.device,
        *,
        reads: bool = True,
        placed: Callable[[nn.Parameter], None] = lambda parameter: None,
    ) -> nn.Module:
        """Give every parameter its memory and fill it from the files; returns the model, in evaluation mode.

        Projections may have been fused before: their parts are read into the rows that they have there.

        Args:
            reads: fill the parameters; False leaves that to what `placed` does.
            placed: called with each parameter when it is filled, before the next has memory.

        Raises:
            StorageError: if a file cannot be read to the end.
        """
        parts = {
            name: [self.tensors[part] for part in stock_names(self.model, name)]
            for name, _ in self.model.named_parameters()
        }
        for name in sorted(parts, key=lambda name: (parts[name][0].file, parts[name][0].start)):
            path, _, attribute = name.rpartition(".")
            owner = self.model.get_submodule(path)
            empty = getattr(owner, attribute)
            dtype = choose_dtype(name, empty, self.dtype)
            filled = torch.empty(empty.shape, dtype=dtype, device=device)
            if reads:
                first = 0
                for stored in parts[name]:
                    stored.read_into(filled.view(-1)[first : first + stored.numel])
                    first += stored.numel
            parameter = nn.Parameter(filled, requires_grad=empty.requires_grad)
            setattr(owner, attribute, parameter)
            del filled
            placed(parameter)
        for name, buffer in self.model.named_buffers():
            if name in self.tensors:
                buffer.copy_(self.tensors[name].read())
        return self.model.eval()


def open_backbone(path: str) -> Backbone:
    """The backbone in a folder or at a hub id; checks that all its weights are there, and reads none of them.

    Raises:
        ConfigError: if there is no such model, it is in another format, or its family is not supported.
        StorageError: if files or weights are missing, damaged, or of another shape than the configuration says.
    """
    config = load_backbone_config(path)
    files = WeightFiles.open(path)
    full, model = _empty_models(config)
    names = _names_in_the_model(full, files)
    prefix = "model." if full is not model else ""
    wanted = model.state_dict()
    tensors = {name: files[names[prefix + name]] for name in wanted if prefix + name in names}
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
    return Backbone(model, tensors, files.dtype)


def load_backbone(path: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A stock base model with published or exported weights, all of one dtype, in the host's memory.

    Raises:
        ConfigError, StorageError: as `open_backbone`, and if a file cannot be read to the end.
    """
    return open_backbone(path).load(lambda *_: dtype, torch.device("cpu"))


def stored_dtype(path: str | None) -> torch.dtype:
    """The dtype of most weights in the files of model.path; without weights here, that of published checkpoints.

    Args:
        path: a folder or hub id; None for random weights, which are float32.

    Raises:
        ConfigError, StorageError: as `WeightFiles.open`, for a folder with weights.
    """
    if path is None:
        return torch.float32
    has_weights = any((Path(path) / name).is_file() for name in (SINGLE, INDEX))
    return WeightFiles.open(path).dtype if has_weights else torch.bfloat16


def load_backbone_config(path: str):
    """The transformers config of a folder or hub id.

    Raises:
        ConfigError: if there is no such model, it is in another format, or its family is not supported.
    """
    from transformers import AutoConfig

    check_format(path)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"model.path {path!r}: no model configuration there ({reason}); wanted a folder with config.json "
            "and safetensors, or a reachable hub id"
        ) from None
    check_family(config)
    return config


class WeightsOnMeta(TorchFunctionMode):
    """Where weights take no memory: modules make theirs with `torch.empty`, and buffers from other functions.

    The few that are made otherwise (norms, class tokens) are small. Buffers that no file holds, the frequencies of
    rotary embeddings, come out as in any stock model, in float32.
    """

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = options or {}
        return function(*arguments, **(options | {"device": "meta"} if function is torch.empty else options))


def _empty_models(config) -> tuple[nn.Module, nn.Module]:
    """The stock model whose class knows the names of published files, and its part that is used here."""
    from transformers import AutoModel, AutoModelForImageTextToText

    is_vision = config.model_type in VISION_FAMILIES
    # Only the full vision classes know both names of published weights, `visual.*` and `model.visual.*`.
    auto_class = AutoModelForImageTextToText if is_vision else AutoModel
    with WeightsOnMeta():
        # Any attention will do until `use_kernels` chooses, but a stock one must not be checked for.
        full = auto_class.from_config(config, dtype=torch.float32, attn_implementation="eager")
    return full, full.model if is_vision else full


def _names_in_the_model(full: nn.Module, files: WeightFiles) -> dict[str, str]:
    """Name in the stock model -> name in the files, as transformers' own loading pairs them."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    # What would be computed from several tensors (a WeightConverter) does not occur in these families; if it ever does,
    # the weight is named as missing.
    renamings = [entry for entry in get_model_conversion_mapping(full) if isinstance(entry, WeightRenaming)]
    state, prefix, names = full.state_dict(), full.base_model_prefix, {}
    for name in files:
        found, _ = rename_source_key(name, renamings, [], prefix, state)
        if found not in state and name in state:
            found, _ = rename_source_key(name, [], [], prefix, state)
        if found in state:
            names[found] = name
    return names

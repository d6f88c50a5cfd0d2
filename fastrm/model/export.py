"""Reading and writing model folders: stock key names, safetensors only, nothing that runs code.

model/
  config.json               stock config and a `fastrm` section: head, anchor, pooling
  model.safetensors         the weights by published names, and score.* (stock_classes.py); of more than 5 GB in shards,
                            with the index that transformers reads
  tokenizer files, chat template, preprocessor_config.json
"""

import datetime
import errno
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from fastrm.config import Config, HeadConfig, ModelConfig
from fastrm.data.images import MediaLimits
from fastrm.data.internvl_format import load_internvl_format
from fastrm.data.qwen_format import load_qwen_format
from fastrm.data.template import ConversationEncoder
from fastrm.data.tokenizer import load_tokenizer
from fastrm.data.videos import VideoSettings
from fastrm.errors import ConfigError, StorageError, option
from fastrm.json_files import to_json
from fastrm.model.families import QWEN_VL_FAMILIES, VISION_FAMILIES
from fastrm.model.fusion import stock_entries
from fastrm.model.loading import open_backbone
from fastrm.model.network import RewardNetwork
from fastrm.model.stock_classes import (
    GUARD,
    StockReading,
    file_entries,
    file_name,
    head_tensors,
    read_by_stock,
    with_padding,
)
from fastrm.model.weight_files import WeightFiles, check_format
from fastrm.model.weight_writer import WeightWriter, replace_folder
from fastrm.resources import available_memory

# 2: Qwen's vision models have published names, heads that stock classifiers misread are under score.0. 1 is read too.
FORMAT = 2


def save_model(
    model: RewardNetwork,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    tensors: Iterable[tuple[str, torch.Tensor]] | None = None,
) -> None:
    """Write a network with its processor; `folder` appears, or is replaced, when it is complete and on the disk.

    At most one tensor is held besides the network.

    Args:
        dtype: of the backbone's weights in the files; None: each as it is. The head's are written as they are, in
            float32: they are few, and would round the reward itself.
        tensors: (stock name, whole tensor) of all weights in any order, where the network has only parts of them.

    Raises:
        StorageError: if it cannot be written; `folder` is then as it was.
    """
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    reading, model_type = read_by_stock(model), model.model.config.model_type
    tensors = model.state_dict().items() if tensors is None else tensors
    writer = None
    try:
        part.mkdir(parents=True)
        entries = ((name, shape, _export_dtype(name, own, dtype)) for name, shape, own in stock_entries(model))
        writer = WeightWriter(part, file_entries(entries, model_type, reading.classifies))
        for name, tensor in tensors:
            writer.write(file_name(name, model_type, reading.classifies), tensor)
        if not reading.classifies:
            writer.write(GUARD, torch.empty(0))
        writer.close()
        tokenizer = with_padding(model.encoder.tokenizer, reading.pad_token)
        config = _config_of(model, dtype, reading, tokenizer.pad_token_id)
        (part / "config.json").write_text(to_json(config, indent=2, sort_keys=True) + "\n")
        tokenizer.save_pretrained(part)
        if model.encoder.vision is not None:
            model.encoder.vision.save(part)
        replace_folder(part, folder)
    except OSError as error:
        hint = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "check the folder"
        raise StorageError(f"{folder}: the model could not be written: {error.strerror or error}; {hint}") from error
    finally:
        if writer is not None:
            writer.abandon()
        shutil.rmtree(part, ignore_errors=True)


def export_dtype(config: Config) -> torch.dtype:
    """The dtype in which a run of this configuration exports its backbone (model.export_dtype)."""
    wanted = config.model.export_dtype
    if wanted == "auto":
        wanted = config.precision.dtype
    return torch.bfloat16 if wanted == "bf16" else torch.float32


def _export_dtype(name: str, own: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    return own if dtype is None or name.startswith("score.") or not own.is_floating_point else dtype


def _config_of(model: RewardNetwork, dtype: torch.dtype | None, reading: StockReading, pad_id: int | None) -> dict:
    """What config.json of an export holds."""
    config = model.model.config.to_dict()
    name = str(model.model.dtype if dtype is None else dtype).removeprefix("torch.")
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if part is config or "dtype" in part:
            part["dtype"] = name
    for name in ("num_labels", "id2label", "label2id", "problem_type"):
        config.pop(name, None)
    if reading.classifies:
        config |= {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        config["problem_type"] = "regression"
    config["architectures"] = [reading.architecture or type(model.model).__name__]
    text = config.get("text_config", config)
    if pad_id is not None and pad_id < text["vocab_size"]:
        text["pad_token_id"] = pad_id
    config["fastrm"] = {
        "format": FORMAT, "head": model.head.model_dump(), "anchor": model.encoder.anchor, "pooling": model.pooling,
    }  # fmt: skip
    if model.encoder.date is not None:
        config["fastrm"]["template_date"] = str(model.encoder.date)
    return config


def load_model(
    folder: Path,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    *,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    date: datetime.date | None = None,
) -> RewardNetwork:
    """A network with its encoder, from a folder that `save_model` wrote.

    Args:
        dtype: of the backbone's weights; the head is float32 in any case, and so are the rotary embedding's
            frequencies, which are no weights: rounded, they would turn late tokens by whole radians. None: as in
            the files where they have two bytes an element, else float32, or bfloat16 on a GPU.
        date: for a chat template that reads the clock; default: that of the training run, else today.

    Raises:
        ConfigError: if the folder is not a fastrm reward model, or reads tiles and is given limits of pixels.
        StorageError: if its weights are damaged or incomplete, or the host has no memory for them.
    """
    check_format(folder)
    config_file = folder / "config.json"
    try:
        section = json.loads(config_file.read_text())["fastrm"]
        head, anchor, pooling = HeadConfig(**section["head"]), section["anchor"], _pooling(section)
    except OSError as error:
        raise ConfigError(f"{config_file}: {error.strerror}; wanted the model/ folder of a run") from None
    except (KeyError, TypeError, ValueError):
        raise ConfigError(
            f"{config_file}: not a fastrm reward model (no valid `fastrm` section); a backbone has no reward "
            "head yet: train one with model.path"
        ) from None
    opened = open_backbone(str(folder))
    tokenizer, backbone, device = load_tokenizer(str(folder)), opened.model, torch.device(device)
    if backbone.config.model_type == "internvl" and (min_pixels or max_pixels):
        raise ConfigError(
            f"{folder}: min_pixels and max_pixels are for Qwen models; InternVL reads tiles: set max_patches in "
            "preprocessor_config.json"
        )
    encoder = make_encoder(
        backbone.config, tokenizer, str(folder), anchor, MediaLimits(), min_pixels=min_pixels, max_pixels=max_pixels,
        date=date,
    )  # fmt: skip
    model = RewardNetwork(backbone, head, encoder, pooling)
    load_head(model.score, folder)
    if dtype is None:
        dtype = scoring_dtype(opened.dtype, device)
    if device.type == "cpu":
        _check_memory(folder, opened.num_bytes(lambda *_: dtype), dtype)
    opened.load(lambda *_: dtype, device)
    return model.to(device)


def _check_memory(folder: Path, needed: int, dtype: torch.dtype) -> None:
    """Refuse weights that the host has no memory for, before it begins to swap or the kernel ends the process."""
    there = available_memory()
    if needed > there:
        smaller = f", {option('dtype')} bf16" if dtype.itemsize > 2 else ""
        raise StorageError(
            f"{folder}: the weights take {needed / 2**30:,.1f} GiB in {str(dtype).removeprefix('torch.')}, "
            f"{there / 2**30:,.1f} GiB of host memory are available; free memory, or try one of: a GPU{smaller}"
        )


def scoring_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which a backbone is used where none is asked for, by that of its files."""
    if stored.itemsize == 2:
        return stored
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _pooling(section: dict) -> str:
    """Of an export's `fastrm` section; the first exports had no other than the anchor and do not say so."""
    pooling = section.get("pooling", "anchor")
    if pooling not in ("anchor", "mean"):
        raise ValueError(pooling)
    return pooling


def kept_date(folder: Path) -> datetime.date | None:
    """The date that the chat template of a reward model was given in training; None: the model keeps none."""
    file = folder / "config.json"
    section = json.loads(file.read_text()).get("fastrm", {}) if file.is_file() else {}
    return datetime.date.fromisoformat(section["template_date"]) if "template_date" in section else None


def load_head(score: nn.Module, folder: Path) -> None:
    """Load `score.*` from a folder's safetensors into the head, in its own dtype.

    Raises:
        StorageError: if keys or shapes do not fit.
    """
    stored = head_tensors(WeightFiles.open(folder), isinstance(score, nn.Linear))
    wanted = {name: tuple(tensor.shape) for name, tensor in score.state_dict().items()}
    found = {name: tensor.shape for name, tensor in stored.items()}
    if wanted != found:
        raise StorageError(f"{folder}: reward head: got {found or 'no score.* weights'}, wanted {wanted}")
    score.load_state_dict({name: tensor.read() for name, tensor in stored.items()})


def check_same_head(folder: Path, settings: ModelConfig) -> None:
    """An exported head goes on training only as what it was.

    Raises:
        ConfigError: if model.head, model.anchor or model.pooling differs from the export's.
    """
    section = json.loads((folder / "config.json").read_text())["fastrm"]
    wanted = {"head": settings.head.model_dump(), "anchor": settings.anchor, "pooling": settings.pooling}
    head = HeadConfig(**section["head"]).model_dump()
    found = {"head": head, "anchor": section["anchor"], "pooling": _pooling(section)}
    if wanted != found:
        raise ConfigError(
            f"model.path {str(folder)!r}: exported with {found}, the configuration has {wanted}; set it so"
        )


def has_head(path: str) -> bool:
    """Is this local folder an exported reward model, whose head goes on training?"""
    file = Path(path) / "config.json"
    return file.is_file() and "fastrm" in json.loads(file.read_text())


def make_encoder(
    config, tokenizer, processor_path: str | None, anchor: str, limits: MediaLimits, *,
    min_pixels: int | None = None, max_pixels: int | None = None,
    image_mean: list[float] | None = None, image_std: list[float] | None = None,
    max_tiles: int | None = None, video: VideoSettings | None = None, date: datetime.date | None = None,
) -> ConversationEncoder:  # fmt: skip
    """Tokeniser and vision format for a backbone's configuration; None keeps the setting of `processor_path`.

    Limits of pixels and videos are Qwen's, `max_tiles` is InternVL's; the other family's are not looked at.
    """
    if config.model_type not in VISION_FAMILIES:
        return ConversationEncoder(tokenizer, None, anchor=anchor, limits=limits, date=date)
    if config.model_type not in QWEN_VL_FAMILIES:
        vision = load_internvl_format(
            config, tokenizer, processor_path, max_tiles=max_tiles, image_mean=image_mean, image_std=image_std
        )
        return ConversationEncoder(tokenizer, vision, anchor=anchor, limits=limits, date=date)
    vision = load_qwen_format(
        config.vision_config, tokenizer, processor_path, video,
        min_pixels=min_pixels, max_pixels=max_pixels, image_mean=image_mean, image_std=image_std,
    )  # fmt: skip
    return ConversationEncoder(tokenizer, vision, anchor=anchor, limits=limits, date=date)

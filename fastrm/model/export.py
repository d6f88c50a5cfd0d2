"""Reading and writing model folders: stock key names, safetensors only, nothing that runs code.

model/
  config.json               stock config and a `fastrm` section: head, anchor, pooling; paradigm of a model that writes
  model.safetensors         the weights by published names, and score.* (stock_classes.py); of more than 5 GB in shards,
                            with the index that transformers reads
  tokenizer files, chat template, preprocessor_config.json
  generation_config.json    of a model that writes: the base's, with the token up to which it has learnt to write
"""

import datetime
import errno
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file

from fastrm.config import Config, HeadConfig
from fastrm.data.media.format import FormatSettings
from fastrm.data.template import ConversationEncoder
from fastrm.data.tokenizer import load_tokenizer
from fastrm.errors import ConfigError, StorageError, option
from fastrm.json_files import to_json
from fastrm.limits import MediaLimits
from fastrm.model.adapters import WEIGHTS
from fastrm.model.experts import expert_parts
from fastrm.model.families import FAMILIES
from fastrm.model.fusion import stock_entries
from fastrm.model.lm_head import load_lm_head, untie_other_lm_head
from fastrm.model.loading import Backbone, open_backbone
from fastrm.model.lora import adapter_files, kept_tensors
from fastrm.model.network import RewardNetwork
from fastrm.model.paradigms import check_gives_rewards, paradigm_in
from fastrm.model.places import ADAPTER_CONFIG, locate
from fastrm.model.reward_statistics import SECTION
from fastrm.model.stock_classes import (
    GUARD,
    StockReading,
    anchor_token_id,
    read_by_stock,
    with_padding,
)
from fastrm.model.stored_head import OPENRLHF_KEYS, FoundHead, find_head, missing_head
from fastrm.model.weight_files import CONFIG, VALUE_HEAD, finder
from fastrm.model.weight_writer import WeightWriter
from fastrm.paradigm_config import Paradigm
from fastrm.resources import available_memory
from fastrm.storage import sync_path, whole_folder
from fastrm.ui import counted

# In version 2 Qwen's vision models have published names, and heads that stock classifiers misread are under score.0.
FORMAT = 2


def save_model(
    model: RewardNetwork,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    tensors: Iterable[tuple[str, torch.Tensor]] | None = None,
    reading: StockReading | None = None,
) -> None:
    """Write a network with its processor; `folder` appears, or is replaced, when it is complete and on the disk.

    At most one tensor is held besides the network.

    Args:
        dtype: of the backbone's weights in the files; None: each as it is. The head's are written as they are, in
            float32: they are few, and would round the reward itself.
        tensors: (stock name, whole tensor) of all weights in any order, where the network has only parts of them.
        reading: how its readers read it; default: as stock transformers does.

    Raises:
        StorageError: if it cannot be written; `folder` is then as it was.
    """
    reading = reading or read_by_stock(model)
    tensors = kept_tensors(model) if tensors is None else tensors
    try:
        with whole_folder(folder) as part:
            if model.lora is None:
                _write_weights(model, part, dtype, tensors, reading)
            else:
                # Each is valid until the next, where it comes from several ranks.
                _write_adapter(model, part, {name: tensor.cpu().clone() for name, tensor in tensors}, reading)
            tokenizer = with_padding(model.encoder.tokenizer, reading.pad_token)
            config = _config_of(model, dtype, reading, tokenizer.pad_token_id)
            (part / "config.json").write_text(to_json(config, indent=2, sort_keys=True) + "\n")
            tokenizer.save_pretrained(part)
            if model.encoder.vision is not None:
                model.encoder.vision.save(part)
            reading.add_files(part, model)
    except OSError as error:
        hint = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "check the folder"
        raise StorageError(f"{folder}: the model could not be written: {error.strerror or error}; {hint}") from error


def _write_weights(
    model: RewardNetwork,
    folder: Path,
    dtype: torch.dtype | None,
    tensors: Iterable[tuple[str, torch.Tensor]],
    reading: StockReading,
) -> None:
    model_type = model.model.config.model_type
    entries = [
        (part, tuple(piece.shape), _export_dtype(name, own, dtype))
        for name, shape, own in stock_entries(model)
        for part, piece in expert_parts(name, torch.empty(shape, device="meta"))
    ]
    writer = WeightWriter(folder, reading.file_entries(entries, model_type))
    try:
        parts = (part for name, tensor in tensors for part in expert_parts(name, tensor))
        for name, tensor in counted("writing weights", parts, len(entries)):
            writer.write(reading.file_name(name, model_type), tensor)
        if reading.is_guarded:
            writer.write(GUARD, torch.empty(0))
        writer.close()
    finally:
        writer.abandon()


def _write_adapter(
    model: RewardNetwork, folder: Path, tensors: dict[str, torch.Tensor], reading: StockReading
) -> None:
    """Write PEFT's two files, and the head: among them if a stock class reads it, else in a file of its own."""
    head = {name: tensor.contiguous() for name, tensor in tensors.items() if name.startswith("score.")}
    whole = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]} if reading.classifies else {}
    settings, weights = adapter_files(model, tensors, **whole)
    if reading.classifies:
        weights |= {f"base_model.model.{name}": tensor for name, tensor in head.items()}
    elif head:
        save_file(head, folder / VALUE_HEAD)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / WEIGHTS, {"format": "pt"})
    (folder / ADAPTER_CONFIG).write_text(settings)
    for name in (WEIGHTS, ADAPTER_CONFIG, *([VALUE_HEAD] if head and not reading.classifies else [])):
        sync_path(folder / name)


def export_dtype(config: Config) -> torch.dtype:
    """Return the dtype in which a run of this configuration exports its backbone (model.export_dtype)."""
    wanted = config.model.export_dtype
    if wanted == "auto":
        wanted = config.precision.dtype
    return torch.bfloat16 if wanted == "bf16" else torch.float32


def _export_dtype(name: str, own: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    return own if dtype is None or name.startswith("score.") or not own.is_floating_point else dtype


def _config_of(model: RewardNetwork, dtype: torch.dtype | None, reading: StockReading, pad_id: int | None) -> dict:
    """Return the content of an export's config.json."""
    config = model.model.config.to_dict()
    name = str(model.model.dtype if dtype is None else dtype).removeprefix("torch.")
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if part is config or "dtype" in part:
            part["dtype"] = name
    # The normalisation of an OpenRLHF head is in the weights now; these keys would apply it once more.
    for name in ("num_labels", "id2label", "label2id", "problem_type", *OPENRLHF_KEYS):
        config.pop(name, None)
    config["architectures"] = [type(model.model).__name__]
    reading.complete(config)
    text = config.get("text_config", config)
    if pad_id is not None and pad_id < text["vocab_size"]:
        text["pad_token_id"] = pad_id
    config["fastrm"] = {
        "format": FORMAT, "head": model.head_settings.stored(), "anchor": model.encoder.anchor,
        "pooling": model.pooling,
    }  # fmt: skip
    if model.paradigm == "judge":
        del config["fastrm"]["head"]
    below = {"quantize": model.quantize, "base_digest": model.base_digest, "paradigm": model.writer}
    config["fastrm"] |= {name: value for name, value in below.items() if value is not None}
    if (anchor_id := anchor_token_id(model.encoder)) is not None:
        config["fastrm"]["anchor_token_id"] = anchor_id
    if model.encoder.date is not None:
        config["fastrm"]["template_date"] = str(model.encoder.date)
    if model.reward_statistics is not None:
        config["fastrm"][SECTION] = model.reward_statistics
    return config


def load_model(
    folder: Path,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    *,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    date: datetime.date | None = None,
    behind_critique: bool = False,
    writes: bool = False,
) -> RewardNetwork:
    """Load a network with its encoder, from a folder that `save_model` or another trainer wrote (stored_head.py).

    Args:
        dtype: of the backbone's weights; the head is float32 in any case, and so are the rotary embedding's
            frequencies, which are no weights: rounded, they would turn late tokens by whole radians. None: as in
            the files where they have two bytes an element, else float32, or bfloat16 on a GPU.
        date: for a chat template that reads the clock; default: that of the training run, else today.
        behind_critique: as of `check_gives_rewards`.
        writes: load a critic or judge whole, with what it writes with, in float32 or as its files; True changes nothing
            for a reward model.

    Raises:
        ConfigError: if the folder is no reward model that is known here, or reads tiles and is given limits of pixels.
        StorageError: if its weights are damaged or incomplete, or the host has no memory for them.
    """
    opened = open_backbone(str(folder))
    place = opened.place
    section = place.read_config().get("fastrm", {})
    writer = paradigm_in(place.given, section) if writes else None
    if writer is None:
        check_gives_rewards(place.given, section, behind_critique=behind_critique)
    kind = "reward" if writer is None else writer["kind"]
    tokenizer, backbone, device = load_tokenizer(place.tokenizer), opened.model, torch.device(device)
    found = _head_of(opened, tokenizer, kind)
    family = FAMILIES.get(backbone.config.model_type)
    if family is not None and family.no_pixel_limits and (min_pixels or max_pixels):
        raise ConfigError(f"{folder}: min_pixels and max_pixels are for Qwen models; {family.no_pixel_limits}")
    if kind != "reward":
        untie_other_lm_head(opened)
    anchor = section.get("anchor", "last_token") if found is None else found.anchor or "last_token"
    settings = FormatSettings(min_pixels, max_pixels)
    encoder = make_encoder(backbone.config, tokenizer, place.processor, anchor, MediaLimits(), settings, date=date)
    if found is None:
        model = RewardNetwork(backbone, HeadConfig(), encoder, paradigm=kind)
    else:
        model = RewardNetwork(backbone, found.head, encoder, found.pooling or "anchor", kind)
        found.load_into(model.score)
        model.adopted = "" if found.is_export else found.describe()
    if writer is not None:
        model.writer, model.generation = writer, place.read_generation()
    if place.adapter is None or place.has_own_head:  # an adapter of others changes the rewards of its base
        model.reward_statistics = section.get(SECTION)
    if dtype is None:
        dtype = scoring_dtype(opened.dtype, device)
    if device.type == "cpu":
        num_written = 0 if model.lm_head is None else model.lm_head.weight.numel()
        _check_memory(folder, opened.num_bytes(lambda *_: dtype) + num_written * dtype.itemsize, dtype)
    opened.load(lambda *_: dtype, device)
    if model.lm_head is not None:
        load_lm_head(model.lm_head, opened, lambda *_: dtype, device)
    return model.to(device)


def _head_of(opened: Backbone, tokenizer, kind: Paradigm) -> FoundHead | None:
    """Return the head in a model's files, which a judge has not."""
    found, place = find_head(opened, tokenizer), opened.place
    if found is None and kind != "judge":
        raise missing_head(place)
    if found is not None and kind == "judge":
        raise ConfigError(
            f"{place.given}: is a judge by its config.json, and its files hold a reward head ({found.names[0]}), which "
            "a judge has not; copy the whole folder again"
        )
    return found


def _check_memory(folder: Path, needed: int, dtype: torch.dtype) -> None:
    """Refuse weights that the host has no memory for, before it swaps or the kernel ends the process."""
    available = available_memory()
    if needed > available:
        smaller = f", {option('dtype')} bf16" if dtype.itemsize > 2 else ""
        raise StorageError(
            f"{folder}: the weights take {needed / 2**30:,.1f} GiB in {str(dtype).removeprefix('torch.')}, "
            f"{available / 2**30:,.1f} GiB of host memory are available; free memory, or try one of: a GPU{smaller}"
        )


def scoring_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype in which a backbone is used by default, by the dtype of its files."""
    if stored.itemsize == 2:
        return stored
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def kept_date(path: str | Path) -> datetime.date | None:
    """Return the date that the chat template of a reward model had in training; None if the model keeps none."""
    place = locate(path)
    section = {} if finder(place.base)(CONFIG) is None else place.read_config().get("fastrm", {})
    return datetime.date.fromisoformat(section["template_date"]) if "template_date" in section else None


def make_encoder(
    config,
    tokenizer,
    processor_path: str | None,
    anchor: str,
    limits: MediaLimits,
    settings: FormatSettings = FormatSettings(),
    date: datetime.date | None = None,
) -> ConversationEncoder:
    """Make the tokeniser and vision format for a backbone's configuration.

    Args:
        processor_path: the folder of the processor's files, which say what `settings` leave open.
        date: for a chat template that reads the clock.

    Raises:
        ConfigError: if the tokenizer has ids that the embeddings lack, or as `ConversationEncoder`.
    """
    check_vocabulary(config, tokenizer)
    options = {"anchor": anchor, "limits": limits, "date": date, "pad_token_id": config.get_text_config().pad_token_id}
    vision = None
    if config.model_type in FAMILIES:
        vision = FAMILIES[config.model_type].load_format(config, tokenizer, processor_path, settings)
    return ConversationEncoder(tokenizer, vision, **options)


def check_vocabulary(config, tokenizer) -> None:
    """Refuse a tokenizer that makes tokens for which the model has no embedding.

    Args:
        config: the backbone's transformers config.

    Raises:
        ConfigError: naming the first such token.
    """
    size, known = config.get_text_config().vocab_size, tokenizer.get_vocab()
    beyond = [(number, token) for token, number in known.items() if number >= size]
    if beyond:
        number, token = min(beyond)
        raise ConfigError(
            f"tokenizer: {len(beyond):,} of its {len(known):,} tokens have no embedding, the first is {token!r} with "
            f"id {number:,}; the model has {size:,} embeddings (vocab_size in config.json). Use the model's own "
            "tokenizer, or enlarge the model with transformers' resize_token_embeddings and save it"
        )

"""From a configuration to what the loop needs: data, tokeniser, network."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from fastrm.config import Config, TrainedTokenizer
from fastrm.data.images import ImageLimits
from fastrm.data.prepare import PreparedSet, prepare, read_records
from fastrm.data.quarantine import Quarantine
from fastrm.data.record import Record
from fastrm.data.tokenizer import load_tokenizer, train_tokenizer
from fastrm.errors import ConfigError
from fastrm.model.export import (
    check_same_head,
    has_head,
    host_copy,
    load_backbone,
    load_head,
    make_encoder,
    save_model,
)
from fastrm.model.network import RewardNetwork, init_backbone, pick_device
from fastrm.model.precision import convert_to_fp8
from fastrm.train.display import Display
from fastrm.train.engine import LocalEngine
from fastrm.train.ranks import ALONE, Ranks


@dataclass
class Job:
    """Everything that the configuration stands for, before the first step."""

    config: Config
    network: RewardNetwork
    train: PreparedSet
    eval: PreparedSet | None


def set_up(config: Config, run_dir: Path, quarantine: Quarantine, display: Display, ranks: Ranks = ALONE) -> Job:
    """Read the data, make the tokeniser and the network, and prepare the groups; on all ranks.

    Raises:
        ConfigError, DataError, StorageError: whatever is wrong with what the configuration names.
    """
    if not config.data.train:
        raise ConfigError("data.train is empty; name at least one source, for example - {path: train.jsonl}")
    records = {}
    for split, sources in (("train", config.data.train), ("eval", config.data.eval)):
        records[split] = list(display.count(f"reading {split} records", read_records(sources, quarantine)))
    if ranks.num_ranks > 1 and isinstance(config.model.tokenizer, TrainedTokenizer):
        ranks.on_first(lambda: keep_tokenizer(config.model.tokenizer, records["train"], run_dir))
    tokenizer = make_tokenizer(config, records["train"], run_dir)
    network = make_network(config, tokenizer)
    prepared = {
        split: prepare(found, network.encoder, config, quarantine, display.task(f"preparing {split} groups"))
        for split, found in records.items()
        if split == "train" or config.data.eval
    }
    return Job(config, network, prepared["train"], prepared.get("eval"))


def make_tokenizer(config: Config, records: Iterable[Record], run_dir: Path):
    """The model's tokeniser; a trained one is kept in the run folder and read back on resume."""
    settings = config.model.tokenizer
    if not isinstance(settings, TrainedTokenizer):
        return load_tokenizer(settings or config.model.path)
    return load_tokenizer(str(keep_tokenizer(settings, records, run_dir)))


def keep_tokenizer(settings: TrainedTokenizer, records: Iterable[Record], run_dir: Path) -> Path:
    """The folder of the run's trained tokeniser, which is trained if it is not there yet."""
    kept = run_dir / "tokenizer"
    if not kept.exists():
        conversations = (response.messages for record in records for response in record.responses)
        partial = run_dir / "tokenizer.part"
        train_tokenizer(conversations, settings.train_vocab_size).save_pretrained(partial)
        partial.rename(kept)
    return kept


def make_network(config: Config, tokenizer) -> RewardNetwork:
    """Network with weights, on its device, ready to train. Random weights follow run.seed."""
    settings, data = config.model, config.data
    torch.manual_seed(config.run.seed)
    backbone = init_backbone(settings, tokenizer) if settings.path is None else load_backbone(settings.path)
    limits = ImageLimits(data.max_image_bytes, data.max_image_pixels)
    encoder = make_encoder(
        backbone.config, tokenizer, settings.path, settings.anchor, limits,
        min_pixels=data.min_pixels, max_pixels=data.max_pixels,
        image_mean=data.image_mean, image_std=data.image_std,
    )  # fmt: skip
    network = RewardNetwork(backbone, settings.head, encoder)
    if settings.path is not None and has_head(settings.path):
        check_same_head(Path(settings.path), settings)
        load_head(network.score, Path(settings.path))
    network.freeze(settings.freeze)
    network.to(pick_device(config.run.device))
    if settings.fuse_projections:
        network.fuse_projections()
    fp8 = config.precision.fp8
    network.fp8 = convert_to_fp8(network, fp8) if fp8 != "off" else None
    if config.compile == "layers":
        network.compile_layers()
    dtype = torch.bfloat16 if config.precision.dtype == "bf16" else torch.float32
    network.use_kernels(dtype, kernels=config.kernels, attention=settings.attention)
    network.use_activation_checkpointing(settings.activation_checkpointing)
    return network.train()


def make_engine(network: RewardNetwork, config: Config, ranks: Ranks):
    """The engine for one process, or for this rank of several.

    Raises:
        ConfigError: for what is not possible on several ranks.
    """
    if ranks.num_ranks == 1:
        return LocalEngine(network, config)
    from fastrm.train.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(network, config)


def export_model(engine, folder: Path, ranks: Ranks = ALONE) -> None:
    """Write the whole model as stock files; called on all ranks, of which the first holds and writes it."""
    state = {}
    for name, tensor in engine.model_tensors():
        if ranks.is_first:
            state[name] = host_copy(tensor)
    ranks.on_first(lambda: save_model(engine.network, folder, state))

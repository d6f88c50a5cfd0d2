"""The parts that the loop needs, made from a configuration: data, tokeniser, network."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from fastrm.config import Config
from fastrm.data.group import encode_group
from fastrm.data.packing import EncodedGroup
from fastrm.data.prepared.stored import PreparedSet
from fastrm.data.quarantine import Quarantine
from fastrm.errors import ConfigError, DataError, StorageError
from fastrm.model.exactness import first_layers
from fastrm.model.export import export_dtype, save_model
from fastrm.model.first_use import FirstUse, weights_of
from fastrm.model.lm_head import load_lm_head, untie_other_lm_head
from fastrm.model.loading import Backbone, open_backbone
from fastrm.model.lora import add_lora, base_of, nf4_layers, require_bitsandbytes
from fastrm.model.network import RewardNetwork, init_backbone, pick_device
from fastrm.model.precision import convert_to_fp8, token_multiple
from fastrm.model.stored_head import find_head
from fastrm.model.text import longest_path, path_limit_key
from fastrm.model.weight_files import digest_of
from fastrm.train.checkpoint import model_tensors
from fastrm.train.data import RunData
from fastrm.train.encoder import make_data_encoder, make_tokenizer, prepared_folder
from fastrm.train.engine import LocalEngine
from fastrm.train.optim import check_lr_parts, storage_dtype
from fastrm.train.ranks import ALONE, Ranks
from fastrm.train.template_date import fix_date
from fastrm.train.writing import writer_of
from fastrm.ui import Display


@dataclass
class Job:
    """The parts of a run before its first step.

    Attributes:
        config: with the values that are decided at the first start (`fix_date`).
    """

    config: Config
    network: RewardNetwork
    train: PreparedSet
    eval: PreparedSet | None


def set_up(config: Config, quarantine: Quarantine, display: Display, ranks: Ranks = ALONE) -> Job:
    """Read the data, make the tokeniser and the network, and prepare the groups; on all ranks.

    Raises:
        ConfigError, DataError, StorageError: whatever is wrong with what the configuration names.
    """
    config = ranks.on_first(lambda: fix_date(config, prepared_folder(config), display.say))
    data = RunData(config, display)
    try:
        ranks.on_first(data.begin)
        network = make_network(config, make_tokenizer(config), ranks)
        ranks.on_first(lambda: data.end(network.encoder, network.model.config))
    finally:
        data.close()
    if ranks.is_first:
        data.refusals_into(quarantine)
    return Job(config, network, *data.open())


def make_network(config: Config, tokenizer, ranks: Ranks = ALONE) -> RewardNetwork:
    """Make the network with weights, on its device, ready to train. Random weights follow run.seed.

    Under ZeRO-3 a model from files is divided over the ranks while it is read.
    """
    settings, data = config.model, config.data
    torch.manual_seed(config.run.seed)
    files = None if settings.path is None else open_backbone(settings.path)
    backbone = init_backbone(settings, tokenizer) if files is None else files.model
    longest = longest_path(backbone.config)
    if longest is not None and data.max_tokens_per_group > longest:
        raise ConfigError(
            f"data.max_tokens_per_group: got {data.max_tokens_per_group:,}, but {backbone.config.model_type} with "
            f"{path_limit_key(backbone.config)} is exact up to {longest:,} tokens; set it to at most that"
        )
    encoder = make_data_encoder(config, backbone.config, tokenizer)
    encoder.counts_responses = config.loss.length_normalization
    if files is not None and config.paradigm != "reward":
        untie_other_lm_head(files)
    network = RewardNetwork(backbone, settings.head, encoder, settings.pooling, config.paradigm)
    network.writer = writer_of(config)
    if files is not None and config.paradigm != "reward":
        network.generation = files.place.read_generation()
    keeps_head = files is not None and not settings.head.new and config.paradigm != "judge"
    if keeps_head and (found := find_head(files, tokenizer, settings)) is not None:
        found.load_into(network.score)
    network.freeze(settings.freeze)
    if settings.lora is not None:
        # Known before weights are read: frozen ones are kept in two bytes. Not the head, which is trained.
        for part in filter(None, (network.model, network.lm_head)):
            part.requires_grad_(False)
    if settings.fuse_projections:
        network.fuse_projections()
    device = pick_device(config.run.device)
    if files is not None:
        _read_weights(network, files, config, device, ranks)
    network.to(device)
    fp8 = config.precision.fp8
    network.fp8 = convert_to_fp8(network, fp8) if fp8 != "off" else None
    if settings.lora is not None:
        add_lora(network, settings.lora, base=base_of(files.place))
        network.quantize, network.base_digest = settings.quantize, digest_of(files.tensors)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise ConfigError("model.freeze: leaves nothing to train, since a judge has no reward head; freeze less")
    check_lr_parts(network, config.optim)
    if config.compile == "layers":
        network.compile_layers()
    dtype = torch.bfloat16 if config.precision.dtype == "bf16" else torch.float32
    network.set_kernels(dtype, kernels=config.kernels, attention=settings.attention)
    network.use_activation_checkpointing(settings.activation_checkpointing)
    return network.train()


def _read_weights(network: RewardNetwork, files: Backbone, config: Config, device: torch.device, ranks: Ranks) -> None:
    pick_dtype = storage_dtype(network, config.precision, ranks.num_ranks == 1)
    if ranks.num_ranks > 1 and config.engine.zero_stage == 3:
        from fastrm.train.deepspeed_engine import load_divided

        load_divided(network, files, pick_dtype, config)
    else:
        files.load(pick_dtype, device, **({} if config.model.quantize is None else {"placed": _quantizer(files)}))
        if network.lm_head is not None:
            load_lm_head(network.lm_head, files, pick_dtype, device)


def _quantizer(files: Backbone) -> Callable[[str, torch.nn.Parameter], None]:
    """Return what quantises the weights of a backbone as they are read, so that they are never there whole."""
    require_bitsandbytes()
    from fastrm.model.nf4 import quantize_when_placed

    language = getattr(files.model, "language_model", files.model)
    prefix = "" if language is files.model else "language_model."
    return quantize_when_placed(files.model, {f"{prefix}{name}" for name in nf4_layers(language)})


def check_exactness(job: Job, engine, ranks: Ranks, say: Callable[[str], None]) -> None:
    """Compare the network with the stock class on the run's own groups; called on all ranks.

    Args:
        say: takes the line that tells what was found.

    Raises:
        ExactnessError: on all ranks, if rewards differ by more than rounding explains.
    """
    if not job.config.check_exactness:
        return
    train, encoder = job.train, job.network.encoder
    first_use = _first_use(job.network, engine, job.config, ranks, say)

    def load(number: int) -> EncodedGroup:
        return encode_group(train.records[number], encoder)

    ranks.on_first(lambda: first_use(train.groups, load))


def _first_use(network: RewardNetwork, engine, config: Config, ranks: Ranks, say: Callable[[str], None]) -> FirstUse:
    """Return the check in the precision of the run; of two layers if ranks have only parts of the weights."""
    path = config.model.path
    weights = ["random", config.run.seed] if path is None else weights_of(path)
    options = {"share": config.data.share_prefixes, "multiple": token_multiple(config.precision.fp8)}
    if ranks.num_ranks == 1 or config.engine.zero_stage < 3:
        options["autocast"] = torch.bfloat16 if config.precision.dtype == "bf16" else None
    elif ranks.is_first:
        network, options["whole"] = first_layers(network, engine.all_tensors()), False
    else:
        for _ in engine.all_tensors():  # this rank only helps to gather
            pass
    return FirstUse(network, weights, options, say)


def make_engine(network: RewardNetwork, config: Config, ranks: Ranks):
    """Make the engine of one process, or of this rank of several.

    Raises:
        ConfigError: for what is not possible on several ranks.
    """
    if ranks.num_ranks == 1:
        return LocalEngine(network, config)
    from fastrm.train.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(network, config)


def export_model(engine, folder: Path, ranks: Ranks = ALONE, checkpoint: Path | None = None) -> None:
    """Write the whole model as stock files; called on all ranks, of which the first writes, a tensor at a time.

    Args:
        checkpoint: an intact one of this run, whose weights are written; None: the engine's own.

    Raises:
        StorageError: on all ranks, if it cannot be written.
        DataError: on all ranks, if a weight is not finite; `folder` is then as it was.
    """
    tensors = engine.model_tensors() if checkpoint is None else model_tensors(checkpoint).items()
    failure = None
    try:
        if ranks.is_first:
            save_model(engine.network, folder, dtype=export_dtype(engine.config), tensors=finite(tensors))
    except (StorageError, DataError) as error:
        failure = error
    for _ in tensors if checkpoint is None else ():  # others only help to gather; so does the first after a failure
        pass
    if (failure := ranks.on_first(lambda: failure)) is not None:
        raise failure


def finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield weights up to one that is not finite, which raises: no model without finite rewards is written."""
    for name, tensor in tensors:
        # NaN passes through `aminmax`, which reads each weight once; on a CPU `isfinite` takes thirty times as long.
        if tensor.numel() and not all(limit.isfinite() for limit in torch.aminmax(tensor)):
            # In pieces: `isfinite` of a whole embedding makes temporaries that are larger than the tensor.
            count = sum(int((~part.isfinite()).sum()) for part in tensor.flatten().split(2**22))
            raise DataError(
                f"{name}: {count:,} of {tensor.numel():,} weights are not finite, so the model is not "
                "exported; check the weights of model.path, or go on from an earlier checkpoint with a "
                "lower optim.lr"
            )
        yield name, tensor

"""`fastrm export RUN --step N`: a model of any checkpoint of a run, without a GPU and without the weights in memory.

A checkpoint holds all weights by their stock names, however many ranks wrote it and whatever ZeRO stage divided them.
What it lacks, tokenizer, processor and config.json, follows from the configuration that it holds. So the network is
made without memory for its weights, and each of them goes from file to file.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from fastrm.config import Config
from fastrm.errors import ConfigError, StorageError
from fastrm.model.export import export_dtype, save_model
from fastrm.model.export_command import check_target, export_model, write_for
from fastrm.model.lm_head import untie_as_files
from fastrm.model.loading import LM_HEAD, WeightsOnMeta, empty_backbone
from fastrm.model.lora import add_lora, base_of
from fastrm.model.network import RewardNetwork, init_backbone
from fastrm.model.places import locate
from fastrm.train.checkpoint import CHECKPOINTS, STATE, list_checkpoints, model_tensors, step_of, verify
from fastrm.train.encoder import make_data_encoder, make_tokenizer
from fastrm.train.metrics import statistics_of_step
from fastrm.train.setup import finite
from fastrm.train.writing import writer_of
from fastrm.ui import Display
from fastrm.yaml_files import validate


def export_checkpoint(
    run_dir: Path, step: int | None, out: Path | None, reader: str, display: Display, dtype: torch.dtype | None = None,
    merge: bool = False,
) -> None:  # fmt: skip
    """Write the model of a checkpoint for a reader, and say how it is loaded there.

    Args:
        step: of the checkpoint; None: the one with the best evaluation.
        out: the folder to write; None: exports/step-N in the run's folder.
        reader: transformers or vllm.
        dtype: of the backbone's weights in the files; None: that of the run's own export (model.export_dtype).
        merge: write the adapters of a run with model.lora as a whole model, and not as adapters.

    Raises:
        ConfigError: if there is no such checkpoint, or as `fastrm.model.export_command.export_model`.
        StorageError: if the checkpoint is damaged, or files cannot be read or written.
        DataError: if a weight is not finite.
    """
    path = _find(run_dir, step)
    out = out or run_dir / "exports" / path.name
    check_target(out, reader)
    if (problem := verify(path)) is not None:
        raise StorageError(f"{path}: not an intact checkpoint: {problem}; export another step")
    state = json.loads((path / STATE).read_text())
    stored = state["config"]
    stored["run"]["dir"] = str(run_dir)  # which may have been moved
    config = validate(Config, stored, {}, str(path / STATE))
    weights = model_tensors(path)
    network, weights = _without_weights(config, LM_HEAD in weights), finite(weights.items())
    network.base_digest = state.get("base_digest")
    # The prompt that was trained on, and not what the SPEC's file holds now; old checkpoints have none.
    network.writer = state["writer"] if "writer" in state else writer_of(config)
    if network.lora is None and merge:
        raise ConfigError(f"--merge: {run_dir} trains no adapters (model.lora): its checkpoints are whole; omit it")
    if network.lora is not None and not merge and (dtype is not None or reader == "vllm"):
        option = "--dtype" if dtype is not None else "--for vllm"
        raise ConfigError(f"{option} is for whole models, and {run_dir} trains adapters (model.lora); add --merge")
    network.reward_statistics = statistics_of_step(run_dir, step_of(path))
    dtype = dtype or export_dtype(config)
    if network.lora is None:
        write_for(reader, network, out, display, dtype=dtype, tensors=weights)
    elif merge:
        with TemporaryDirectory(prefix="adapter-", dir=run_dir) as folder:
            save_model(network, Path(folder) / "model", tensors=weights)
            export_model(folder, out, reader, display, dtype)  # reading adapters merges them
    else:
        save_model(network, out, dtype=dtype, tensors=weights)
        display.say(f"{out}: adapters, which PEFT and fastrm put on {config.model.path}; --merge writes a whole model")
    display.say(f"exported step {step_of(path):,} of {run_dir}")


def _find(run_dir: Path, step: int | None) -> Path:
    found = {step_of(path): path for path in list_checkpoints(run_dir / CHECKPOINTS)}
    if not found:
        raise ConfigError(
            f"{run_dir}: holds no checkpoint; --step and --best are for the folder of a run (run.dir), with "
            f"{CHECKPOINTS}/step-N in it"
        )
    steps = ", ".join(f"{number:,}" for number in sorted(found))
    if step is not None:
        if step not in found:
            raise ConfigError(f"--step {step}: {run_dir} keeps no checkpoint of it; there are those of steps {steps}")
        return found[step]
    newest = found[max(found)]
    best = json.loads((newest / STATE).read_text())["progress"]["best_checkpoint"]
    if best is None:
        raise ConfigError(
            f"--best: no evaluation of {run_dir} has chosen a step yet (data.eval, run.eval_every); name one with "
            f"--step: {steps}"
        )
    if not (newest.parent / best).is_dir():
        raise ConfigError(f"--best: {best} is not in {newest.parent}; name another one with --step: {steps}")
    return newest.parent / best


def _without_weights(config: Config, has_lm_head: bool) -> RewardNetwork:
    """Make the network of a run without memory for its backbone's weights.

    Args:
        has_lm_head: the checkpoint holds an LM head: the run found it in the files of model.path, whatever their config
            says of ties. Of a run with adapters, which holds none, the files themselves say so.
    """
    settings, tokenizer = config.model, make_tokenizer(config)
    if settings.path is None:
        with WeightsOnMeta():
            backbone = init_backbone(settings, tokenizer)
    else:
        backbone = empty_backbone(settings.path)
        if has_lm_head:
            backbone.config.tie_word_embeddings = False
        elif config.paradigm != "reward" and settings.lora is not None:
            untie_as_files(backbone.config, settings.path)
    encoder = make_data_encoder(config, backbone.config, tokenizer)
    network = RewardNetwork(backbone, settings.head, encoder, settings.pooling, config.paradigm)
    if settings.path is not None and config.paradigm != "reward":
        network.generation = locate(settings.path).read_generation()
    if settings.fuse_projections:  # files have their tensors in the order of the run's own network
        network.fuse_projections()
    if settings.lora is not None:
        add_lora(network, settings.lora, base=base_of(locate(settings.path)))
        network.quantize = settings.quantize
    return network

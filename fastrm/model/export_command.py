"""`fastrm export`: a reward model of any trainer as a folder that transformers or vLLM reads."""

from pathlib import Path

import torch

from fastrm.errors import ConfigError
from fastrm.model.export import load_model, save_model
from fastrm.model.network import RewardNetwork
from fastrm.model.places import locate
from fastrm.model.stock_classes import StockReading, read_by_stock
from fastrm.model.vllm_classes import VllmReading, read_by_vllm
from fastrm.ui import Display

READERS = ("transformers", "vllm")


def export_model(
    model: str | Path, out: Path, reader: str, display: Display, dtype: torch.dtype | None = None
) -> None:
    """Write a reward model for a reader, and say how it is loaded there.

    Args:
        model: a folder or hub id, as `RewardModel.from_pretrained` takes it.
        out: the folder to write; it must not exist, or be empty.
        reader: one of READERS.
        dtype: of the backbone's weights in the files; None: as they are where they have two bytes, else float32.

    Raises:
        ConfigError: if the folder is in use, the model is no reward model, or the reader would misread it.
        StorageError: if files cannot be read or written.
    """
    check_target(out, reader)
    locate(model)
    # Adapters are merged as weights are read: in two bytes, a change would be rounded before it is written in four.
    network = load_model(Path(model), dtype=torch.float32 if dtype is torch.float32 else None, writes=reader != "vllm")
    if network.adopted:
        display.say(network.adopted)
    write_for(reader, network, out, display, dtype=dtype)


def check_target(out: Path, reader: str) -> None:
    """Refuse a folder that is in use, and a reader that is not one of READERS, by a ConfigError."""
    if reader not in READERS:
        raise ConfigError(f"--for: got {reader!r}, wanted one of {', '.join(READERS)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out}: exists already; name a new folder, or remove it first")


def write_for(reader: str, network: RewardNetwork, out: Path, display: Display, **options) -> None:
    """Write a network for one of READERS with `save_model`, which takes the options, and say how it is loaded."""
    reading = read_by_vllm(network) if reader == "vllm" else read_by_stock(network)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_model(network, out, reading=reading, **options)
    for line in how_to_load(reading, out):
        display.say(line)


def how_to_load(reading: StockReading, folder: Path) -> list[str]:
    """Return the lines that tell a user how a written export is loaded."""
    if not isinstance(reading, VllmReading):
        if reading.architecture is not None:
            does = "gives its rewards" if reading.classifies else f"writes; fastrm eval {folder} DATA evaluates it"
            return [f"{folder}: transformers' {reading.architecture} {does}"]
        # Of vision models there is no stock classifier, even for a head that one would read.
        why = f" (the stock class would not: {reading.why})" if reading.why else ""
        return [f"{folder}: AutoModelForSequenceClassification gives its rewards after import fastrm.hf{why}"]
    lines = [f"{folder}: vLLM serves it as {reading.architecture}"]
    if reading.needs_plugin:
        lines += [f"since {reading.why}, vLLM needs the plugin: pip install kernels/vllm_plugin"]
    if reading.loses_bias:
        lines += [
            f"for vLLM only: transformers' own {reading.architecture} would leave the bias of the head out; "
            "import fastrm.hf first there, or export --for transformers"
        ]
    images = " --mm-processor-kwargs '{\"use_fast\": false}'" if reading.has_images else ""
    return [*lines, f'vllm serve {folder} --runner pooling{images}; ask /classify with "use_activation": false']

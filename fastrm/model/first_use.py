"""The check of exactness.py at a model's first use, and its stored result, so that it runs once.

Results lie in $XDG_CACHE_HOME/fastrm/exact (~/.cache/fastrm/exact), one small file for a model, a kind of input and a
setting. Its name is a digest of all that the result depends on: the files of the model by size and time of change,
config, precision, kernels, device, the versions of torch and transformers, and fastrm's own code. A folder that
cannot be written costs a check at each start, and is no error.
"""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

import fastrm_kernels
from fastrm.data.group import GroupSize
from fastrm.data.packing import EncodedGroup
from fastrm.errors import StorageError
from fastrm.json_files import to_json
from fastrm.model.exactness import Agreement, check_network, describe
from fastrm.model.fusion import FusedLinear
from fastrm.model.network import RewardNetwork
from fastrm.model.places import ADAPTER_CONFIG, locate
from fastrm.model.samples import KINDS, Sample, pick_samples
from fastrm.model.weight_files import CONFIG, finder
from fastrm.storage import whole_file


class FirstUse:
    """A check of a network before its first rewards, of a vision model once for text, images and videos each.

    May be called from any number of threads.

    Args:
        network: on its device, kernels chosen.
        weights: what tells these weights from others, plain data (`weights_of`).
        options: of `check_network`.

    Attributes:
        say: takes the line that tells what was found.
    """

    def __init__(
        self,
        network: RewardNetwork,
        weights: object,
        options: dict[str, Any] | None = None,
        say: Callable[[str], None] = lambda line: None,
    ):
        self.say = say
        self._network, self._weights = network, weights
        self._options = options or {}
        self._checked: set[str] = set()
        self._lock = threading.Lock()

    def __call__(self, groups: Sequence[GroupSize], load: Callable[[int], EncodedGroup]) -> None:
        """Check the network with groups of kinds that it has not met yet.

        Args:
            groups: about to be used.
            load: as of `pick_samples`.

        Raises:
            ExactnessError: as `check_network`.
        """
        encoder = self._network.encoder
        with self._lock:
            kinds = KINDS if encoder.vision is not None else KINDS[:1]
            if missing := [kind for kind in kinds if kind not in self._checked]:
                self._check(pick_samples(groups, load, encoder, missing))

    def _check(self, samples: dict[str, Sample]) -> None:
        found: list[Agreement] = []
        for kind, sample in samples.items():
            file = cache_folder() / f"{self._key(kind)}.json"
            agreements = _read(file)
            if not agreements:
                agreements = check_network(self._network, sample, **self._options)
                if agreements:
                    _write(file, agreements)
            found += agreements
            self._checked.add(kind)
        if found:
            self.say(describe(found))

    def _key(self, kind: str) -> str:
        network = self._network
        parts = [
            network.model.config.to_dict(), self._weights, kind, self._options, network.pooling, network.encoder.anchor,
            str(network.score), network.head_settings.activation, network.attention.name, network.head_kernels.name,
            network.norm_and_gate, sorted({str(parameter.dtype) for parameter in network.parameters()}),
            str(network.lora), network.paradigm,
            any(isinstance(module, FusedLinear) for module in network.modules()), _device_name(network.device),
            torch.__version__, transformers.__version__, _code(),
        ]  # fmt: skip
        return hashlib.sha256(to_json(parts, sort_keys=True, default=str).encode()).hexdigest()


def weights_of(path: str | Path) -> list:
    """Return data that identifies the weights of a folder or hub id: size and time of change of the folder's files.

    For an adapter they are its files and those of its base model.
    """
    place = locate(path)
    files: list[Path] = []
    for where in dict.fromkeys((place.base, place.adapter or place.base)):
        folder = Path(where)
        if not folder.exists():  # a hub id: its files are in the hub's cache
            folder = finder(where)(CONFIG if where == place.base else ADAPTER_CONFIG).parent
        files += [file for file in sorted(folder.iterdir()) if file.is_file()]
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def cache_folder() -> Path:
    """Return the folder of stored results; relative paths in XDG_CACHE_HOME are ignored, as its specification says."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):
        base = os.path.expanduser("~/.cache")
    # Without a home nothing can be stored: the working directory is not ours.
    return Path(base if os.path.isabs(base) else os.devnull) / "fastrm" / "exact"


def _read(file: Path) -> list[Agreement]:
    try:
        return [Agreement(**fields) for fields in json.loads(file.read_text())]
    except (OSError, ValueError, TypeError):
        return []


def _write(file: Path, agreements: list[Agreement]) -> None:
    """Write a result whole, or not at all where the folder cannot be written."""
    with suppress(OSError, StorageError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file, shared=True) as write:
            write(to_json([asdict(agreement) for agreement in agreements]) + "\n")


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@cache
def _code() -> str:
    """Return a digest of fastrm's own sources: another version is checked again."""
    digest = hashlib.sha256()
    for package in (Path(__file__).parents[1], Path(fastrm_kernels.__file__).parent):
        for file in sorted(package.rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()

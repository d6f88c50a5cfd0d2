"""A writer of safetensors files, tensor by tensor, with no more in memory than one of them.

Where every tensor goes is decided before the first one comes: headers need only names, shapes and dtypes. So tensors
may come in any order, and none is kept.
"""

import math
import os
from collections.abc import Iterable
from pathlib import Path

import torch

from fastrm.errors import StorageError
from fastrm.json_files import to_json
from fastrm.model.weight_files import DTYPES, INDEX, SINGLE
from fastrm.resources import free_disk

# The most bytes of a file; a larger tensor has a file of its own.
SHARD_BYTES = 5 * 10**9
_CODES = {dtype: code for code, dtype in DTYPES.items()}

# The name, shape and dtype of a tensor.
Entry = tuple[str, tuple[int, ...], torch.dtype]


class WeightWriter:
    """A writer of a model's weights: model.safetensors, or shards with the index that transformers reads.

    Args:
        folder: exists, and holds no weights.
        entries: of all tensors that will be written.

    Raises:
        StorageError: if the disk has less room than they need.
        OSError: if the files cannot be made.
    """

    def __init__(self, folder: Path, entries: Iterable[Entry]):
        shards = _shards(entries)
        self._files: dict[str, Path] = {}
        self._places: dict[str, tuple[int, int, torch.dtype]] = {}
        self._missing = {name for shard in shards for name, _, _ in shard}
        sizes = [sum(_nbytes(entry) for entry in shard) for shard in shards]
        free = free_disk(folder)
        if sum(sizes) > free:
            raise StorageError(
                f"{folder}: the weights have {sum(sizes):,} bytes, the disk has room for {free:,}; free some space"
            )
        self._descriptors: list[int] = []
        try:
            for number, shard in enumerate(shards):
                name = SINGLE if len(shards) == 1 else f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
                self._begin(folder / name, shard)
            if len(shards) > 1:
                weight_map = {name: self._files[name].name for name in sorted(self._files)}
                index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
                (folder / INDEX).write_text(to_json(index, indent=2) + "\n")
        except BaseException:
            self.abandon()  # the caller cannot: it has no writer yet
            raise

    def _begin(self, file: Path, shard: list[Entry]) -> None:
        header, begin = {"__metadata__": {"format": "pt"}}, 0
        for entry in shard:
            name, shape, dtype = entry
            end = begin + _nbytes(entry)
            header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
            begin = end
        text = to_json(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # data begins at a multiple of 8
        descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        self._descriptors.append(descriptor)
        _write(descriptor, memoryview(len(text).to_bytes(8, "little") + text), 0)
        os.ftruncate(descriptor, 8 + len(text) + begin)
        for name, _, dtype in shard:
            self._files[name] = file
            self._places[name] = descriptor, 8 + len(text) + header[name]["data_offsets"][0], dtype

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor, rounded to the dtype of its entry; it may be on any device."""
        descriptor, place, dtype = self._places[name]
        flat = tensor.detach().to("cpu", dtype).contiguous().view(-1)
        _write(descriptor, memoryview(flat.view(torch.uint8).numpy()), place)
        self._missing.discard(name)

    def close(self) -> None:
        """Wait until all data is on the disk.

        Raises:
            ValueError: if a tensor is missing.
        """
        try:
            for descriptor in self._descriptors:
                os.fsync(descriptor)
        finally:
            self.abandon()
        if self._missing:
            raise ValueError(f"{len(self._missing)} weights were never written, one of them {min(self._missing)}")

    def abandon(self) -> None:
        """Close the files as they are."""
        while self._descriptors:
            os.close(self._descriptors.pop())


def _shards(entries: Iterable[Entry]) -> list[list[Entry]]:
    """Return entries by file, wider elements first, so that each tensor begins at a multiple of its elements' size."""
    shards, room = [[]], SHARD_BYTES
    for entry in sorted(entries, key=lambda entry: -entry[2].itemsize):
        if _nbytes(entry) > room and shards[-1]:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(entry)
        room -= _nbytes(entry)
    return shards


def _nbytes(entry: Entry) -> int:
    return math.prod(entry[1]) * entry[2].itemsize


def _write(descriptor: int, data: memoryview, place: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, place)
        data, place = data[count:], place + count

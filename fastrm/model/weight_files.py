"""The safetensors files of a model: checked by their headers, read in pieces straight to their places.

A file is 8 bytes with the length of its header, the header (JSON: for each tensor its dtype, its shape and where its
bytes begin and end), then the bytes of all tensors, little endian and row by row. The format is that of
https://github.com/huggingface/safetensors#format. Everything that can be wrong with a checkpoint's files is
found from the headers, which are a few hundred kB of any model, so before a weight is read.

Weights are read by offset and not mapped: pages of a mapping count as memory of the process until it ends, which
would double the peak, and here any run of elements can be read by itself.
"""

import functools
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from fastrm.data.sources.files import LFS_POINTER
from fastrm.errors import ConfigError, StorageError, looked_for
from fastrm.hub_errors import explain

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
VALUE_HEAD = "value_head.safetensors"  # LLaMA-Factory's file beside a model or an adapter
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
# The dtypes of buffers in published files, which no model here reads (position ids, masks).
_BUFFER_DTYPES = {"I64": torch.int64, "BOOL": torch.bool}
# The safetensors library refuses longer headers.
MAX_HEADER_BYTES = 100_000_000
# The bytes that are read at a time where elements change their dtype or go to a GPU.
CHUNK_BYTES = 16 * 2**20
_GGUF = (
    "is a GGUF file, and weights are read from safetensors; convert it once with transformers: "
    "AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=NAME).save_pretrained(OUT), and the same with AutoTokenizer"
)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file.

    Attributes:
        start: offset of its first byte in the file.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    def read_into(self, out: torch.Tensor, first: int = 0) -> None:
        """Fill `out` (n,), contiguous, of any float dtype on any device, with elements first to first + n - 1.

        Elements of another dtype are rounded to the nearest, as `Tensor.to` does. At most CHUNK_BYTES are held
        besides `out`.

        Raises:
            StorageError: if the file cannot be read, or ends too early.
        """
        place = self.start + first * self.dtype.itemsize
        try:
            with self.file.open("rb", buffering=0) as file:
                if out.dtype is self.dtype and out.device.type == "cpu":
                    _fill(file.fileno(), out, place)
                    return
                step = CHUNK_BYTES // self.dtype.itemsize
                chunk = torch.empty(min(step, out.numel()), dtype=self.dtype)
                for begin in range(0, out.numel(), step):
                    part = chunk[: min(step, out.numel() - begin)]
                    _fill(file.fileno(), part, place + begin * self.dtype.itemsize)
                    out[begin : begin + part.numel()].copy_(part)
        except OSError as error:
            raise StorageError(f"{self.file}: cannot be read: {error.strerror or error}") from None

    def read(self) -> torch.Tensor:
        """Read the whole tensor into the host's memory, in the dtype of the file."""
        flat = torch.empty(self.numel, dtype=self.dtype)
        self.read_into(flat)
        return flat.view(self.shape)


def _fill(descriptor: int, out: torch.Tensor, place: int) -> None:
    view = memoryview(out.detach().view(torch.uint8).numpy())
    while view:
        count = os.preadv(descriptor, [view], place)
        if count == 0:
            raise OSError(None, "it has become shorter while it was read")
        view, place = view[count:], place + count


class WeightFiles(Mapping[str, StoredTensor]):
    """The tensors of a checkpoint by their names in the files.

    Attributes:
        where: the folder or hub id, as it was given.
    """

    def __init__(self, where: str, tensors: dict[str, StoredTensor]):
        self.where, self._tensors = where, tensors

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most elements."""
        sizes: Counter = Counter()
        for tensor in self._tensors.values():
            sizes[tensor.dtype] += tensor.numel
        return max(sizes, key=sizes.get, default=torch.float32)

    @classmethod
    def open(cls, path: str | Path) -> "WeightFiles":
        """Check the files of a folder or hub id by their headers alone; files of a hub id are downloaded.

        Raises:
            ConfigError: if there is a GGUF file instead, or no such folder or hub id.
            StorageError: if a file is missing, damaged, incomplete or of another save than the index.
        """
        find = finder(path)
        if (single := find(SINGLE)) is not None:
            return cls(str(path), read_header(single))
        if (index := find(INDEX)) is not None:
            return cls(str(path), _read_shards(index, find))
        raise _no_weights(Path(path))


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Read the header of one safetensors file and return its tensors.

    Raises:
        StorageError: if it is none, is shorter or longer than its header says, or holds dtypes that are not trained
            (quantised weights).
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise StorageError(f"{file}: no safetensors header in its {size:,} bytes; {_download_again(file)}")
            entries = json.loads(stream.read(length))
        entries.pop("__metadata__", None)
        begin, tensors, end = 8 + length, {}, 0
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            tensors[name] = _stored(file, name, entry, begin, end)
            end = entry["data_offsets"][1]
    except OSError as error:
        raise StorageError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"{file}: damaged safetensors header ({error}); download or copy it again") from None
    if size != begin + end:
        raise StorageError(
            f"{file}: has {size:,} bytes, its header says {begin + end:,}: the file is "
            f"{'cut off' if size < begin + end else 'damaged'}; download or copy it again"
        )
    return tensors


def _download_again(file: Path) -> str:
    with file.open("rb") as stream:
        is_pointer = stream.read(len(LFS_POINTER)) == LFS_POINTER
    return "it is a pointer of Git LFS: run git lfs pull in its folder" if is_pointer else "download or copy it again"


def _stored(file: Path, name: str, entry: dict, begin: int, end: int) -> StoredTensor:
    start, stop = entry["data_offsets"]
    dtype = (DTYPES | _BUFFER_DTYPES).get(entry["dtype"])
    if dtype is None:
        raise StorageError(
            f"{file}: {name} has dtype {entry['dtype']}, wanted one of {', '.join(DTYPES)}; quantised weights "
            "cannot be trained or scored here: take the checkpoint that they were made from"
        )
    tensor = StoredTensor(file, dtype, tuple(entry["shape"]), begin + start)
    if start != end or stop - start != tensor.numel * tensor.dtype.itemsize:
        raise ValueError(f"{name} does not lie where the tensor before it ends, or has another size than its shape")
    return tensor


def _read_shards(index: Path, find) -> dict[str, StoredTensor]:
    try:
        content = json.loads(index.read_text())
        weight_map = dict(content["weight_map"])
        total = (content.get("metadata") or {}).get("total_size")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"{index}: not a readable index of shards ({error}); download or copy it again") from None
    shards = {}
    for name in sorted(set(weight_map.values())):
        file = find(name)
        if file is None:
            raise StorageError(
                f"{index.parent / name}: is missing, and holds {sum(v == name for v in weight_map.values()):,} of the "
                f"{len(weight_map):,} weights that {INDEX} names; download or copy it"
            )
        shards[name] = read_header(file)
    for tensor, name in weight_map.items():
        if tensor not in shards[name]:
            raise StorageError(
                f"{index.parent / name}: lacks {tensor}, which {INDEX} places there: the shard is of another save; "
                "download or copy all files again"
            )
    _check_dtypes(index, shards, total)
    # Some tools add tensors, such as a head, to a shard and not to the index; transformers loads those too.
    stored_tensors = {tensor: stored for shard in shards.values() for tensor, stored in shard.items()}
    return stored_tensors | {tensor: shards[name][tensor] for tensor, name in weight_map.items()}


def _check_dtypes(index: Path, shards: dict[str, dict[str, StoredTensor]], total: int | None) -> None:
    """Refuse shards of several saves: of different dtypes, and of other bytes than the index has counted.

    The bytes alone prove nothing: several tools write a wrong sum of them. Nor do several dtypes alone: some
    checkpoints keep a few weights in float32.
    """
    dtypes = {name: max((t.dtype for t in shard.values()), key=lambda d: _elements(shard, d), default=None)
              for name, shard in shards.items()}  # fmt: skip
    found = sum(t.numel * t.dtype.itemsize for shard in shards.values() for t in shard.values())
    if total is None or found == total or len(set(dtypes.values())) == 1:
        return
    usual = Counter(dtypes.values()).most_common(1)[0][0]
    other = next(name for name, dtype in dtypes.items() if dtype is not usual)
    raise StorageError(
        f"{index.parent / other}: holds {_name(dtypes[other])} where most shards hold {_name(usual)}, and the shards "
        f"have {found:,} bytes where {INDEX} says {total:,}: it is of another save; download or copy all files again"
    )


def _elements(shard: dict[str, StoredTensor], dtype: torch.dtype) -> int:
    return sum(tensor.numel for tensor in shard.values() if tensor.dtype is dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_format(path: str | Path) -> None:
    """Refuse a local model in another format than safetensors; says nothing of hub ids, and reads four bytes a file.

    Raises:
        ConfigError: for a file, or a folder that has weights as GGUF and not as safetensors.
    """
    path = Path(path)
    if path.is_file():
        raise ConfigError(f"{path}: {_GGUF if _is_gguf(path) else 'is a file; wanted a folder with safetensors'}")
    if path.is_dir() and not any((path / name).exists() for name in (SINGLE, INDEX)):
        gguf = next((file for file in sorted(path.iterdir()) if _is_gguf(file)), None)
        if gguf is not None:
            raise ConfigError(f"{gguf}: {_GGUF}")


def finder(path: str | Path) -> Callable[[str], Path | None]:
    """Return a function from the name of a file in a folder or hub id to its place on this disk; None: no such file.

    Of a hub id it downloads the file, and without a network takes it from the cache.

    Raises:
        ConfigError: if there is a GGUF file instead; the function itself, if there is no such folder or hub id.
    """
    if not Path(path).exists():
        return _hub_finder(str(path))
    check_format(path)
    return lambda name: Path(path) / name if (Path(path) / name).is_file() else None


def _hub_finder(repository: str):
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def find(name: str) -> Path | None:
        problem = _hub_problem()
        try:
            return Path(hf_hub_download(repository, name, local_files_only=problem is not None))
        except LocalEntryNotFoundError as error:
            # Offline: what is not in the cache may still be on the hub; only what every model has must be there.
            if name not in (INDEX, CONFIG):
                return None
            reason = explain(repository, error) if "HF_HUB_OFFLINE" in os.environ or problem is None else problem
            if name == INDEX:  # CONFIG was asked for before
                reason = f"its download was not finished: the cache has its {CONFIG} and not its weights; {reason}"
        except EntryNotFoundError:
            return None
        except Exception as error:  # the hub client raises many types; all mean the same to the user
            reason = explain(repository, error)
        raise ConfigError(
            f"{repository!r}: no such folder here{looked_for(repository)}, and {name} does not come from the hub "
            f"({reason}); wanted a folder with config.json and safetensors, or a reachable hub id"
        )

    return find


@functools.cache
def _hub_problem() -> str | None:
    """Return why the hub cannot be reached, or None.

    It is asked once: its client would try for 23 s at each file. Where it is away the client is told to use its cache
    alone, for the files that transformers asks for.
    """
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception as error:  # of whichever library the hub's client sends requests with
        constants.HF_HUB_OFFLINE = True
        return f"{constants.ENDPOINT} cannot be reached: {error}"
    return None


def _no_weights(path: Path) -> StorageError:
    names = sorted(file.name for file in path.iterdir()) if path.is_dir() else []
    other = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".safetensors"))]
    if broken := [name for name in other if not (path / name).exists()]:
        return StorageError(
            f"{path / broken[0]}: is a link to {os.readlink(path / broken[0])}, which is not there; copy the folder "
            "with what its links stand for (cp -rL)"
        )
    found = f"is only {', '.join(other[:3])}" if other else "are no weights"
    return StorageError(
        f"{path}: the weights cannot be loaded: wanted {SINGLE}, or {INDEX} with its shards; there {found}. Formats "
        "other than safetensors can run code and are not read; save the model with transformers' save_pretrained"
    )


def _is_gguf(file: Path) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return stream.read(4) == b"GGUF"


def digest_of(tensors: Mapping[str, StoredTensor]) -> str:
    """Return a digest of a backbone's weights: of their names, shapes, dtypes and first 64 elements."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        first = torch.empty(min(64, tensors[name].numel), dtype=tensors[name].dtype)
        tensors[name].read_into(first)
        digest.update(f"{name} {tensors[name].shape} {first.dtype}".encode())
        digest.update(first.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

"""The files of a benchmark's rows: a local file or folder in the published layout, or the hub."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from fastrm.data.sources.files import SUFFIXES, data_files, read_rows
from fastrm.errors import DataError, RecordError, looked_for
from fastrm.evaluate.benchmarks.rows import named

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def find_files(name: str, data: str | None, hub_id: str | None, patterns: Sequence[str]) -> list[str]:
    """Find the data files of a benchmark.

    Args:
        data: a file, a folder, or a hub id; None: `hub_id`.
        hub_id: where the benchmark is published; None if it is not on the hub.
        patterns: of the published file names, the preferred first.

    Raises:
        DataError: there is no such place, or a folder has no published name and not just one data file.
    """
    if data is not None and Path(data).exists():
        return _in_folder(name, Path(data), patterns) if Path(data).is_dir() else data_files(data)
    if data is not None and (not _HUB_ID.fullmatch(data) or Path(data).suffix in SUFFIXES):
        wanted = "wanted its file, its folder, or a hub id owner/name"
        raise DataError(f"bench:{name}: {data} does not exist{looked_for(data)}; {wanted}")
    if data is None and hub_id is None:
        raise DataError(f"bench:{name}: is not on the hub; name a local copy with --data (see docs/evaluation.md)")
    return _in_folder(name, _download(name, data or hub_id, patterns), patterns)


def _in_folder(name: str, folder: Path, patterns: Sequence[str]) -> list[str]:
    for pattern in patterns:
        if files := sorted(str(file) for file in folder.glob(pattern) if file.is_file()):
            return files
    only = [file for file in (*folder.glob("*"), *folder.glob("data/*")) if file.is_file() and _is_data(file.name)]
    if len(only) == 1:
        return [str(only[0])]
    raise DataError(
        f"bench:{name}: {folder} has none of {', '.join(patterns)}, and {len(only)} other data files; name the data "
        "file itself"
    )


def _is_data(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _download(name: str, hub_id: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    allowed = [*patterns, *(pattern.rpartition("/")[2] for pattern in patterns), "images/**"]
    try:
        return Path(snapshot_download(hub_id, repo_type="dataset", allow_patterns=allowed))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"bench:{name}: {hub_id} cannot be fetched from the hub: {reason}; download it elsewhere and give its "
            "folder with --data"
        ) from None


def numbered_rows(files: Sequence[str]) -> Iterator[tuple[str, str, dict]]:
    """Yield (file, origin, row) of every row, in order.

    Raises:
        DataError: a file or one of its rows cannot be read.
    """
    for file in files:
        for number, row in read_rows(file):
            origin = f"{file}:{number}"
            if isinstance(row, RecordError):
                raise named(origin, row)
            if not isinstance(row, dict):
                raise DataError(f"{origin}: wanted an object with the benchmark's fields, got {type(row).__name__}")
            yield file, origin, row

"""The kind of a user's `model.path` by its files: a model, a run, a checkpoint or an adapter."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from fastrm.errors import ConfigError, StorageError
from fastrm.model.weight_files import CONFIG, INDEX, SINGLE, check_format, finder

ADAPTER_CONFIG, GENERATION = "adapter_config.json", "generation_config.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class ModelPlace:
    """The places of the parts of a model, each a folder or hub id.

    Attributes:
        given: as the user wrote it.
        base: holds config.json and the weights.
        adapter: holds adapter_config.json and the adapter's weights; None: the model has no adapter.
    """

    given: str
    base: str
    adapter: str | None = None

    @property
    def tokenizer(self) -> str:
        """The tokenizer's place: the adapter's own if it has one, as trainers may add to it, else the base model's."""
        return self._of_adapter(_TOKENIZER_FILES)

    @property
    def processor(self) -> str:
        """The place of the image processor's files, found like the tokenizer's."""
        return self._of_adapter(_PROCESSOR_FILES)

    def _of_adapter(self, names: tuple[str, ...]) -> str:
        if self.adapter is None or self.adapter == self.base:
            return self.base
        find = finder(self.adapter)
        return self.adapter if any(find(name) is not None for name in names) else self.base

    def read_config(self) -> dict:
        """Read config.json as plain objects, with keys that transformers does not know.

        It is that of an adapter that a run has saved, else the base's.

        Raises:
            ConfigError: if there is none.
        """
        return self._read_own_config() or read_json(self.base, CONFIG)

    def read_generation(self) -> dict:
        """Read the base's generation_config.json; {} where there is none."""
        return {} if finder(self.base)(GENERATION) is None else read_json(self.base, GENERATION)

    @property
    def has_own_head(self) -> bool:
        """True for an adapter that a run of fastrm has saved with its head, whatever head the base has."""
        return bool(self._read_own_config())

    @property
    def below(self) -> dict:
        """The settings `quantize` and `base_digest` of the base below an adapter that a run has saved, if known."""
        return self._read_own_config().get("fastrm", {})

    def _read_own_config(self) -> dict:
        if self.adapter is None or self.adapter == self.base or finder(self.adapter)(CONFIG) is None:
            return {}
        config = read_json(self.adapter, CONFIG)
        return config if "fastrm" in config else {}


def checked_path(path: object) -> str | os.PathLike:
    """Return the path of a model as it was given.

    Raises:
        ConfigError: it is neither a text nor a path, or empty, which would stand for the working folder.
    """
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise ConfigError(f"path of a model: got {path!r}, wanted a folder or a hub id")
    return path


def locate(path: str | Path) -> ModelPlace:
    """Locate the parts of the model at a folder or hub id, by its files; no weights are read.

    A run's folder stands for its `model/`. An adapter brings the base model that its adapter_config.json names, unless
    that lies in the same folder.

    Raises:
        ConfigError: for a GGUF file, a checkpoint, a run that has exported nothing yet, an adapter without its base
            model, or a path that does not exist.
    """
    given, folder = str(checked_path(path)), Path(path)
    if not (folder / CONFIG).is_file() and (folder / "model" / ADAPTER_CONFIG).is_file():
        folder = folder / "model"  # a run's, with an adapter in it
    check_format(folder)
    if not folder.exists() and not _may_be_on_hub(given):
        raise ConfigError(
            f"{given}: no such folder (looked for {folder.absolute()}); wanted the model/ folder of a run, a folder "
            "with config.json and safetensors, or a hub id such as Qwen/Qwen2.5-VL-3B-Instruct"
        )
    if folder.is_dir() and not (folder / ADAPTER_CONFIG).is_file():
        return ModelPlace(given, _model_folder(folder))
    where = str(folder) if folder.is_dir() else given
    find = finder(where)
    if find(ADAPTER_CONFIG) is None:
        find(CONFIG)  # names a folder that is not there where the hub cannot be reached
        return ModelPlace(given, given)
    if find(SINGLE) is not None or (folder / INDEX).is_file():
        return ModelPlace(given, where, where)
    return ModelPlace(given, _base_of(where), where)


def _may_be_on_hub(name: str) -> bool:
    """Return whether a name has the form of a hub id, owner/name or name."""
    return not name.startswith((".", "/", "~")) and name.count("/") <= 1


def _model_folder(folder: Path) -> str:
    """Return the folder with config.json in or under a local folder that is no adapter."""
    if (folder / CONFIG).is_file():
        return str(folder)
    if (folder / "state.json").is_file() and (folder / "manifest.json").is_file():
        raise ConfigError(_checkpoint_message(folder))
    exported = folder / "model"
    if (exported / CONFIG).is_file():
        return str(exported)
    if (folder / "metrics.jsonl").is_file() or (folder / "checkpoints").is_dir():
        raise ConfigError(
            f"{folder}: is a run that has exported no model yet; finish it with fastrm train CONFIG --resume auto, and "
            f"then name {exported}, or make a model of a checkpoint: fastrm export {folder} --step N --out FOLDER"
        )
    return str(folder)


def _checkpoint_message(folder: Path) -> str:
    run = folder.parent.parent
    step = folder.name.removeprefix("step-").lstrip("0") or "0"
    exported = run / "model"
    export = f"the model of the run's end is {exported}" if exported.is_dir() else f"{run} has exported none yet"
    return (
        f"{folder}: is a checkpoint for going on with a run, not a model, and holds no config.json and no tokenizer; "
        f"{export}. To make a model of this step: fastrm export {run} --step {step} --out FOLDER"
    )


def _base_of(adapter: str) -> str:
    """Return the base model that an adapter names: as a path, then relative to the adapter, else as a hub id."""
    name = read_json(adapter, ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ConfigError(
            f"{adapter}/{ADAPTER_CONFIG}: names no base model; set base_model_name_or_path to its folder or hub id"
        )
    places = [Path(name), Path(adapter) / name]
    found = next((place for place in places if place.is_dir()), None)
    if found is None and not _may_be_on_hub(name):
        raise ConfigError(
            f"{adapter}: is an adapter for the base model {name!r}, which is not here (looked for "
            f"{' and '.join(map(str, dict.fromkeys(places)))}); set base_model_name_or_path in {ADAPTER_CONFIG} to its "
            "folder or hub id"
        )
    base = name if found is None else str(found)
    if finder(base)(ADAPTER_CONFIG) is not None:
        raise ConfigError(f"{adapter}: its base model {base!r} is an adapter itself; merge that one first")
    return base


def read_json(where: str, name: str) -> dict:
    file = finder(where)(name)
    if file is None:
        raise ConfigError(
            f"{where}: has no {name}; wanted the model/ folder of a run, a model's folder with config.json and "
            "safetensors, or a reachable hub id"
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StorageError(f"{file}: cannot be read ({error}); download or copy it again") from None
    if not isinstance(content, dict):
        raise StorageError(f"{file}: holds {type(content).__name__}, wanted an object; download or copy it again")
    return content

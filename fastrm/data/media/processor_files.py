"""Settings of image and video processors from the files of a model, as the stock processors find them.

Stock classes look into processor_config.json for a section `image_processor` or `video_processor` first, then into the
files of their own: preprocessor_config.json, and video_preprocessor_config.json before it for videos. Of limits of
pixels, `min_pixels` and `max_pixels` beside `size` replace its `shortest_edge` and `longest_edge`.
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastrm.errors import ConfigError

# Earlier names of classes, which files of published models still have.
_EARLIER = {"Qwen2VLImageProcessor": "Qwen2_5_VLImageProcessor", "Qwen2VLVideoProcessor": "Qwen2_5_VLVideoProcessor"}
NESTED, IMAGE_FILE, VIDEO_FILE = "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"


@dataclass(frozen=True)
class ProcessorSettings:
    """The settings of a processor and the file that they are from.

    Attributes:
        values: by key, as in the file.
        file: its path.
        section: the key of processor_config.json that holds them; empty for a file of their own.
    """

    values: Mapping[str, Any]
    file: str
    section: str = ""

    def refuse(self, key: str, reason: str) -> ConfigError:
        """Return the error for a key: `file: section.key reason`."""
        return ConfigError(f"{self.file}: {self.section + '.' if self.section else ''}{key} {reason}")

    def check_type(self, key: str, usual: str) -> None:
        """Refuse the settings of a class for other models, of which the same keys may mean something else.

        Args:
            key: of the name of the class, `image_processor_type` or `video_processor_type`; files need not have it.
            usual: the name that this model's class has.

        Raises:
            ConfigError: for another name.
        """
        found = self.values.get(key)
        plain = str(found).removesuffix("Fast").removesuffix("Pil")
        if found is not None and plain not in (usual, _EARLIER.get(usual)):
            raise self.refuse(key, f"is {found!r}, wanted {usual}: the file is of another model; take that of this one")

    def make(self, kind: type):
        """Make a stock processor of these settings.

        Raises:
            ConfigError: if its class refuses them, or they are those of another class.
        """
        self.check_type("image_processor_type", kind.__name__.removesuffix("Pil"))
        values = copy.deepcopy(dict(self.values))
        if values.get("size") is None:
            # transformers 5.17 would make limits beside a default size the default of the whole process.
            values["size"] = dict(kind.size)
        try:
            return kind.from_dict(values)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            key = "size" if "size" in str(error) else "settings"
            got = f" {self.values[key]!r}" if key in self.values else ""
            reason = f"refused by transformers' {kind.__name__}: {error}; take the file of the published model"
            raise self.refuse(key + got, reason) from None


def image_settings(model: str) -> ProcessorSettings:
    """Read the settings of the image processor in a folder or at a hub id.

    Raises:
        ConfigError: if there are none, or the file is no JSON object.
    """
    found = _first(model, "image_processor", (IMAGE_FILE,))
    if found is None:
        raise ConfigError(
            f"{model}: has no {IMAGE_FILE} and no {NESTED} with the key image_processor, so nothing says how images "
            "are read; copy the file from the model that this one was trained from"
        )
    return found


def video_settings(model: str) -> ProcessorSettings:
    """Read the settings of the video processor in a folder or at a hub id; else those of the image processor.

    Raises:
        ConfigError: as `image_settings`.
    """
    return _first(model, "video_processor", (VIDEO_FILE,)) or image_settings(model)


def _first(model: str, section: str, names: tuple[str, ...]) -> ProcessorSettings | None:
    nested = _find(model, NESTED)
    if nested is not None and section in (content := _read(nested)):
        if not isinstance(content[section], dict):
            raise ConfigError(f"{nested}: {section} is {content[section]!r}, wanted an object with the settings")
        return ProcessorSettings(content[section], nested, section)
    for name in names:
        if (file := _find(model, name)) is not None:
            return ProcessorSettings(_read(file), file)
    return None


def _find(model: str, name: str) -> str | None:
    if Path(model).exists():
        file = Path(model) / name
        return str(file) if file.is_file() else None
    from transformers.utils import cached_file

    try:
        return cached_file(model, name, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"{model!r}: no such folder here, and {name} does not come from the hub ({reason}); wanted a folder with "
            f"{IMAGE_FILE}, or a reachable hub id"
        ) from None


def _read(file: str) -> dict:
    try:
        content = json.loads(Path(file).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read as JSON ({error}); download or copy it again") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: holds {type(content).__name__}, wanted an object with settings")
    return content

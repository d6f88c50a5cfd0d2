"""The page docs/configuration.md, made from the settings' types, defaults and docstrings in fastrm/config.py,
fastrm/data_config.py and fastrm/loss_config.py.

python docs/configuration.py           print it
python docs/configuration.py --write   write it
"""

import sys
import types
import typing
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fastrm.config import Config

PAGE = Path(__file__).with_suffix(".md")
HEAD = """# Settings

Made by `python docs/configuration.py --write` from [fastrm/config.py](../fastrm/config.py),
[fastrm/data_config.py](../fastrm/data_config.py) and [fastrm/loss_config.py](../fastrm/loss_config.py); a test fails
when it is old.

A configuration is one YAML file. Each setting has a default here, unless it is *required*; a file holds what differs.
On the command line `section.key=value` changes a setting, as in `optim.lr=1e-5`; values are YAML, and entries of lists
have numbers: `data.train.0.repeat=2`. A key that does not exist is an error that names the nearest one, and a value of
the wrong kind one that says what is wanted. Relative paths are relative to the working directory.
`fastrm train FILE --dry-run` checks a file, and a run writes it with all its defaults to run.dir/config.yaml.

`extends: FILE`, at the top of a file and relative to it, takes all settings of FILE but `run.dir`. Sections are merged
key by key; any other value, such as a list or `model.init`, replaces the one of FILE as a whole. `--dry-run` names the
files, and which settings are a file's own. configs/r1_reward_200k.yaml is configs/full.yaml with other data.
"""


def page() -> str:
    """Return the whole page."""
    sections = [("", "At the top", Config), *_sections("", Config)]
    return "\n".join([HEAD, *(line for section in sections for line in _table(*section))])


def _sections(prefix: str, model: type[BaseModel]) -> list[tuple[str, str, type[BaseModel]]]:
    found = []
    for name, field in model.model_fields.items():
        for inner in _models(field.annotation):
            place = f"{prefix}{name}" + (".N" if typing.get_origin(field.annotation) is list else "")
            found += [(f"{place}.", f"`{place}`", inner), *_sections(f"{place}.", inner)]
    # `data.train` and `data.eval` hold the same kind of entries.
    return [section for section in found if section[0] not in ("data.eval.N.", "data.eval.")]


def _table(prefix: str, title: str, model: type[BaseModel]) -> list[str]:
    lines = [f"## {title}", "", "| setting | default | values | meaning |", "| --- | --- | --- | --- |"]
    for name, field in model.model_fields.items():
        if not prefix and _models(field.annotation):
            continue  # a section of its own
        values = _values(field.annotation, field)
        meaning = " ".join((field.description or "").split())
        cells = (f"`{name}`", _default(field), values, meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |")
    return [*lines, ""]


def _models(annotation) -> list[type[BaseModel]]:
    """Return the sections that an annotation mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in _models(part)]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "*required*"
    if isinstance(field.default, BaseModel):
        return "see there"
    return {None: "none", True: "true", False: "false"}.get(_hashable(field.default)) or f"`{_plain(field.default)}`"


def _hashable(value):
    return value if isinstance(value, bool | None) else str(value)


def _plain(value) -> str:
    return f"{value:,}".replace(",", "_") if isinstance(value, int) and abs(value) >= 10_000 else str(value)


def _values(annotation, field: FieldInfo | None = None) -> str:
    """Return the kinds of values as a reader of YAML calls them, with their bounds."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    bounds = _bounds(field.metadata) if field else ""
    if origin is typing.Annotated:
        return _values(parts[0]) + _bounds(parts[1:])
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in parts)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_values(part) for part in parts if part is not type(None)) + bounds
    if origin is list:
        return f"list of {_values(parts[0])}" + bounds
    if origin is dict:
        return "mapping" + bounds
    if models := _models(annotation):
        return "section" if models[0].__name__ != "SourceConfig" else "sources"
    return {int: "whole number", float: "number", bool: "true, false", str: "text"}.get(annotation, "date") + bounds


def _bounds(metadata) -> str:
    """Return ` >= 0, < 1` of pydantic's metadata."""
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    found = []
    for item in metadata:
        for part in getattr(item, "metadata", [item]):
            found += [f"{sign} {_plain(getattr(part, key))}" for key, sign in signs.items() if hasattr(part, key)]
    return " " + ", ".join(found) if found else ""


def main():
    text = page()
    if "--write" in sys.argv[1:]:
        PAGE.write_text(text, encoding="utf-8")
    print(f"wrote {PAGE}" if "--write" in sys.argv[1:] else text)


if __name__ == "__main__":
    main()

"""Strict YAML: files and `a.b=value` overrides in, checked pydantic models out.

A key that does not exist, one that stands twice, a value of the wrong type or a combination that cannot
work is a `ConfigError` that names the file and line (or the override) and, for a misspelt key, the
nearest one that exists. A file that `extends` another holds what differs from it.
"""

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from fastrm.errors import ConfigError, looked_for

Places = dict[tuple, str]  # key path -> its `file:line`
Document = tuple[dict, Places]
Model = TypeVar("Model", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """A loader of YAML 1.1 as PyYAML reads it, except that `3e-6` is a number, as everyone who writes it means."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


class _Dumper(yaml.SafeDumper):
    """A dumper that quotes the texts that `_Loader` would read as numbers."""


_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers

# Errors that PyYAML's converters raise, for example for 2020-13-45, 0b_ and !!bool x.
_NOT_YAML = (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError, RecursionError)


def dump_yaml(tree: dict) -> str:
    """Return YAML text that `read_yaml` reads back unchanged."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


def read_yaml(path: str | Path) -> tuple[dict, Places]:
    """Read a file as plain objects, with the place of each of its keys.

    Raises:
        ConfigError: if the file cannot be read, or is not a mapping in YAML.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        reason = f"{error.strerror}{looked_for(path)}"
        raise ConfigError(f"{path}: cannot read the configuration: {reason}; check the path") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text; save the file as UTF-8") from None
    return _parse_yaml(text, str(path))


def read_chain(path: str | Path | Mapping) -> list[tuple[Path, dict, Places]]:
    """Read a file, then the file that its `extends` names, relative to it, and so on; each without that key.

    A dict stands for a file's content, and its `extends` is relative to the working folder.

    Raises:
        ConfigError: if a file cannot be read, naming the line that asks for it, or if the files go in a circle.
    """
    given = path if isinstance(path, Mapping) else None
    path, where, chain = Path() if given is not None else Path(path), "", []
    while True:
        if path.resolve() in [file.resolve() for file, _, _ in chain]:
            circle = " -> ".join(str(file) for file in [*(file for file, _, _ in chain), path])
            raise ConfigError(f"{where}files extend one another in a circle: {circle}; take one `extends` out")
        try:
            tree, places = read_yaml(path) if chain or given is None else _document(given)
        except ConfigError as error:
            raise ConfigError(f"{where}{error}") from None
        chain.append((path, tree, places))
        if "extends" not in tree:
            return chain
        name, line = tree.pop("extends"), places.pop(("extends",))
        if not (isinstance(name, str) and name):
            raise ConfigError(f"{line}: extends: got {name!r}, wanted the path of a file, relative to this one")
        where, path = f"{line}: extends: ", Path(os.path.normpath(path.parent / name))


def _document(given: Mapping) -> Document:
    """Return a configuration that was given as a dict like one that was read; later changes leave the dict as it is."""
    places: Places = {(): "config"}

    def plain(value: Any, key: tuple) -> Any:
        places[key] = "config"
        if isinstance(value, Mapping):
            return {name: plain(item, (*key, name)) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item, (*key, number)) for number, item in enumerate(value)]
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    return plain(given, ()), places


def lay_over(model: type[BaseModel], below: Document, above: Document, prefix: tuple = ()) -> None:
    """Change the tree and places `below` to what they are with those `above` in front of them.

    Sections of the model are merged key by key; any other value, such as a list, replaces the one below as a whole.
    """
    (tree, places), (own, own_places) = below, above
    places[prefix] = own_places[prefix]
    for name, value in own.items():
        key = (*prefix, name)
        field = model.model_fields.get(name)
        section = _section_of(field.annotation) if field is not None else None
        if section is not None and isinstance(value, dict) and isinstance(tree.get(name), dict):
            lay_over(section, (tree[name], places), (value, own_places), key)
            continue
        tree[name] = value
        _forget(places, key)
        places.update({place: line for place, line in own_places.items() if place[: len(key)] == key})


def _section_of(annotation: Any) -> type[BaseModel] | None:
    kinds = [annotation, *getattr(annotation, "__args__", ())]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _forget(places: Places, names: tuple) -> None:
    for stale in [place for place in places if place[: len(names)] == names]:
        del places[stale]


def _parse_yaml(text: str, path: str) -> tuple[dict, Places]:
    loader = None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        places: Places = {}
        if root is not None:
            _note_places(root, (), path, places, set())
        tree = loader.construct_document(root) if root is not None else {}
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ConfigError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    except _NOT_YAML as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ConfigError(f"{path}: not valid YAML: {reason}; quote texts that look like numbers or dates") from None
    finally:
        if loader is not None:
            loader.dispose()
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: got a {type(tree).__name__}, wanted sections such as `model:` and `data:`")
    return tree, places


def _note_places(node: yaml.Node, prefix: tuple, path: str, places: Places, seen: set[int]) -> None:
    if id(node) in seen:
        # Aliases can nest into exponentially large documents; no configuration needs them.
        raise ConfigError(f"{path}:{node.start_mark.line + 1}: YAML aliases are not accepted; repeat the value")
    seen.add(id(node))
    places.setdefault(prefix, f"{path}:{node.start_mark.line + 1}")
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            key = (*prefix, key_node.value)
            if key in places:
                raise ConfigError(f"{path}:{key_node.start_mark.line + 1}: key {_dotted(key)} stands twice")
            places[key] = f"{path}:{key_node.start_mark.line + 1}"
            _note_places(value_node, key, path, places, seen)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _note_places(item, (*prefix, index), path, places, seen)


def apply_override(tree: dict, places: Places, override: str) -> None:
    """Set one `a.b=value`, whose value is YAML, in the tree of `read_yaml`.

    Raises:
        ConfigError: naming the override.
    """
    where = f"override {override!r}"
    key, separator, value = override.partition("=")
    names = [int(name) if name.isdecimal() else name for name in key.split(".")]
    if not separator or "" in names:
        raise ConfigError(f"{where}: wanted the form section.key=value, for example optim.lr=1e-5")
    try:
        parsed = yaml.load(value, Loader=_Loader)
    except _NOT_YAML:
        raise ConfigError(f"{where}: the value is not valid YAML; quote it") from None
    node: Any = tree
    for depth, name in enumerate(names[:-1]):
        if isinstance(node, list) and isinstance(name, int) and name < len(node):
            node = node[name]
        elif isinstance(node, dict):
            if not isinstance(node.get(name), dict | list):
                node[name] = {}
                places[tuple(names[: depth + 1])] = where
            node = node[name]
        else:
            raise ConfigError(f"{where}: there is no {_dotted(names[: depth + 1])} to set")
    if isinstance(node, list) and not (isinstance(names[-1], int) and names[-1] < len(node)):
        raise ConfigError(f"{where}: there is no {_dotted(names)} to set")
    node[names[-1]] = parsed
    _forget(places, tuple(names))
    places[tuple(names)] = where


def validate(model: type[Model], tree: dict, places: Places, path: str) -> Model:
    """Validate the tree as a pydantic model.

    Raises:
        ConfigError: with a line for every problem, naming its place.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(model, problem, places, path) for problem in error.errors()]
        # A union reports the same misfit once per member; one line is enough.
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def _explain(model: type[BaseModel], problem: dict, places: Places, path: str) -> str:
    # Tags of a union's members, as <list>, and [key], where a key itself is wrong, are no keys.
    location = tuple(name for name in problem["loc"] if not str(name).startswith(("<", "[")))
    known = location
    while known and known not in places:
        known = known[:-1]
    where = places.get(known, path)
    if problem["type"] == "extra_forbidden":
        section = _fields_at(model, location[:-1])
        if meant := getattr(model, "names_elsewhere", {}).get(location[-1]):
            return f"{where}: unknown key {_dotted(location)}; did you mean {meant}?"
        if elsewhere := [place for place in _places_of(model, str(location[-1])) if place[:-1] != location[:-1]]:
            names = " or ".join(map(_dotted, elsewhere))
            return f"{where}: unknown key {_dotted(location)}; did you mean {names}?"
        near = difflib.get_close_matches(str(location[-1]), section, n=1, cutoff=0.4)
        hint = f"did you mean {_dotted((*location[:-1], near[0]))}?" if near else f"keys: {', '.join(section)}"
        return f"{where}: unknown key {_dotted(location)}; {hint}"
    if problem["type"] == "value_error":
        text = str(problem["ctx"]["error"])  # an error of a section names its keys, one of a value says what was got
        return f"{where}: {_dotted(location)}: {text}" if text.startswith("got") else f"{where}: {text}"
    if problem["type"] == "missing":
        return f"{where}: {_dotted(location)} is missing; it has no default"
    return f"{where}: {_dotted(location)}: got {problem['input']!r}; {problem['msg'].lower()}"


def _fields_at(model: type[BaseModel], location: tuple) -> list[str]:
    """Return the field names of the section at a location such as ("data", "train", 0)."""
    section: Any = model
    for name in location:
        if isinstance(name, int):
            continue
        if not (isinstance(section, type) and issubclass(section, BaseModel)) or name not in section.model_fields:
            continue
        section = _section_in(section.model_fields[name].annotation) or section
    return list(section.model_fields)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """Return the section that an annotation mentions at any depth, as in lists by names."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_section_in, getattr(annotation, "__args__", ()))), None)


def _places_of(model: type[BaseModel], name: str, prefix: tuple = ()) -> list[tuple]:
    """Return every path, in the model's sections and theirs, to a key of this name."""
    found = []
    for field, info in model.model_fields.items():
        if field == name:
            found.append((*prefix, field))
        if (section := _section_in(info.annotation)) is not None:
            found += _places_of(section, name, (*prefix, field))
    return found


def _dotted(names) -> str:
    return ".".join(str(name) for name in names)


def describe_extended(path: str | Path) -> str | None:
    """Return what a file extends and which settings are its own, in words; None for a file that extends none.

    Raises:
        ConfigError: as `read_chain`.
    """
    (_, own, _), *bases = read_chain(path)
    if not bases:
        return None
    chain = ", which extends ".join(str(file) for file, _, _ in bases)
    return f"{path} extends {chain}; its own are {', '.join(flat(own)) or 'no settings'}"


def differences(old: dict, new: dict, in_lists: bool = False) -> dict[str, tuple]:
    """Return every dotted key that differs between two plain configurations, with its old and new value.

    Args:
        in_lists: compare the entries of lists of mappings one by one; else a list is one value.
    """
    old, new = flat(old, in_lists), flat(new, in_lists)
    keys = sorted(old.keys() | new.keys())
    return {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}


def flat(tree, in_lists: bool = False, prefix: str = "") -> dict:
    """Return the values of a plain configuration by dotted keys.

    Args:
        in_lists: number the entries of lists of mappings; else a list is one value.
        prefix: put before each key.
    """
    if in_lists and isinstance(tree, list) and tree and isinstance(tree[0], dict):
        tree = dict(enumerate(tree))
    if isinstance(tree, dict) and tree:
        return {k: v for name, value in tree.items() for k, v in flat(value, in_lists, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): tree}

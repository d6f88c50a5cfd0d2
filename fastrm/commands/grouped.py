"""Dataclasses as parameters of commands: typer sees an option for each of their fields, as fields.py describes them."""

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Annotated, get_args, get_origin

from fastrm import cli_options as opts
from fastrm.commands.fields import FIELDS


@dataclasses.dataclass(frozen=True)
class Without:
    """The fields of a dataclass that a command does not offer, as ``Annotated[ScoringOptions, Without("rows")]``."""

    fields: tuple[str, ...]

    def __init__(self, *fields: str):
        object.__setattr__(self, "fields", fields)


def can_be_quiet(command: Callable[..., None]) -> Callable[..., None]:
    """Return the command with the option --quiet, whose callback does what it asks for."""
    signature = inspect.signature(command, eval_str=True)
    option = inspect.Parameter("quiet", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=opts.Quiet)

    def call(quiet: bool, **values) -> None:
        command(**values)

    return _as(call, command, signature, [*signature.parameters.values(), option])


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Return the command with an option for each field of every parameter that is a dataclass of FIELDS."""
    signature = inspect.signature(command, eval_str=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, tuple[type, tuple[str, ...]]] = {}
    for name, parameter in signature.parameters.items():
        kind, left_out = _kind(parameter.annotation)
        if kind is None:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
        else:
            groups[name] = (kind, left_out)
            parameters += _options(kind, left_out)

    def call(**values) -> None:
        own = {name: values[name] for name in signature.parameters if name not in groups}
        command(**own, **{name: _build(kind, left_out, values) for name, (kind, left_out) in groups.items()})

    return _as(call, command, signature, parameters)


def _as(call, command, signature: inspect.Signature, parameters: list[inspect.Parameter]) -> Callable[..., None]:
    """Return `call` under the name and text of `command`, with other parameters."""
    call.__doc__, call.__name__, call.__module__ = command.__doc__, command.__name__, command.__module__
    call.__signature__ = signature.replace(parameters=parameters)
    call.__annotations__ = {one.name: one.annotation for one in parameters}
    return call


def _kind(annotation) -> tuple[type | None, tuple[str, ...]]:
    """Return a dataclass of FIELDS, if the annotation names one, and the fields that are left out."""
    if get_origin(annotation) is Annotated and isinstance(get_args(annotation)[1], Without):
        kind, without = get_args(annotation)
        return kind, without.fields
    return (annotation, ()) if isinstance(annotation, type) and annotation in FIELDS else (None, ())


def _options(kind: type, left_out: tuple[str, ...]) -> Iterator[inspect.Parameter]:
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    for name, option in FIELDS[kind].items():
        if name in left_out:
            continue
        if option in FIELDS:
            yield from _options(option, left_out)
        else:
            # What a factory makes is made by the option's own callback, which is given None.
            default = None if defaults[name] is dataclasses.MISSING else defaults[name]
            yield inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=option, default=default)


def _build(kind: type, left_out: tuple[str, ...], values: dict):
    fields = {name: option for name, option in FIELDS[kind].items() if name not in left_out}
    return kind(
        **{
            name: _build(option, left_out, values) if option in FIELDS else values[name]
            for name, option in fields.items()
        }
    )

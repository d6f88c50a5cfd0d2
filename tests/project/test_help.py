"""`--help` of every command: sentences that can be read alone, whole names at 80 columns, examples that are valid."""

import re
import shlex

import pytest
import typer

from fastrm.cli import app

GROUP = typer.main.get_command(app)
# First words of a text that needs the name beside it to be understood.
CLIPPED = {"Of", "In", "By", "To", "As", "Into", "Over", "What", "Whether", "How", "For", "At"}


def commands(group=GROUP, path=()):
    for name, command in group.commands.items():
        yield (*path, name), command
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))


COMMANDS = dict(commands())
LEAVES = {path: command for path, command in COMMANDS.items() if not hasattr(command, "commands")}


def help_of(path, capsys, monkeypatch, width=80):
    monkeypatch.setenv("COLUMNS", str(width))
    GROUP([*path, "--help"], prog_name="fastrm", standalone_mode=False)
    return capsys.readouterr().out


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_every_text_is_a_sentence(path):
    for parameter in LEAVES[path].params:
        text = parameter.help
        assert text and text[0].isupper() and text.endswith("."), f"{parameter.name}: {text}"
        assert text.split()[0] not in CLIPPED, f"{parameter.name}: {text}"


@pytest.mark.parametrize("path", [(), *COMMANDS], ids=lambda path: " ".join(path) or "fastrm")
@pytest.mark.parametrize("width", [80, 200])
def test_nothing_is_cut_and_nothing_needs_more_than_ascii(path, width, capsys, monkeypatch):
    text = help_of(path, capsys, monkeypatch, width)
    assert text.isascii() and max(map(len, text.splitlines())) <= width
    assert not re.search(r"\w\.\.\.", text)  # how click ends a text that it cuts
    command = COMMANDS.get(path, GROUP)
    for parameter in command.params:
        for name in parameter.opts if parameter.opts[0].startswith("-") else []:
            assert name in text.split(), name


def test_the_names_of_all_commands_are_listed_with_their_first_sentence(capsys, monkeypatch):
    for path, group in [
        ((), GROUP),
        *((path, found) for path, found in COMMANDS.items() if hasattr(found, "commands")),
    ]:
        listed = " ".join(help_of(path, capsys, monkeypatch).split())
        for name, command in group.commands.items():
            assert f"{name} {command.help.splitlines()[0]}" in listed


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_the_example_is_a_command_line_that_is_understood(path):
    (example,) = [line for line in LEAVES[path].help.splitlines() if line.startswith("Example: ")]
    words = shlex.split(example.removeprefix("Example: "))
    assert words[: 1 + len(path)] == ["fastrm", *path]
    LEAVES[path].make_context(path[-1], words[1 + len(path) :])  # raises a usage error otherwise

"""Tables and sentences in the width that there is: no number is cut, no row wraps, no column is lost."""

import io

import numpy as np
import pytest
from rich.console import Console
from rich.text import Text

from fastrm import ui
from fastrm.lines import fit, text_width, wrap
from fastrm.tables import Table
from tests.helpers.terminals import screen


def shown(table, width, **options):
    console = Console(file=io.StringIO(), width=width, **options)
    ui.print_table(console, table)
    return console.file.getvalue().splitlines()


def step_table():
    headings = ("GPUs", "packs", "waiting for messages", "step", "days an epoch")
    table = Table(*headings, title="One step", caption="Assumed.")
    table.add_row("1", "12", "0.000", "123.456", "12,345.67")
    table.add_row("1,024", "1", "123.456", "1.234", "0.12", style="bold")
    return table


def test_a_table_that_fits_stands_in_one_line_a_row():
    assert shown(step_table(), 80) == [
        "",
        "One step",
        "GPUs   packs  waiting for messages     step  days an epoch",
        "──────────────────────────────────────────────────────────",
        "1         12                 0.000  123.456      12,345.67",
        "1,024      1               123.456    1.234           0.12",
        "Assumed.",
    ]


def test_lines_are_those_of_a_dumb_terminal():
    assert step_table().as_lines(80) == [line.replace("─", "-") for line in shown(step_table(), 80)[1:]]


def test_headings_go_on_in_further_lines_before_anything_else_does():
    assert shown(step_table(), 47) == [
        "",
        "One step",
        "              waiting for             days an",
        "GPUs   packs     messages     step      epoch",
        "─────────────────────────────────────────────",
        "1         12        0.000  123.456  12,345.67",
        "1,024      1      123.456    1.234       0.12",
        "Assumed.",
    ]


def test_columns_that_do_not_stand_beside_the_others_follow_with_the_first_column():
    assert shown(step_table(), 30) == [
        "",
        "One step",
        "              waiting for",
        "GPUs   packs     messages",
        "─────────────────────────",
        "1         12        0.000",
        "1,024      1      123.456",
        "",
        "GPUs      step  days an epoch",
        "─────────────────────────────",
        "1      123.456      12,345.67",
        "1,024    1.234           0.12",
        "Assumed.",
    ]


def test_texts_go_on_at_words_and_only_long_words_are_broken():
    table = Table("reason", "rows", "the first of them", text=(0, 2))
    table.add_row("IMAGE_MISSING", "1,000", "a/folder/with/a/long/name.jsonl:17: it cannot be opened\nsee there")
    assert shown(table, 45) == [
        "reason          rows  the first of them",
        "─────────────────────────────────────────────",
        "IMAGE_MISSING  1,000  a/folder/with/a/long/na",
        "                      me.jsonl:17: it cannot",
        "                      be opened",
        "                      see there",
    ]


def test_a_table_without_headings_has_no_line_below_them_and_sections_have_one():
    table = Table("", "")
    table.add_row("steps", "300")
    table.add_section()
    table.add_row("all", "1,300", end_section=True)
    table.add_row("rest")
    assert shown(table, 80) == ["steps    300", "────────────", "all    1,300", "────────────", "rest"]


def test_wide_characters_take_two_columns():
    table = Table("source", "pairs")
    table.add_row("漢字", "1")
    table.add_row("cafe\u0301s", "10")
    lines = shown(table, 80)
    assert [text_width(line) for line in lines] == [13, 13, 13, 13]
    assert lines[2] == "漢字        1"


@pytest.mark.parametrize("seed", range(20))
def test_whatever_the_table_and_the_width_no_number_is_cut_and_no_line_too_long(seed):
    rng = np.random.default_rng(seed)
    columns, rows = int(rng.integers(2, 12)), int(rng.integers(1, 6))
    numbers = [[f"{int(10 ** rng.uniform(0, 9)):,}" for _ in range(columns - 1)] for _ in range(rows)]
    headings = [" ".join("w" * int(n) for n in rng.integers(1, 9, size=rng.integers(1, 4))) for _ in range(columns)]
    table = Table(*headings)
    for place, cells in enumerate(numbers):
        table.add_row(" ".join(["name"] * int(rng.integers(1, 12))) + str(place), *cells)
    for width in (36, 60, 80, 200):
        lines = shown(table, width)
        assert max(map(text_width, lines)) <= width
        words = " ".join(lines).split()
        for number in (number for row in numbers for number in row):
            assert words.count(number) >= sum(row.count(number) for row in numbers)


def test_a_file_of_another_encoding_and_a_dumb_terminal_get_no_box_characters(monkeypatch):
    file = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    ui.print_table(Console(file=file, width=80), step_table())
    file.seek(0)
    monkeypatch.setenv("TERM", "dumb")
    dumb = shown(step_table(), 80, force_terminal=True)
    assert file.read().splitlines() == dumb
    assert dumb[3] == "-" * 58 and "\x1b" not in "".join(dumb)


def test_cells_keep_their_style_and_brackets_are_no_markup():
    table = Table("name", "value")
    table.add_row("[bold]x[/bold]", Text("1", "bold"))
    (line,) = shown(table, 80, force_terminal=True, color_system="standard")[2:]
    assert line == "[bold]x[/bold]      \x1b[1m1\x1b[0m"


@pytest.mark.parametrize("width", [20, 40, 79])
def test_sentences_are_broken_at_words_and_words_stay_whole(width):
    text = "  - rows.jsonl:17: image \"a/folder/of/a/very/long/name/1.png\" cannot be opened; check the path"
    lines = wrap(text, width)
    assert " ".join(line.strip() for line in lines) == text.strip()
    assert [line[:4] for line in lines] == ["  - ", *["    "] * (len(lines) - 1)]
    assert all(text_width(line) <= width or " " not in line.strip() for line in lines)


def test_a_message_stays_in_one_line_in_a_file(tmp_path):
    text = "word " * 50
    with (tmp_path / "log").open("w") as file:
        assert fit(text, file) == text
        ui.message(Console(file=file), text)
    assert (tmp_path / "log").read_text() == text + "\n"


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_the_line_of_progress_shows_whole_numbers_at_any_width(width):
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    display = ui.Display(console)
    update = display.task("training")
    update(0, 28_500)
    for done in (1_000, 1_300):
        update(done, 28_500, "loss 0.1660  acc 0.908")
    console.print(display._progress.get_renderable())
    (line, note) = console.file.getvalue().splitlines()[-2:]
    assert line.startswith("training ") and "1,300/28,500" in line and "ETA" in line
    assert note == "  loss 0.1660  acc 0.908"
    assert len(line) < width and (width < 80 or "─" in line)


def test_what_is_done_leaves_one_plain_line_and_what_is_not_leaves_nothing():
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    with ui.Display(console) as display:
        update, never_done = display.task("reading rows"), display.task("scoring")
        update(1, 2)
        never_done(1, None)
        update(2, 2)
        while_working, _ = screen(console.file.getvalue(), 80)
    lines, _ = screen(console.file.getvalue(), 80)
    assert [line.split("  ")[0] for line in lines if line] == ["reading rows: 2/2"]
    assert [line.split()[0] for line in while_working if line] == ["reading", "scoring"]

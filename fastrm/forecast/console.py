"""Tables and lines on standard output, alike for the dry run and the plan."""

from rich.console import Console
from rich.table import Table

# Columns of a piped table, wide enough that paths stay in one piece.
PIPE_WIDTH = 140


def make_console() -> Console:
    """Standard output; of a fixed width if that is no terminal."""
    console = Console()
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    return console


def say(console: Console, text: str) -> None:
    """A line, as it is."""
    console.print(text, markup=False, highlight=False)


def show(console: Console, title: str, table: Table) -> None:
    """A table below its title."""
    # As a line of its own: a table's own title is wrapped to the width of the table.
    console.print(title, style="bold", markup=False, highlight=False)
    console.print(table, markup=False)


def make_table(*columns: str) -> Table:
    """A table whose first column is text and whose others are numbers."""
    table = Table()
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def gib(num_bytes: float) -> str:
    """Bytes in GiB."""
    return f"{num_bytes / 2**30:,.1f}"


def peta(flops: float) -> str:
    """Operations in units of 10^15."""
    return f"{flops / 1e15:,.3f}"


def seconds(value: float) -> str:
    """Seconds, with three digits or more."""
    return f"{value:,.1f}" if value >= 100 else f"{value:.2f}" if value >= 10 else f"{value:.3f}"


def gpus(count: int) -> str:
    """A number of GPUs."""
    return f"{count:,} GPU{'s' * (count > 1)}"

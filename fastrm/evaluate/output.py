"""Output files and lines of evaluations."""

from collections.abc import Sequence

from fastrm.ui import make_console, message

# The most refused rows that are named on the screen; files name all.
_NAMED = 10


def print_refused(messages: Sequence[str], where: str) -> None:
    """Name the first refused rows on standard error; `where` has all of them."""
    console = make_console(stderr=True)
    for text in messages[:_NAMED]:
        message(console, f"refused: {text}")
    if len(messages) > _NAMED:
        message(console, f"... and {len(messages) - _NAMED} more; {where}")

"""README.md and the pages of documentation: their blocks, commands and names of files."""

import re
import shlex

from tests.helpers.project import PROJECT

PAGES = sorted(
    str(page.relative_to(PROJECT))
    for pattern in ("README.md", "docs/**/*.md", "bench/**/README.md", "kernels/**/README.md")
    for page in PROJECT.glob(pattern)
    if not any(part.startswith(".") for part in page.relative_to(PROJECT).parts)  # pytest leaves a page in its cache
)
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def text_of(page: str) -> str:
    """Return a page of PAGES as it is written."""
    return (PROJECT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    """Return the fenced blocks of one language on a page, in order; a block without a language has the empty one."""
    return [body for found, body in _BLOCK.findall(text_of(page)) if found == language]


def commands_to_run(page: str) -> list[str]:
    """Return the lines `$ ...` of console blocks: what a reader is to see happen."""
    lines = "".join(blocks(page, "console")).splitlines()
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]


def commands_to_read(page: str) -> list[str]:
    """Return the lines of sh blocks: examples that need a GPU, the hub or hours."""
    return [line for line in "".join(blocks(page, "sh")).splitlines() if words_of(line)]


def words_of(line: str) -> list[str]:
    """Return the words of a command without its comment."""
    return shlex.split(line, comments=True)

"""Where the project is, and a copy of it in a folder of a test's own, in which nothing meets another test."""

import shutil
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
# Made by tools and runs, by other tests too while they are looked at.
_MADE = shutil.ignore_patterns(
    ".git", ".venv*", "runs", "build", "dist", "*.egg-info", "__pycache__", ".pytest_cache", ".ruff_cache",
    ".benchmarks", ".gpu-day",
)  # fmt: skip


def copy_project(folder: Path) -> Path:
    """All files of the project but what is made from them, in a new folder; returns it."""
    return Path(shutil.copytree(PROJECT, folder, ignore=_MADE))

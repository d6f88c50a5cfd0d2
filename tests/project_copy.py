"""The project in a folder of a test's own: what writes into it, or looks at what is in it, meets no other test."""

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Made by tools and runs, by other tests too while they are looked at.
_MADE = shutil.ignore_patterns(
    ".git", ".venv*", "runs", "build", "dist", "*.egg-info", "__pycache__", ".pytest_cache", ".ruff_cache",
    ".benchmarks", ".gpu-day",
)  # fmt: skip


def copy_project(folder: Path) -> Path:
    """All files of the project but what is made from them, in a new folder; returns it."""
    return Path(shutil.copytree(ROOT, folder, ignore=_MADE))

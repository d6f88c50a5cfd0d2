"""Fixtures that several files of this folder use."""

from tests.helpers.source_rows import read_json_rows, read_one, refusal  # noqa: F401

"""Fixtures that several files of this folder use."""

from tests.helpers.killed_runs import server  # noqa: F401
from tests.helpers.runs import colours  # noqa: F401

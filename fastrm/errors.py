"""Errors that a user can act on, each with the exit code of the command that meets it.

A message says what went wrong, where, what was found, what was wanted and what to do next. The
codes follow sysexits.h where it has one: 64 usage or configuration, 65 data, 70 internal, 71 a
process was lost, 74 input/output; 75 interrupted (resume) and 76 diverged are ours.
"""

import os


class FastrmError(Exception):
    """Base of all errors that fastrm raises for its users."""

    exit_code = 70


class ConfigError(FastrmError):
    """The configuration, or the command line, is wrong."""

    exit_code = 64


class DataError(FastrmError):
    """The data cannot be used at all. One bad record is not an error but a quarantine row."""

    exit_code = 65


class ExactnessError(FastrmError):
    """Rewards of a model differ from those of the stock class by more than rounding explains."""

    exit_code = 65


class GroupError(DataError):
    """Why one group of `RewardModel.score` has no rewards.

    With ``on_error="return"`` it stands where the group's rewards would be. It cannot be mistaken for them: taking
    its length, an element, a number or an array of it raises it.

    Attributes:
        index: of the group in the call.
        id: of the group, or None.
        code: a stable upper-case word such as ``IMAGE_MISSING``.
        message: what is wrong and what to do.
    """

    def __init__(self, index: int, id: str | None, code: str, message: str):
        name = f"group {index}" if id is None else f'group {index} ("{id}")'
        super().__init__(f"{name}: {message} ({code})")
        self.index, self.id, self.code, self.message = index, id, code, message

    def __reduce__(self):
        return type(self), (self.index, self.id, self.code, self.message)

    def __bool__(self) -> bool:
        return True

    def _refuse(self, *_, **__):
        raise self

    __len__ = __iter__ = __getitem__ = __float__ = __array__ = _refuse


class StorageError(FastrmError):
    """A file or folder could not be read or written, or a checkpoint is damaged."""

    exit_code = 74


class InterruptedRun(FastrmError):
    """The run was asked to stop. It saved its state and can be resumed."""

    exit_code = 75


class DivergedError(FastrmError):
    """Loss or gradients stayed non-finite. Weights and checkpoints are those of the last good step."""

    exit_code = 76


class RankFailure(FastrmError):
    """One of several processes was lost, or ended with an error, which then gives its kind and its exit code."""

    exit_code = 71

    def __init__(self, message: str, kind: str = "RankFailure", exit_code: int = 71):
        super().__init__(message)
        self.kind, self.exit_code = kind, exit_code


is_command_line = False
"""Is this process the `fastrm` command? Hints name its flags then, else arguments in Python."""


def option(name: str, argument: str | None = None) -> str:
    """What a user sets: `--tokens-per-pack` of the command, or `tokens_per_pack` of a call in Python.

    Args:
        argument: in Python, if it has another name there.
    """
    return f"--{name.replace('_', '-')}" if is_command_line else argument or name


def looked_for(path: object) -> str:
    """Where a path was looked for that does not stand for itself: " in FOLDER" for a relative one, else nothing."""
    return "" if os.path.isabs(str(path)) else f" in {os.getcwd()}"


class RecordError(Exception):
    """One record or one group cannot be used; caught by the reader and written to the quarantine.

    Args:
        code: a stable upper-case word such as ``IMAGE_MISSING`` for counting and filtering.
        message: what is wrong and what to do, without the file and row, which the caller adds.
    """

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code
        self.message = message

    def __reduce__(self):
        return type(self), (self.code, self.message)

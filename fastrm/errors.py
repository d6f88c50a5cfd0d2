"""Errors that a user can act on, each with the exit code of the command that meets it.

A message says what went wrong, where, what was found, what was wanted and what to do next. The
codes follow sysexits.h where it has one: 64 usage or configuration, 65 data, 69 a server is away,
70 internal, 71 a process was lost, 74 input/output; 75 interrupted (resume) and 76 diverged are ours.
"""

import logging
import os


class FastrmError(Exception):
    """The base of all errors that fastrm raises for its users."""

    exit_code = 70


class ConfigError(FastrmError):
    """An error of the configuration or the command line."""

    exit_code = 64


class DataError(FastrmError):
    """An error of data that cannot be used at all. One bad record is not an error but a row of the quarantine."""

    exit_code = 65


class ExactnessError(FastrmError):
    """An error of a model whose rewards differ from the stock class's by more than rounding explains."""

    exit_code = 65


class GroupError(DataError):
    """The reason why one group of `RewardModel.score` has no rewards.

    With ``on_error="return"`` it is returned in place of the group's rewards. It cannot be mistaken for them: taking
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


class ServerError(FastrmError):
    """An error of a server that is away, refuses a request, or answers with something else than was asked for."""

    exit_code = 69


class StorageError(FastrmError):
    """An error of a file or folder that cannot be read or written, or of a damaged checkpoint."""

    exit_code = 74


class InterruptedRun(FastrmError):
    """The end of a run that was asked to stop. It saved its state and can be resumed."""

    exit_code = 75


class DivergedError(FastrmError):
    """An error of a loss or gradients that stayed non-finite. Weights and checkpoints are those of the last good step.
    """

    exit_code = 76


class RankFailure(FastrmError):
    """An error of one of several processes, which was lost, or ended with an error whose kind and exit code it gives.
    """

    exit_code = 71

    def __init__(self, message: str, kind: str = "RankFailure", exit_code: int = 71):
        super().__init__(message)
        self.kind, self.exit_code = kind, exit_code


is_command_line = False
"""True if this process is the `fastrm` command. Hints then name its flags, else arguments in Python."""


def option(name: str, argument: str | None = None) -> str:
    """Return the name of an option: `--tokens-per-pack` of the command, or `tokens_per_pack` of a call in Python.

    Args:
        argument: in Python, if it has another name there.
    """
    return f"--{name.replace('_', '-')}" if is_command_line else argument or name


def looked_for(path: object) -> str:
    """Return where a relative path was looked for, as " in FOLDER"; an empty text for an absolute one."""
    return "" if os.path.isabs(str(path)) else f" in {os.getcwd()}"


class RecordError(Exception):
    """An error of one record or group; the reader catches it and writes it to the quarantine.

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


def quiet_libraries() -> None:
    """Leave out warnings that concern nothing here; to be called before torch is imported.

    transformers imports torchao where it is installed, and that warns, with paths, of extensions for other devices and
    formats.
    """
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)

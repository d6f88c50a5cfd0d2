"""fastrm: train and evaluate scalar reward models for multimodal LLMs, and score responses with them.

Preference data and a model come in; a reward model, its figures and rewards go out. One batch goes through `data`
(rows to packs), `model` (packs to rewards), `kernels/fastrm_kernels` (attention, head and loss) and `train` (loss to
update); `evaluate` scores and measures, `forecast` predicts what a run needs, `ablate` runs grids. Open `cli.py` for
the commands, docs/architecture.md for the way of one batch.

`fastrm.train` and `fastrm.evaluate` are functions for Python (docs/python.md) and the packages behind them.
`import fastrm` loads no torch; what it offers does when it is first used.
"""

from importlib import import_module
from inspect import signature
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastrm.api import TrainedRun as TrainedRun
    from fastrm.api import evaluate as evaluate
    from fastrm.api import train as train
    from fastrm.errors import ConfigError as ConfigError
    from fastrm.errors import DataError as DataError
    from fastrm.errors import FastrmError as FastrmError
    from fastrm.errors import GroupError as GroupError
    from fastrm.errors import InterruptedRun as InterruptedRun
    from fastrm.errors import StorageError as StorageError
    from fastrm.evaluate.ensemble import Ensemble as Ensemble
    from fastrm.evaluate.group_scorer import Best as Best
    from fastrm.evaluate.reward_model import RewardModel as RewardModel
    from fastrm.evaluate.table import EvaluationTable as EvaluationTable

__version__ = "0.1.0"

_PLACES = {
    "TrainedRun": "fastrm.api",
    "Ensemble": "fastrm.evaluate.ensemble",
    "Best": "fastrm.evaluate.group_scorer",
    "RewardModel": "fastrm.evaluate.reward_model",
    "EvaluationTable": "fastrm.evaluate.table",
    **dict.fromkeys(
        ("ConfigError", "DataError", "FastrmError", "GroupError", "InterruptedRun", "StorageError"), "fastrm.errors"
    ),
}


class _FunctionPackage(ModuleType):
    """A package that is called as the function of its name in `fastrm.api`."""

    def __call__(self, *arguments, **options):
        return self._function(*arguments, **options)

    @property
    def _function(self):
        return getattr(import_module("fastrm.api"), self.__name__.rpartition(".")[2])

    @property
    def __signature__(self):
        return signature(self._function)


# An import of a module inside these packages makes them attributes of fastrm, in the place of functions of their names.
for _name in ("fastrm.train", "fastrm.evaluate"):
    import_module(_name).__class__ = _FunctionPackage


if not TYPE_CHECKING:  # which takes a module with __getattr__ for one that has every name

    def __getattr__(name: str):
        if name in _PLACES:
            return getattr(import_module(_PLACES[name]), name)
        raise AttributeError(f"module 'fastrm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})

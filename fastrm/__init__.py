"""fastrm: train and evaluate scalar reward models for multimodal LLMs, and score responses with them.

Preference data and a model come in; a reward model, its figures and rewards go out. One batch goes through `data`
(rows to packs), `model` (packs to rewards), `kernels/fastrm_kernels` (attention, head and loss) and `train` (loss to
update); `evaluate` scores and measures, `forecast` predicts what a run needs, `ablate` runs grids. Open `cli.py` for
the commands, docs/architecture.md for the way of one batch.

`import fastrm` loads no torch; `fastrm.RewardModel` and `fastrm.Ensemble` do when they are first used.
"""

__version__ = "0.1.0"


def __getattr__(name):
    if name == "RewardModel":
        from fastrm.evaluate.reward_model import RewardModel

        return RewardModel
    if name == "Ensemble":
        from fastrm.evaluate.ensemble import Ensemble

        return Ensemble
    if name == "GroupError":
        from fastrm.errors import GroupError

        return GroupError
    raise AttributeError(f"module 'fastrm' has no attribute {name!r}")

"""fastrm: train and evaluate scalar reward models for multimodal LLMs, and score responses with them.

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

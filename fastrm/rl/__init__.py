"""The reward model as the reward of a policy: adapters for trainers that learn by reinforcement.

Rollouts come in as a trainer hands them over, and rewards go out as it wants them, by a server's URL or a model in this
process. Nothing here imports a trainer. Open `rewards.py` for the schemes, `client.py` for the server's client,
`answers.py` for how answers are compared, `judging.py` for a policy that is a judge; each trainer has a module of its
name, and docs/rl.md its recipe.
"""

from fastrm.rl.judging import JudgeReward
from fastrm.rl.rewards import Rewards
from fastrm.rl.samples import Sample

__all__ = ["Client", "JudgeReward", "Rewards", "Sample"]


def __getattr__(name):
    if name == "Client":
        from fastrm.rl.client import Client

        return Client
    raise AttributeError(f"module 'fastrm.rl' has no attribute {name!r}")

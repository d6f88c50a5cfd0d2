"""Operations of reward-model training: the preference head and attention over prefix trees.

Needs torch, and triton for its kernels; knows nothing of transformers or of fastrm, so that any trainer
can import it. Each operation has a folder with its reference (the specification), its implementations
and `api.py`.
"""

from fastrm_kernels.preference_head import (
    FusedRewardHead,
    fuse_reward_head,
    preference_head_gradients,
    preference_head_loss,
    preference_loss,
    reward_head,
)
from fastrm_kernels.tree_attention import TreeLayout, tree_attention

__version__ = "0.1.0"

__all__ = [
    "FusedRewardHead",
    "TreeLayout",
    "fuse_reward_head",
    "preference_head_gradients",
    "preference_head_loss",
    "preference_loss",
    "reward_head",
    "tree_attention",
]

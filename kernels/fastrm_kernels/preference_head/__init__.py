from fastrm_kernels.preference_head.api import (
    HeadGradients,
    preference_head_gradients,
    preference_head_loss,
    preference_loss,
    reward_head,
)
from fastrm_kernels.preference_head.drop_in import FusedRewardHead, fuse_reward_head
from fastrm_kernels.preference_head.reference import ACTIVATIONS

__all__ = [
    "ACTIVATIONS",
    "FusedRewardHead",
    "HeadGradients",
    "fuse_reward_head",
    "preference_head_gradients",
    "preference_head_loss",
    "preference_loss",
    "reward_head",
]

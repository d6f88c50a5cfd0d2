"""Operations of reward-model training: the preference head and attention over prefix trees.

Needs torch alone; knows nothing of transformers or of fastrm, so that any trainer can import it.
Each operation has a folder with its reference (the specification), its implementations and `api.py`.
"""

from fastrm_kernels.preference_head import preference_loss, reward_head
from fastrm_kernels.tree_attention import TreeLayout, tree_attention

__all__ = ["TreeLayout", "preference_loss", "reward_head", "tree_attention"]

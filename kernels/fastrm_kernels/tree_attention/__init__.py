from fastrm_kernels.tree_attention.api import tree_attention
from fastrm_kernels.tree_attention.layout import TreeLayout

__all__ = ["TreeLayout", "tree_attention"]

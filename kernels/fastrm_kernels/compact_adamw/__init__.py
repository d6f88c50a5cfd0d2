from fastrm_kernels.compact_adamw.api import compact_adamw
from fastrm_kernels.compact_adamw.reference import BLOCK, MomentCode, round_stochastically

__all__ = ["BLOCK", "MomentCode", "compact_adamw", "round_stochastically"]

from fastrm_kernels.preference_head.reference import ACTIVATIONS, preference_loss, reward_head

__all__ = ["ACTIVATIONS", "preference_loss", "reward_head"]

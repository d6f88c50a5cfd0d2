"""The state that a head reads where that is not the last token's: an earlier token's, or a mean."""

import torch
from vllm.model_executor.layers.pooler.common import PoolingParamsUpdate
from vllm.model_executor.layers.pooler.seqwise import SequencePoolingMethod
from vllm.v1.pool.metadata import PoolingMetadata


class AnchorPool(SequencePoolingMethod):
    """A pooling method that finds each conversation's anchor by its tokens.

    Args:
        anchor: last_token; end_of_turn, the last token that is `token_id`; before_padding, the last that is not
            `pad_id`.
        is_mean: take the mean over all tokens up to the anchor, in float32, and not the anchor's state.
    """

    def __init__(self, anchor: str, *, is_mean: bool, token_id: int | None = None, pad_id: int | None = None):
        super().__init__()
        self.anchor, self.is_mean, self.token_id, self.pad_id = anchor, is_mean, token_id, pad_id
        needed = {"end_of_turn": token_id, "before_padding": pad_id}.get(anchor, 0)
        if needed is None:
            raise ValueError(
                f"config.json: the anchor {anchor} is found by a token that it does not name; write the folder anew "
                "with fastrm export MODEL --out FOLDER --for vllm"
            )

    def get_pooling_updates(self, task) -> PoolingParamsUpdate:
        """Ask vLLM for the token ids of the conversations."""
        return PoolingParamsUpdate(requires_token_ids=True)

    def forward(self, hidden_states: torch.Tensor, pooling_metadata: PoolingMetadata) -> torch.Tensor:
        """Return the pooled states (R, D) of R conversations, from all their tokens' states (N, D).

        Raises:
            RuntimeError: if a conversation is not here as a whole.
            ValueError: if a conversation has no token that the anchor could be.
        """
        if pooling_metadata.get_pooling_cursor().is_partial_prefill():
            raise RuntimeError("a part of a conversation: start vLLM without --enable-chunked-prefill")
        tokens = pooling_metadata.get_prompt_token_ids_cpu()
        parts = hidden_states.split([len(ids) for ids in tokens])
        return torch.stack([self._pooled(part, self.last(ids)) for part, ids in zip(parts, tokens, strict=True)])

    def _pooled(self, states: torch.Tensor, last: int) -> torch.Tensor:
        return states[: last + 1].float().mean(0) if self.is_mean else states[last]

    def last(self, ids: torch.Tensor) -> int:
        """Return the anchor's place among a conversation's tokens (n,)."""
        if self.anchor == "last_token":
            return len(ids) - 1
        found = torch.nonzero(ids == self.token_id if self.anchor == "end_of_turn" else ids != self.pad_id)
        if not len(found):
            raise ValueError(f"the conversation has no token that the anchor {self.anchor} could be")
        return int(found[-1])

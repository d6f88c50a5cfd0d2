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

        Of a conversation without a token that the anchor could be, they are NaN, for which vLLM answers that request
        with an error: an exception here would end the engine, and with it all other requests. vLLM itself sends such
        conversations at its start, to see how much memory they take.
        """
        tokens = pooling_metadata.get_prompt_token_ids_cpu()
        parts = hidden_states.split(pooling_metadata.prompt_lens.tolist())
        return torch.stack([self._pooled(part, self.length(ids)) for part, ids in zip(parts, tokens, strict=True)])

    def _pooled(self, states: torch.Tensor, length: int) -> torch.Tensor:
        if self.is_mean:
            return states[:length].float().mean(0)  # NaN of none
        return states[length - 1] if length else torch.full_like(states[0], torch.nan)

    def length(self, ids: torch.Tensor) -> int:
        """Return the number of a conversation's tokens (n,) up to its anchor; 0 if it has none."""
        if self.anchor == "last_token":
            return len(ids)
        found = torch.nonzero(ids == self.token_id if self.anchor == "end_of_turn" else ids != self.pad_id)
        return int(found[-1]) + 1 if len(found) else 0

"""Models of vLLM with fastrm's head: the stock model of each family, and the head as its classifier.

`/classify` and `/pooling` render conversations as the model was trained. `/score` joins a query and a document without
the chat template, so that its numbers would not be the rewards: these models refuse it.
"""

from collections.abc import Iterable

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.pooler import DispatchPooler
from vllm.model_executor.layers.pooler.seqwise import pooler_for_classify
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.interns1 import InternS1ForConditionalGeneration
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from vllm.model_executor.models.qwen2_vl import Qwen2VLForConditionalGeneration
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.utils import StageMissingLayer, no_init_weights

from fastrm_vllm.anchor_pool import AnchorPool

_ACTIVATIONS = {"none": nn.Identity, "relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh}


def make_head(config, dtype: torch.dtype) -> nn.Sequential:
    """Make the head that the `fastrm` section of config.json describes, with weights 0.weight, 2.weight, ..."""
    head, width = config.fastrm["head"], config.get_text_config().hidden_size
    layers: list[nn.Module] = []
    for _ in range(head["layers"] - 1):
        layers += [nn.Linear(width, width, head["bias"], dtype=dtype), _ACTIVATIONS[head["activation"]]()]
    return nn.Sequential(*layers, nn.Linear(width, 1, head["bias"], dtype=dtype))


class RewardModel:
    """A stock model as a pooling model with fastrm's head; stands first among a class's bases."""

    is_pooling_model = True
    supports_score_template = True
    default_seq_pooling_type = "LAST"

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        self._check_options(vllm_config)
        # The LM head of a model whose embeddings are not tied would take memory, and no file holds its weights.
        unused = (LogitsProcessor, ParallelLMHead)
        with no_init_weights(self, lambda module: StageMissingLayer("output", module), targets=unused):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        model = vllm_config.model_config
        self.score = make_head(model.hf_config, model.head_dtype)
        pooler = pooler_for_classify(model.pooler_config, pooling=self._pooling(model.hf_config), classifier=self.score)
        self.pooler = DispatchPooler({"classify": pooler})

    @classmethod
    def _check_options(cls, vllm_config: VllmConfig) -> None:
        """Refuse options of vLLM with which the head would read something else than in training."""
        wanted = cls.default_seq_pooling_type
        found = vllm_config.model_config.pooler_config.seq_pooling_type
        if found != wanted:
            raise ValueError(
                f"vLLM's seq_pooling_type is {found}, and {cls.__name__} wants {wanted}: its rewards would be others; "
                "start vLLM without --pooler-config"
            )

    def _pooling(self, config) -> AnchorPool | None:
        """Return what the head reads; None: as vLLM's configuration says, the last token."""
        section = config.fastrm
        if section.get("pooling", "anchor") != "anchor" or section["anchor"] != "last_token":
            raise ValueError(
                f"config.json: {section} is for an architecture FastrmWhole...; write the folder anew with "
                "fastrm export MODEL --out FOLDER --for vllm"
            )
        return None

    @classmethod
    def get_score_template(cls, query: str, document: str) -> str:
        """Refuse `/score`, whose prompt vLLM would ask for here."""
        raise ValueError(
            "a reward is for a conversation that the chat template renders, not for a query and a document: send its "
            "messages to /classify"
        )

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load all weights but the empty one by which transformers' stock classifiers refuse the folder."""
        return super().load_weights((name, tensor) for name, tensor in weights if tensor.numel())


class WholeRewardModel(RewardModel):
    """A reward model whose head reads another token than the last, or the mean over many."""

    # vLLM then computes a conversation in one piece, and takes no part of it from its cache.
    default_seq_pooling_type = "MEAN"

    @classmethod
    def _check_options(cls, vllm_config: VllmConfig) -> None:
        super()._check_options(vllm_config)
        if vllm_config.scheduler_config.enable_chunked_prefill or vllm_config.cache_config.enable_prefix_caching:
            raise ValueError(
                f"{cls.__name__} reads whole conversations; start vLLM without --enable-chunked-prefill and "
                "--enable-prefix-caching"
            )

    def _pooling(self, config) -> AnchorPool:
        section = config.fastrm
        pad = config.get_text_config().pad_token_id
        return AnchorPool(
            section["anchor"],
            is_mean=section.get("pooling") == "mean",
            token_id=section.get("anchor_token_id"),
            pad_id=pad,
        )


class FastrmLlamaForSequenceClassification(RewardModel, LlamaForCausalLM):
    """A reward model on a Llama."""


class FastrmQwen2ForSequenceClassification(RewardModel, Qwen2ForCausalLM):
    """A reward model on a Qwen2 or Qwen2.5."""


class FastrmQwen3ForSequenceClassification(RewardModel, Qwen3ForCausalLM):
    """A reward model on a Qwen3."""


class FastrmQwen2VLForSequenceClassification(RewardModel, Qwen2VLForConditionalGeneration):
    """A reward model on a Qwen2-VL."""


class FastrmQwen2_5_VLForSequenceClassification(RewardModel, Qwen2_5_VLForConditionalGeneration):
    """A reward model on a Qwen2.5-VL."""


class FastrmInternVLForSequenceClassification(RewardModel, InternS1ForConditionalGeneration):
    """A reward model on an InternVL2.5 or InternVL3."""


class FastrmWholeLlamaForSequenceClassification(WholeRewardModel, LlamaForCausalLM):
    """A reward model on a Llama that reads whole conversations."""


class FastrmWholeQwen2ForSequenceClassification(WholeRewardModel, Qwen2ForCausalLM):
    """A reward model on a Qwen2 or Qwen2.5 that reads whole conversations."""


class FastrmWholeQwen3ForSequenceClassification(WholeRewardModel, Qwen3ForCausalLM):
    """A reward model on a Qwen3 that reads whole conversations."""


class FastrmWholeQwen2VLForSequenceClassification(WholeRewardModel, Qwen2VLForConditionalGeneration):
    """A reward model on a Qwen2-VL that reads whole conversations."""


class FastrmWholeQwen2_5_VLForSequenceClassification(WholeRewardModel, Qwen2_5_VLForConditionalGeneration):
    """A reward model on a Qwen2.5-VL that reads whole conversations."""


class FastrmWholeInternVLForSequenceClassification(WholeRewardModel, InternS1ForConditionalGeneration):
    """A reward model on an InternVL2.5 or InternVL3 that reads whole conversations."""

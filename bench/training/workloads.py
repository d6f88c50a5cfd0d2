"""The model, the preference groups, and fastrm's own training step, as the benchmarks use them."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import AutoConfig, AutoModel

from fastrm.config import Config, HeadConfig, ModelConfig, OptimConfig, PrecisionConfig
from fastrm.data.media.format import MediaSize, MediaSpan, Patches, PatchFormat
from fastrm.data.media.qwen2_vl import mrope_positions
from fastrm.data.packing import EncodedGroup, Pack, Pixels, build_pack
from fastrm.data.record import ImageRef, Preference
from fastrm.data.template import EncodedResponse
from fastrm.model.network import RewardNetwork
from fastrm.train.engine import LocalEngine

VOCABULARY = 4096
VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD = 1, 2, 3, 4
FIRST_WORD = 16  # smaller ids are special

# Large enough that matrix products dominate, small enough for 0.3 to 2 s a step on two cores.
# Proportions are those of Qwen2.5-VL: GQA, an MLP three times as wide, a windowed vision tower.
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 192,
    "intermediate_size": 576,
    "num_hidden_layers": 6,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.06,  # the usual 0.02 suits widths in the thousands
    "use_cache": False,
}
VISION = {
    "depth": 4,
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_heads": 3,
    "out_hidden_size": 192,
    "window_size": 112,
    "fullatt_block_indexes": [3],
    "initializer_range": 0.06,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]}
# The stock processor's patch side, merged patches, frames, and its normalisation.
PATCHES = PatchFormat(14, 2, 2, 1 / 255, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def vision_config():
    """Return the config of a small Qwen2.5-VL."""
    return AutoConfig.for_model(
        "qwen2_5_vl",
        text_config={**TEXT, "rope_parameters": MROPE},
        vision_config=VISION,
        image_token_id=IMAGE_PAD,
        video_token_id=VIDEO_PAD,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )


def random_network(config, head: HeadConfig, encoder=None) -> RewardNetwork:
    """Make a network with random float32 weights, the same at every call."""
    torch.manual_seed(0)
    network = RewardNetwork(AutoModel.from_config(config, dtype=torch.float32), head, encoder)
    for parameter in network.model.parameters():
        # Default biases of 0 and norms of 1 would hide one that a variant leaves out.
        if parameter.ndim == 1:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    for parameter in network.score.parameters():
        # Rewards of about 1: with rewards near 0 the loss is log 2, whatever the model does.
        parameter.data.mul_(3.0)
    return network.train()


def image_groups(
    num_groups: int, num_responses: int, prefix_tokens: int, response_tokens: int, grid: tuple[int, int]
) -> tuple[list[EncodedGroup], Pixels]:
    """Return groups with all their pairs and exact token counts: one image and random words in the prefix.

    Args:
        grid: merged patches of the image, height and width; its tokens count as prefix.
    """
    rng = np.random.default_rng(0)
    groups, pixels = [], {}
    for number in range(num_groups):
        ref = ImageRef(data=bytes([number]))
        patches = rng.integers(0, 256, (4 * grid[0] * grid[1], 3 * PATCHES.side**2), dtype=np.uint8)
        pixels[ref.key] = Patches(patches, (1, 2 * grid[0], 2 * grid[1]))
        image = [VISION_START, *[IMAGE_PAD] * (grid[0] * grid[1]), VISION_END]
        prefix = np.concatenate([image, _words(rng, prefix_tokens - len(image))])
        spans = (MediaSpan(1, MediaSize(1, *grid), ref),)
        positions = mrope_positions(prefix_tokens + response_tokens, spans, None)
        responses = tuple(
            EncodedResponse(np.concatenate([prefix, _words(rng, response_tokens)]), spans, response_tokens, positions)
            for _ in range(num_responses)
        )
        pairs = [Preference(a, b) for a in range(num_responses) for b in range(a + 1, num_responses)]
        groups.append(EncodedGroup(f"group {number}", "random", "random", responses, tuple(pairs)))
    return groups, pixels


def _words(rng, count: int) -> np.ndarray:
    return rng.integers(FIRST_WORD, VOCABULARY, count, dtype=np.int64)


def train_config(model_type: str) -> Config:
    """Return the settings of all variants: float32, AdamW with clipping, and a rate that barely moves the weights."""
    return Config(
        model=ModelConfig(init={"model_type": model_type}, tokenizer="none"),
        optim=OptimConfig(lr=1e-6),
        precision=PrecisionConfig(dtype="fp32"),
    )


@dataclass
class FastrmStep:
    """fastrm's training step: each batch is one pack."""

    engine: LocalEngine
    packs: list[Pack]
    name: str = "fastrm"

    @classmethod
    def of_groups(
        cls,
        network: RewardNetwork,
        batches: Sequence[Sequence[EncodedGroup]],
        pixels: Pixels,
        config: Config | None = None,
    ) -> "FastrmStep":
        """Make the step on a copy of the network; `config` is by default that of `train_config`."""
        network = copy.deepcopy(network)
        network.set_kernels(torch.float32, attention="sdpa")
        packs = [
            build_pack(groups, {key: pixels[key] for group in groups for key in group.media}, PATCHES)
            for groups in batches
        ]
        return cls(LocalEngine(network, config or train_config(network.model.config.model_type)), packs)

    def step(self, number: int) -> None:
        self.engine.accumulate(self._pack(number))
        assert self.engine.update(self.engine.config.optim.lr, number).finite

    def gradients(self, number: int) -> tuple[float, dict[str, torch.Tensor]]:
        pack = self._pack(number)
        total, _ = self.engine.loss_and_rewards(pack)
        loss = total / pack.weight.sum()
        loss.backward()
        found = take_gradients(self.engine.network)
        return float(loss.detach()), found

    def num_tokens(self, number: int) -> int:
        return self._pack(number).num_tokens

    def _pack(self, number: int) -> Pack:
        return self.packs[number % len(self.packs)]


def take_gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Take the gradients off the parameters and return them by parameter name."""
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad(set_to_none=True)
    return found

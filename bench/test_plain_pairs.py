"""fastrm's training step against the plain pairwise one, on a small Qwen2.5-VL with images.

Plain is what pairwise trainers do: every preference is two padded rows, each with its own copy of the
prompt and the image, through the stock transformers model with stock SDPA attention.
"""

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastrm.config import HeadConfig, OptimConfig
from fastrm.train.optim import make_optimizer
from measure import compare
from workloads import (
    IMAGE_PAD,
    FastrmStep,
    image_groups,
    random_network,
    take_gradients,
    train_config,
    vision_config,
)

PAD = 0


@dataclass(frozen=True)
class Shape:
    """A workload: groups of one step, and tokens of each part."""

    num_groups: int
    num_responses: int
    prefix_tokens: int
    response_tokens: int
    grid: tuple[int, int]
    floor: float

    @property
    def name(self) -> str:
        kind = "pairs" if self.num_responses == 2 else f"groups of {self.num_responses}"
        return f"{kind}, {self.prefix_tokens}/{self.response_tokens} tokens"


# Floors against measured ratios (CPU seconds, one thread): 2.0, 1.8, 9.2 and 7.5. The margin is for
# shared machines, where wall times vary by a third.
SHAPES = {
    "pairs-400-100": Shape(2, 2, 400, 100, (16, 16), floor=1.4),
    "pairs-640-300": Shape(2, 2, 640, 300, (20, 20), floor=1.25),
    "groups4-400-100": Shape(1, 4, 400, 100, (16, 16), floor=4.0),
    "groups4-640-300": Shape(1, 4, 640, 300, (20, 20), floor=3.5),
}


class PlainStep:
    """Stock model, stock attention, two rows a preference."""

    name = "plain"

    def __init__(self, network, groups, pixels):
        settings: OptimConfig = train_config("qwen2_5_vl").optim
        # A container with the key names of RewardNetwork, so that gradients compare by name.
        self.modules = nn.ModuleDict({"model": copy.deepcopy(network.model), "score": copy.deepcopy(network.score)})
        self.modules["model"].set_attn_implementation("sdpa")
        self.optimizer = make_optimizer(self.modules, settings)
        self.max_grad_norm = settings.max_grad_norm
        self.batch, self.last = _plain_batch(groups, pixels)

    def step(self, number: int) -> None:
        self._loss().backward()
        nn.utils.clip_grad_norm_(self.modules.parameters(), self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def gradients(self, number: int) -> tuple[float, dict[str, torch.Tensor]]:
        loss = self._loss()
        loss.backward()
        return float(loss.detach()), take_gradients(self.modules)

    def num_tokens(self, number: int) -> int:
        return self.batch["input_ids"].numel()

    def _loss(self) -> torch.Tensor:
        states = self.modules["model"](**self.batch, use_cache=False).last_hidden_state  # (B, N, D)
        states = states[torch.arange(len(self.last)), self.last]
        chosen, rejected = self.modules["score"](states).squeeze(-1).chunk(2)
        return -F.logsigmoid(chosen - rejected).mean()


def _plain_batch(groups, pixels) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Right-padded rows, all winners before all losers, and the index of each row's last token."""
    pairs = [(group.responses[p.winner], group.responses[p.loser]) for group in groups for p in group.preferences]
    rows = [winner for winner, _ in pairs] + [loser for _, loser in pairs]
    lengths = torch.tensor([len(row.tokens) for row in rows])
    tokens = [torch.from_numpy(row.tokens) for row in rows]
    input_ids = nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=PAD)
    images = [pixels[span.ref.key] for row in rows for span in row.images]
    batch = {
        "input_ids": input_ids,
        "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
        "mm_token_type_ids": (input_ids == IMAGE_PAD).int(),
        "pixel_values": torch.cat([values for values, _ in images]),
        "image_grid_thw": torch.stack([grid for _, grid in images]),
    }
    return batch, lengths - 1


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_training_step_beats_plain_pairs(shape, benchmark, comparisons):
    groups, pixels = image_groups(
        shape.num_groups, shape.num_responses, shape.prefix_tokens, shape.response_tokens, shape.grid
    )
    network = random_network(vision_config(), HeadConfig())
    fastrm = FastrmStep.of_groups(network, [groups], pixels)
    num_pairs = sum(len(group.preferences) for group in groups)
    plain = PlainStep(network, groups, pixels)
    comparisons.add(compare(shape.name, fastrm, plain, num_pairs, shape.floor, benchmark), benchmark)

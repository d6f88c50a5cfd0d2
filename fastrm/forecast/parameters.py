"""The exact number of a network's parameters, part by part; the network may be on torch's meta device."""

from dataclasses import dataclass

from torch import nn

from fastrm.model.network import RewardNetwork

# The parts in the order of a forward pass.
PARTS = ("vision tower", "projector", "embeddings", "language model", "head")


@dataclass(frozen=True)
class Parameters:
    """Parameter counts of one part, or of a whole network: all, and those with a gradient."""

    total: int
    trainable: int


def count_parameters(network: RewardNetwork) -> dict[str, Parameters]:
    """Count parameters by part (PARTS; those of the vision tower are 0 for a text model)."""
    counts = {part: [0, 0] for part in PARTS}
    for name, parameter in network.named_parameters():
        count = counts[part_of(name)]
        count[0] += parameter.numel()
        count[1] += parameter.numel() * parameter.requires_grad
    return {part: Parameters(*count) for part, count in counts.items()}


def sum_parameters(parts: dict[str, Parameters]) -> Parameters:
    """Sum the counts of all parts."""
    return Parameters(sum(p.total for p in parts.values()), sum(p.trainable for p in parts.values()))


def part_of(name: str) -> str:
    """Return the part of PARTS that a parameter belongs to, by its name in the network."""
    if name.startswith("score."):
        return "head"
    if name.startswith(("model.visual.merger.", "model.multi_modal_projector.")):
        return "projector"
    if name.startswith(("model.visual.", "model.vision_tower.")):
        return "vision tower"
    return "embeddings" if ".embed_tokens." in name else "language model"


def language_of(network: RewardNetwork) -> nn.Module:
    """Return the language model of a network, without its vision tower."""
    return network.model.language_model if network.is_vision else network.model

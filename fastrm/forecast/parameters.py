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
    for parameter, part in parts_of(network).items():
        count = counts[part]
        count[0] += parameter.numel()
        count[1] += parameter.numel() * parameter.requires_grad
    return {part: Parameters(*count) for part, count in counts.items()}


def sum_parameters(parts: dict[str, Parameters]) -> Parameters:
    """Sum the counts of all parts."""
    return Parameters(sum(p.total for p in parts.values()), sum(p.trainable for p in parts.values()))


def parts_of(network: RewardNetwork) -> dict[nn.Parameter, str]:
    """Return the part of PARTS that each parameter belongs to, in the order of the network."""
    found = dict.fromkeys(network.parameters(), "language model")
    found |= dict.fromkeys(language_of(network).embed_tokens.parameters(), "embeddings")
    if network.tower is not None:
        found |= dict.fromkeys(network.tower.parameters(), "vision tower")
        found |= dict.fromkeys(network.tower.projector.parameters(), "projector")
    return found | dict.fromkeys(network.score.parameters(), "head")


def language_of(network: RewardNetwork) -> nn.Module:
    """Return the language model of a network, without its vision tower."""
    return network.model.language_model if network.is_vision else network.model

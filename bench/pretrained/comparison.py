"""One workload with three trainers: gate, seconds, memory, and the held-out accuracy that each has reached."""

import copy
import functools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.harness.memory import resident_peak_mib
from bench.harness.timing import Stopwatch, in_turns
from bench.pretrained.batches import Batches, Workload
from bench.training.comparison import Variant, check_agreement
from bench.training.plain import PlainEngine, collate, pairwise_rows
from bench.training.profiling import profile_operations
from bench.training.trl_step import TrlStep
from bench.training.workloads import PATCHES, FastrmStep
from fastrm.config import Config, HeadConfig, ModelConfig, OptimConfig, PrecisionConfig
from fastrm.data.packing import EncodedGroup, Pixels, build_pack
from fastrm.data.tokenizer import load_tokenizer
from fastrm.model.network import RewardNetwork
from fastrm.train.setup import make_network
from fastrm.train.step_cost import make_cost_model

ROUNDS = 3
LEARNING_RATE = 2e-5


def pretrained_config(model: Path) -> Config:
    """Return the settings of all three: float32, AdamW, a linear head without bias as TRL has it."""
    return Config(
        model=ModelConfig(path=str(model), head=HeadConfig(layers=1, bias=False)),
        optim=OptimConfig(lr=LEARNING_RATE),
        precision=PrecisionConfig(dtype="fp32"),
    )


def load_network(model: Path) -> tuple[RewardNetwork, Config]:
    """Return the pretrained backbone with a head of random weights, the same at every call."""
    config = pretrained_config(model)
    return make_network(config, load_tokenizer(str(model))), config


@dataclass
class PlainStep(FastrmStep):
    """The plain pairwise trainer: two padded rows a preference through the stock model and SDPA."""

    name: str = "plain"

    @classmethod
    def of_groups(
        cls, network: RewardNetwork, batches: Sequence[Sequence[EncodedGroup]], pixels: Pixels, config: Config
    ) -> "PlainStep":
        """Make the step on a copy of the network; `pixels` is empty."""
        network = copy.deepcopy(network)
        network.model.set_attn_implementation("sdpa")
        rows = [pairwise_rows(groups, pixels)[0] for groups in batches]
        packs = [collate(build_pack(groups, pixels, PATCHES, share=False), groups) for groups in rows]
        return cls(PlainEngine(network, config), packs)

    def num_tokens(self, number: int) -> int:
        return self._pack(number).padded_ids.numel()


def compare_workload(workload: Workload, loaded: tuple[RewardNetwork, Config], folder: Path) -> dict:
    """Return the figures of one workload, as the results file holds them.

    Raises:
        AssertionError: the gate is red: two trainers compute different things.
    """
    network, config = loaded
    batches = workload.batches(network.encoder, ROUNDS)
    fastrm = FastrmStep.of_groups(network, batches.groups, {}, config)
    trl = TrlStep(network, batches.records, config.optim, folder)
    plain = PlainStep.of_groups(network, batches.groups, {}, config)
    variants: dict[str, Variant] = {variant.name: variant for variant in (trl, plain, fastrm)}
    agreements = [check_agreement(fastrm, rival) for rival in (trl, plain)]
    seconds = {name: [] for name in variants}

    def sample(name: str, variant: Variant) -> None:
        with Stopwatch() as watch:
            variant.step(len(seconds[name]))
        seconds[name].append(watch.wall)
        print(f"  step {len(seconds[name])}, {name}: {watch.wall:.2f} s", flush=True)

    # The gate has warmed up all variants.
    in_turns([functools.partial(sample, *item) for item in variants.items()], range(ROUNDS))
    models = {"trl": trl.trainer.model, "plain": plain.engine.network, "fastrm": fastrm.engine.network}
    rewards = {name: held_out_rewards(network, model, batches.held_out) for name, model in models.items()}
    figures = {
        name: {
            "seconds": statistics.median(seconds[name]),
            "all_seconds": seconds[name],
            "peak_mib": resident_peak_mib(lambda variant=variant: variant.step(0)),
            "tokens": statistics.median(variant.num_tokens(number) for number in range(ROUNDS)),
            "flops": agreements[0 if name != "plain" else 1].flops[name],
            "accuracy": accuracy(rewards[name], batches.held_out),
        }
        for name, variant in variants.items()
    }
    return {
        "what": workload.what,
        "num_pairs": batches.num_pairs,
        "rounds": ROUNDS,
        "gradient_error": max(agreement.gradient_error for agreement in agreements),
        "held_out_pairs": sum(len(group.preferences) for group in batches.held_out),
        "reward_difference": max(
            float((rewards[name] - rewards["fastrm"]).abs().max()) for name in ("trl", "plain")
        ),
        **needed(network, batches, config),
        "variants": figures,
        "profile": profile_operations(lambda: fastrm.step(0)),
    }  # fmt: skip


def needed(network: RewardNetwork, batches: Batches, config: Config) -> dict:
    """Return the least tokens and FLOPs of a step: medians over the batches.

    pairwise_tokens are those of a trainer that reads both conversations of each pair, without padding; tree_tokens each
    shared prefix once. The FLOPs are those of the trees' matrix products and visible query-key pairs
    (fastrm/train/step_cost.py).
    """
    costs = make_cost_model(network.model.config, config.model)
    trees = [[group.tree() for group in step] for step in batches.groups]
    flops = [
        sum(costs.per_token * sum(tree.lengths) + costs.per_attention_pair * tree.num_attention_pairs for tree in step)
        for step in trees
    ]
    pairwise = [sum(group.num_unshared_tokens for group in step) for step in batches.groups]
    return {
        "pairwise_tokens": statistics.median(pairwise),
        "tree_tokens": statistics.median(sum(sum(tree.lengths) for tree in step) for step in trees),
        "tree_flops": statistics.median(flops),
    }


def held_out_rewards(network: RewardNetwork, model: torch.nn.Module, groups: Sequence[EncodedGroup]) -> torch.Tensor:
    """Return rewards (R,) of the groups with the weights of `model`, which have stock names."""
    with torch.no_grad():
        own = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        network.load_state_dict(model.state_dict())
        rewards = torch.cat([network(build_pack([group], {}, PATCHES)) for group in groups])
        network.load_state_dict(own)
    return rewards


def accuracy(rewards: torch.Tensor, groups: Sequence[EncodedGroup]) -> float:
    """Return the share of the groups' preferences whose winner has the larger reward."""
    right, total, first = 0, 0, 0
    for group in groups:
        for preference in group.preferences:
            right += bool(rewards[first + preference.winner] > rewards[first + preference.loser])
        total += len(group.preferences)
        first += len(group.responses)
    return right / total

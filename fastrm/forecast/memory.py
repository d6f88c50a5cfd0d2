"""The memory of one GPU at its fullest: training state, and what a pack needs on top of it.

What is left out: the CUDA context, the communication library's own buffers, fragmentation, and on a CPU
the libraries' workspaces. `fastrm plan` keeps a reserve for them.
"""

from dataclasses import dataclass

from fastrm.config import Config
from fastrm.forecast.communication import ELEMENT, REDUCED_AT_ONCE
from fastrm.forecast.flops import Workload, patches_per_token
from fastrm.forecast.layers import Computation, Rows
from fastrm.forecast.model import network_parts
from fastrm.forecast.parameters import Parameters, count_parameters, sum_parameters
from fastrm.forecast.tape import Moment, moments
from fastrm.model.network import RewardNetwork
from fastrm.train.optim import training_bytes

MODES = ("none", "selective", "full")
# DeepSpeed's default of stage3_max_live_parameters: gathered weights that stay before some are let go.
LIVE_PARAMETERS = 10**9


@dataclass(frozen=True)
class State:
    """Bytes that one GPU holds from step to step, and while gradients are sent.

    Attributes:
        weights: as the forward pass reads them, and DeepSpeed's own copy of this rank's share.
        gradients: that are kept from pack to pack.
        states: of AdamW.
        gathered: weights of ZeRO-3 that are whole for a while.
        buckets: gradients on their way.
    """

    weights: int
    gradients: int
    states: int
    gathered: int = 0
    buckets: int = 0


@dataclass(frozen=True)
class PeakMemory:
    """Bytes of one GPU at the moment when it holds the most.

    Attributes:
        when: in words.
        activations, working, copies: as in `Moment`.
    """

    when: str
    weights: int
    gradients: int
    states: int
    gathered: int
    buckets: int
    activations: int
    working: int
    copies: int

    @property
    def total(self) -> int:
        """Of all parts."""
        return sum(value for name, value in vars(self).items() if name != "when")


def training_state(network: RewardNetwork, config: Config, num_gpus: int) -> State:
    """Exact sizes on one GPU; on several, those of float32 under ZeRO (Rajbhandari et al. 2020, section 3).

    There, DeepSpeed keeps a second float32 copy of the weights that a rank updates (Psi / N).
    """
    if num_gpus == 1:
        alone = training_bytes(network, config)
        return State(alone.weights, alone.gradients, alone.states)
    return zero_state(sum_parameters(count_parameters(network)), config.engine.zero_stage, num_gpus)


def zero_state(parameters: Parameters, stage: int, num_gpus: int) -> State:
    """Float32 training state of one of `num_gpus` ranks: 4 bytes a weight, 4 a gradient, 4 + 8 that are divided.

    Stage 1 keeps whole gradients until the update. Stages 2 and 3 reduce each bucket of gradients as it fills,
    and hold the bucket and its flat copy for that.
    """
    trained, everything = parameters.trainable, parameters.total
    share, bucket = _share(trained, num_gpus), min(REDUCED_AT_ONCE, trained)
    return State(
        weights=ELEMENT * ((everything if stage < 3 else _share(everything, num_gpus)) + share),
        gradients=ELEMENT * (trained + share if stage == 1 else share),
        states=2 * ELEMENT * share,
        gathered=ELEMENT * min(LIVE_PARAMETERS, everything) if stage == 3 else 0,
        buckets=2 * ELEMENT * bucket if stage > 1 else 0,
    )


def _share(num_elements: int, num_gpus: int) -> int:
    # Rounded up: the last share is padded.
    return -(-num_elements // num_gpus)


def peak_memory(network: RewardNetwork, config: Config, rows: Rows, how: Computation, num_gpus: int = 1) -> PeakMemory:
    """What one GPU holds at its fullest moment in a step of packs of these rows.

    Args:
        network: not fused; may be on the meta device.
        how: layers compute. `accumulated`: the step has more packs than one.
    """
    state = training_state(network, config, num_gpus)
    divided = num_gpus > 1 and config.engine.zero_stage > 1
    gradients = "divided" if divided else "kept" if how.accumulated else "growing"
    found = moments(network_parts(network, config, rows, how), gradients)
    fullest = max(found, key=lambda moment: moment.total)
    during = _at(fullest, state, state.gradients if divided else fullest.gradients)
    # All gradients are there, and nothing of a pack is left.
    update = _at(Moment("update", 0, 0, 0, 0), state, state.gradients)
    return max(during, update, key=lambda peak: peak.total)


def _at(moment: Moment, state: State, gradients: int) -> PeakMemory:
    return PeakMemory(
        moment.name, state.weights, gradients, state.states, state.gathered, state.buckets, moment.activations,
        moment.working, moment.copies,
    )  # fmt: skip


def full_pack(config: Config, load: Workload, network: RewardNetwork) -> Rows:
    """Rows of a pack as large as it may be, of groups as in `load`."""
    tokens, share = config.optim.tokens_per_pack, config.data.share_prefixes
    num_groups = tokens * load.num_pairs / load.num_tokens(share)
    keys = round(num_groups * 2 * (load.prompt_tokens + load.response_tokens))
    patches = round(num_groups * load.image_tokens) * patches_per_token(network)
    return Rows(tokens, keys if share else tokens, round(2 * num_groups), keys, patches)


def peak_of(config: Config, num_gpus: int, network: RewardNetwork, load: Workload, num_packs: int = 2) -> PeakMemory:
    """Peak of one GPU with packs as large as they may be, of groups as in `load`.

    Args:
        num_packs: of a step on each rank; only whether it is more than one counts.
    """
    rows = full_pack(config, load, network)
    return peak_memory(network, config, rows, gpu_computation(config, num_packs), num_gpus)


def cpu_computation(config: Config, num_packs: int) -> Computation:
    """How the layers of a configuration compute on a CPU.

    Args:
        num_packs: of a step on each rank.
    """
    return Computation(
        bf16=config.precision.dtype == "bf16",
        bf16_weights=config.precision.weights == "bf16",
        fp8=config.precision.fp8 != "off",
        fused=config.model.fuse_projections,
        accumulated=num_packs > 1,
    )


def gpu_computation(config: Config, num_packs: int) -> Computation:
    """How the layers of a configuration compute on a GPU.

    Args:
        num_packs: of a step on each rank.
    """
    attention = config.model.attention
    if attention == "auto":
        attention = "triton" if config.kernels == "triton" else "flash"
    return Computation(
        bf16=config.precision.dtype == "bf16",
        bf16_weights=config.precision.weights == "bf16",
        fp8=config.precision.fp8 != "off",
        attention={"sdpa": "eager", "flash": "varlen", "flash_attn": "varlen", "triton": "triton"}[attention],
        liger=config.kernels == "triton" and config.compile == "off",
        fused=config.model.fuse_projections,
        accumulated=num_packs > 1,
    )

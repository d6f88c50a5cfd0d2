"""The memory of one GPU at its fullest: training state, and the needs of a pack in addition.

What is left out: the CUDA context, the communication library's own buffers, fragmentation, and on a CPU
the libraries' workspaces. `fastrm plan` keeps a reserve for them.
"""

from dataclasses import dataclass

from fastrm.config import Config
from fastrm.forecast.fake_step import FakeSteps
from fastrm.forecast.full_pack import PackShape, full_pack
from fastrm.forecast.lifetimes import Fullest
from fastrm.forecast.parameters import Parameters, count_parameters, sum_parameters
from fastrm.forecast.step_time import ELEMENT, REDUCED_AT_ONCE
from fastrm.forecast.workload import Workload
from fastrm.model.layers import BACKENDS
from fastrm.model.network import RewardNetwork
from fastrm.train.optim import training_bytes

MODES = ("none", "selective", "full")
# DeepSpeed's default of stage3_max_live_parameters: gathered weights that stay before some are freed.
LIVE_PARAMETERS = 10**9


@dataclass(frozen=True)
class State:
    """The bytes that one GPU holds from step to step, and while gradients are sent.

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
    """The bytes of one GPU at the moment when it holds the most.

    Attributes:
        when: in words.
        activations, working, copies: as in `Fullest`.
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
        """The sum of all parts."""
        return sum(value for name, value in vars(self).items() if name != "when")


def training_state(network: RewardNetwork, config: Config, num_gpus: int) -> State:
    """Return exact sizes on one GPU; on several, those of float32 under ZeRO (Rajbhandari et al. 2020, section 3).

    There, DeepSpeed keeps a second float32 copy of the weights that a rank updates (Psi / N).
    """
    if num_gpus == 1:
        alone = training_bytes(network, config)
        return State(alone.weights, alone.gradients, alone.states)
    return zero_state(sum_parameters(count_parameters(network)), config.engine.zero_stage, num_gpus)


def zero_state(parameters: Parameters, stage: int, num_gpus: int) -> State:
    """Return the float32 training state of one of `num_gpus` ranks.

    A trained element has 4 bytes of weight and 4 of gradient, and 4 + 8 bytes that are divided over the ranks.

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
    # The division rounds up: the last share is padded.
    return -(-num_elements // num_gpus)


def peak_memory(
    steps: FakeSteps, config: Config, shape: PackShape, attention: str, num_gpus: int = 1, num_packs: int = 2
) -> PeakMemory:
    """Return the memory of one GPU at its fullest moment in a step.

    Args:
        steps: of the network.
        shape: of the step's packs.
        attention: implementation of `tree_attention`.
        num_packs: of a step on each rank; only whether it is more than one counts.
    """
    state = training_state(steps.network, config, num_gpus)
    divided = num_gpus > 1 and config.engine.zero_stage > 1
    growing = not divided and num_packs == 1
    found = steps.fullest(config, shape, attention, alone=num_gpus == 1, gradients_stay=growing)
    if divided:
        gradients = state.gradients
    elif growing:
        gradients = found.gradients
    else:  # the gradients of earlier packs
        gradients = ELEMENT * sum_parameters(count_parameters(steps.network)).trainable
    during = _at(found, state, gradients)
    # All gradients are there, and all memory of a pack is freed.
    update = _at(Fullest("update", 0, 0, 0, 0), state, state.gradients)
    return max(during, update, key=lambda peak: peak.total)


def _at(moment: Fullest, state: State, gradients: int) -> PeakMemory:
    return PeakMemory(
        moment.when, state.weights, gradients, state.states, state.gathered, state.buckets, moment.activations,
        moment.working, moment.copies,
    )  # fmt: skip


def peak_of(steps: FakeSteps, config: Config, num_gpus: int, load: Workload, num_packs: int = 2) -> PeakMemory:
    """Return the peak of one GPU with packs as large as they may be, of groups as in `load`.

    Args:
        steps: of the network.
        num_packs: of a step on each rank; only whether it is more than one counts.
    """
    shape = full_pack(config, load, steps.network)
    return peak_memory(steps, config, shape, gpu_attention(config), num_gpus, num_packs)


def gpu_attention(config: Config) -> str:
    """Return the implementation of `tree_attention` that a configuration is assumed to run on a GPU."""
    backend = config.model.attention
    if backend == "auto":
        backend = "triton" if config.kernels == "triton" else "flash"
    return BACKENDS[backend]

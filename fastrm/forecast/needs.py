"""The highest needs of a run: memory while it loads, trains, saves and exports; and disk."""

import sys
from dataclasses import dataclass

from fastrm.config import Config
from fastrm.data.loader import PREFETCH_PACKS
from fastrm.forecast.fake_step import FakeSteps
from fastrm.forecast.full_pack import FLOAT, PackShape, full_pack
from fastrm.forecast.hardware import GPUS_PER_NODE
from fastrm.forecast.memory import State, peak_memory, peak_of, training_state
from fastrm.forecast.parameters import count_parameters, sum_parameters
from fastrm.forecast.workload import Workload
from fastrm.model.export import export_dtype
from fastrm.model.network import RewardNetwork
from fastrm.model.weight_files import CHUNK_BYTES
from fastrm.train.checkpoint import SHARD_BYTES

# Resident memory of a process that has imported PyTorch and transformers and has no model yet: 480 MB were measured
# on a CPU with torch 2.13.
LIBRARIES = 512 * 2**20


@dataclass(frozen=True)
class Phases:
    """The bytes of memory at the highest moment of each part of a run; `saving` is of a checkpoint."""

    loading: int
    training: int
    saving: int
    exporting: int


@dataclass(frozen=True)
class Disk:
    """The bytes below run.dir, without the prepared data.

    Attributes:
        checkpoint: bytes of one checkpoint.
        num_checkpoints: how many there are at a time, the one that is being written included.
        export: bytes of the trained model.
    """

    checkpoint: int
    num_checkpoints: int
    export: int

    @property
    def total(self) -> int:
        """Bytes when the disk is at its fullest."""
        return self.num_checkpoints * self.checkpoint + self.export


@dataclass(frozen=True)
class Least:
    """The least needs of a run, whatever its data are.

    Attributes:
        least: host memory of a process that computes on the CPU: weights, gradients and AdamW's states.
        least_on_gpu: the same of a process that computes on a GPU.
        disk: of the whole run.
    """

    least: int
    least_on_gpu: int
    disk: Disk


@dataclass(frozen=True)
class Needs(Least):
    """The needs of a run.

    Attributes:
        cpu: host memory of a process that computes on the CPU.
        host: host memory of a machine that computes on its GPUs, with a process for each.
        gpu: memory of each GPU.
    """

    cpu: Phases
    host: Phases
    gpu: Phases


def least_of(config: Config, network: RewardNetwork, num_gpus: int = 1) -> Least:
    """Compute the least needs of a run.

    Args:
        network: not fused; may be on the meta device.
        num_gpus: processes, on all machines together.
    """
    state = training_state(network, config, num_gpus)
    placed, made = _placed(config, network, state, num_gpus)
    return Least(max(placed, state.weights + state.gradients + state.states), made, disk_of(config, network))


def needs_of(steps: FakeSteps, config: Config, load: Workload, num_gpus: int = 1, num_packs: int = 2) -> Needs:
    """Compute the needs of a run from shapes alone.

    Args:
        steps: of its network.
        load: groups that packs are full of.
        num_gpus: processes, on all machines together.
        num_packs: of a step on each; only whether it is more than one counts.
    """
    network = steps.network
    state = training_state(network, config, num_gpus)
    placed, made = _placed(config, network, state, num_gpus)
    largest = _largest(network)
    kept = state.weights + state.states + (state.gradients if num_gpus > 1 else 0)
    shard = min(SHARD_BYTES, kept if config.model.lora is None else disk_of(config, network).checkpoint)
    shape = full_pack(config, load, network)
    waiting = _waiting_packs(config, network, shape)
    on_cpu = peak_memory(steps, config, shape, "eager", num_gpus, num_packs)
    # The parts of fused projections have no memory of their own, so that writing copies them.
    copied = shard if config.model.fuse_projections else 0
    cpu = (placed + CHUNK_BYTES, on_cpu.total + waiting, kept + copied, kept + largest)
    local = min(num_gpus, GPUS_PER_NODE)
    # One process of all writes checkpoints and the export.
    host = (local * (made + CHUNK_BYTES), local * waiting, shard, largest)
    gpu = (placed, peak_of(steps, config, num_gpus, load, num_packs).total, kept, kept)
    return Needs(
        **vars(least_of(config, network, num_gpus)),
        cpu=Phases(*(LIBRARIES + value for value in cpu)),
        host=Phases(*(local * LIBRARIES + value for value in host)),
        gpu=Phases(*gpu),
    )


def _placed(config: Config, network: RewardNetwork, state: State, num_gpus: int) -> tuple[int, int]:
    """Return bytes of weights in their places, and of those that are made on the host before."""
    everything = FLOAT * sum_parameters(count_parameters(network)).total
    # Random weights are made whole, in float32; weights of files are read into their places.
    made = everything if config.model.path is None else 0
    return max(made, _loaded(config, state, everything, _largest(network), num_gpus)), made


def _largest(network: RewardNetwork) -> int:
    return FLOAT * max(parameter.numel() for parameter in network.parameters())


def _loaded(config: Config, state: State, everything: int, largest: int, num_gpus: int) -> int:
    """Return the most bytes while weights are loaded."""
    if num_gpus == 1:
        return state.weights
    # DeepSpeed takes float32. Under ZeRO-3 a rank keeps its part of each weight and frees the rest.
    return -(-everything // num_gpus) + largest if config.engine.zero_stage == 3 else everything


def _waiting_packs(config: Config, network: RewardNetwork, shape: PackShape) -> int:
    """Return bytes of the pixels of packs that data workers have made ahead."""
    if not shape.grids:
        return 0
    form = network.tower.plain_patches
    # A still image is kept as one of the equal frames that its patches have.
    pixels = shape.num_patches * network.tower.blank[1] // form.frames
    return (1 + PREFETCH_PACKS * config.data.num_workers) * pixels


def disk_of(config: Config, network: RewardNetwork) -> Disk:
    """Compute the disk space of a run below run.dir. Checkpoints hold weights and states as one process does.

    Under adapters they hold what is trained alone.
    """
    state = training_state(network, config, 1)
    backbone, head = (sum(p.numel() for p in part.parameters()) for part in (network.model, network.score))
    export = export_dtype(config).itemsize * backbone + FLOAT * head
    if config.model.lora is not None:  # adapters and head, in float32
        trained = FLOAT * sum_parameters(count_parameters(network)).trainable
        return Disk(trained + state.states, num_checkpoints(config), trained)
    return Disk(state.weights + state.states, num_checkpoints(config), export)


def num_checkpoints(config: Config) -> int:
    """Return the most checkpoints at a time: those that are kept, the best one, and the one that is written."""
    run, data, last = config.run, config.data, config.run.max_steps
    has_data = bool(data.eval) or any(source.held_out for source in data.train)
    eval_every, at_start = (run.eval_every, run.eval_at_start) if has_data else (0, False)
    if last is None:
        saves = sys.maxsize if run.save_every or eval_every else 1 + at_start
    else:
        saves = at_start + len({last, *_multiples(run.save_every, last), *_multiples(eval_every, last)})
    # Without other saves, the best evaluation's is the newest.
    is_best_apart = bool(run.save_every and (eval_every or at_start))
    return min(run.keep_checkpoints + is_best_apart + 1, saves)


def _multiples(step: int, last: int) -> range:
    return range(step, last + 1, step) if step else range(0)

"""What the ranks of test_distributed.py do, each in a process of its own, and what one process does."""

import ctypes
import os
import signal
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

import fastrm.train.loop
from bench.harness.memory import reset_peak, status_bytes
from fastrm.config import Config, load_config
from fastrm.data.template import TurnLoss
from fastrm.data.tokenizer import load_tokenizer
from fastrm.train import evaluation
from fastrm.train.checkpoint import load_checkpoint, save_checkpoint
from fastrm.train.deepspeed_engine import DeepSpeedEngine
from fastrm.train.engine import LocalEngine
from fastrm.train.ranks import joined
from fastrm.train.setup import export_model, make_engine, make_network
from tests.helpers.support import make_image, make_model, make_record, pack_of

IMAGE = make_image(80, 60, 1)
# Odd ones with an image, even ones without; of different sizes.
RECORDS = [make_record(n, num_responses=2 + n % 3, images=[IMAGE] if n % 2 else (), prompt_words=8) for n in range(8)]
# Numbers of the packs of each of two ranks; None where a rank has none.
DIVISIONS = {
    "mixed": ([0, 1, 2, 3], [4, 5, 6, 7]),
    "text on rank 0, images on rank 1": ([0, 2, 4, 6], [1, 3, 5, 7]),
    "nothing on rank 1": (list(range(8)), [None] * 8),
}


def train(config: str, resume: str = "no", *overrides: str) -> dict:
    return fastrm.train.loop.train(load_config(config, overrides), resume)


def make_config(stage: int, dtype: str = "fp32", paradigm: str = "reward") -> Config:
    return Config.model_validate(
        {
            "paradigm": paradigm,
            "model": {"init": {"model_type": "qwen2_5_vl"}, "tokenizer": "unused"},
            # Without this term the head's last bias would have no gradient.
            "loss": {"center": 0.1} if paradigm != "judge" else {},
            "optim": {"lr": 1e-3, "weight_decay": 0.1, "max_grad_norm": 0.1},
            "precision": {"dtype": dtype},
            "engine": {"zero_stage": stage},
        }
    )


def make_packs(network) -> list:
    if network.paradigm != "reward":
        network.encoder.turns = TurnLoss(per_token=network.paradigm == "judge")
    return [pack_of(network, [record]) for record in RECORDS]


def take_step(engine, packs: list, step: int = 0):
    for pack in packs:
        engine.accumulate(pack)
    return engine.update(1e-3, step)


class Bench:
    """An engine with its packs, and what it has come to, by name."""

    def __init__(
        self, ranks, stage: int, *, family: str = "qwen2_5_vl", pooling: str = "anchor", frozen=(), dtype: str = "fp32",
        options: dict | None = None, divide_all: bool = False, paradigm: str = "reward",
    ):  # fmt: skip
        network = make_model(family, pooling=pooling, paradigm=paradigm)
        network.freeze(frozen)
        for method, arguments in (options or {}).items():
            getattr(network, method)(*arguments)
        self.packs = make_packs(network)
        if divide_all and ranks.num_ranks > 1:
            _divide_small_weights_too()
        self.engine = make_engine(network, make_config(stage, dtype, paradigm), ranks)
        self.ranks = ranks
        self.initial = self.weights()
        self.found: dict[str, torch.Tensor] = {}

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.engine.model_tensors()}

    def states(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.engine.optimizer_tensors()}

    def mine(self, division: str) -> list:
        """This rank's packs; all of them where there is one rank."""
        numbers = DIVISIONS[division]
        numbers = range(8) if self.ranks.num_ranks == 1 else numbers[self.ranks.rank]
        return [None if number is None else self.packs[number] for number in numbers]

    def begin_again(self) -> None:
        self.engine.load_tensors(self.initial, {})

    def keep(self, name: str, update) -> None:
        """What all ranks agree about after a step."""
        assert set(map(repr, self.ranks.gather(update))) == {repr(update)}  # nan is not equal to itself
        numbers = torch.tensor([update.loss, update.grad_norm, update.finite], dtype=torch.float64)
        self.found[f"{name}/update"] = numbers
        self.found |= {f"{name}/state/{key}": tensor for key, tensor in self.states().items()}
        self.found |= {f"{name}/weight/{key}": tensor for key, tensor in self.weights().items()}

    def write(self, path: str) -> None:
        if self.ranks.is_first:
            save_file({name: tensor.contiguous() for name, tensor in self.found.items()}, path)


def _divide_small_weights_too() -> None:
    """ZeRO-3 keeps weights of up to 100,000 elements whole on every rank: all of a tiny model's, unless it is told."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    initialize = deepspeed.initialize

    def initialize_divided(*, config: dict, **arguments):
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return initialize(config=config, **arguments)

    deepspeed.initialize = initialize_divided


def gradients(stage: int, out: str, settings: dict) -> None:
    """A first step of each division: AdamW's first moment is then a tenth of the clipped gradient."""
    with joined("cpu") as ranks:
        bench = Bench(ranks, stage, **settings)
        for division in DIVISIONS:
            bench.keep(division, take_step(bench.engine, bench.mine(division)))
            bench.begin_again()
        bench.write(out)


def mishaps(stage: int, checkpoint: str, out: str) -> None:
    """Steps that come to nothing, each followed by an ordinary one; then checkpoints both ways."""
    with joined("cpu") as ranks:
        bench = Bench(ranks, stage)
        bench.keep("plain", take_step(bench.engine, bench.mine("mixed")))
        for mishap in (_infinite_loss, _infinite_gradient, _discarded, _all_refused):
            bench.begin_again()
            bench.keep(mishap.__name__, mishap(bench))
            bench.keep(f"after {mishap.__name__}", take_step(bench.engine, bench.mine("mixed")))
        take_step(bench.engine, bench.mine("text on rank 0, images on rank 1"))
        save_checkpoint(Path(out).parent, 2, bench.engine, {}, ranks)
        bench.keep("saved", take_step(bench.engine, bench.mine("mixed")))
        load_checkpoint(Path(checkpoint), bench.engine)
        bench.found |= {f"loaded/state/{name}": tensor for name, tensor in bench.states().items()}
        bench.found |= {f"loaded/weight/{name}": tensor for name, tensor in bench.weights().items()}
        bench.keep("after loading", take_step(bench.engine, bench.mine("mixed")))
        bench.write(out)


def _infinite_loss(bench: Bench):
    packs = bench.mine("mixed")
    if bench.ranks.rank == bench.ranks.num_ranks - 1:
        packs[2] = replace(packs[2], margin=torch.full_like(packs[2].margin, float("inf")))
    return take_step(bench.engine, packs)


def _infinite_gradient(bench: Bench):
    packs, parameter = bench.mine("mixed"), bench.engine.network.score[0].bias
    last = bench.ranks.rank == bench.ranks.num_ranks - 1
    handle = parameter.register_hook(lambda gradient: gradient * float("nan") if last else gradient)
    done = take_step(bench.engine, packs)
    handle.remove()
    return done


def _discarded(bench: Bench):
    for pack in bench.mine("mixed")[:2]:
        bench.engine.accumulate(pack)
    bench.engine.discard()
    return take_step(bench.engine, [None])


def _all_refused(bench: Bench):
    return take_step(bench.engine, [None, None])


def load(config: str, tiny: str, out: str) -> None:
    """A network from files: each rank's peak of memory while it is made, over what was there; then what it holds."""
    # glibc gives blocks of 32 MiB, which most matrices of real models have, memory of their own and takes it back; that
    # of smaller ones it keeps. M_MMAP_THRESHOLD (-3) makes that 1 MiB.
    ctypes.CDLL(None).mallopt(-3, 2**20)
    with joined("cpu") as ranks:
        settings = load_config(config)
        tokenizer = load_tokenizer(settings.model.path)
        make_network(load_config(config, [f"model.path={tiny}"]), tokenizer, ranks)  # imports, buffers of gloo
        reset_peak()
        before = status_bytes("VmRSS")
        network = make_network(settings, tokenizer, ranks)
        peaks = ranks.gather(status_bytes("VmHWM") - before)
        engine = make_engine(network, settings, ranks)
        # A copy each: what is gathered is valid until the next.
        found = {name: tensor.clone() for name, tensor in engine.model_tensors()}
        rewards = engine.rewards(pack_of(network, [make_record(1)]))
        export_model(engine, Path(out) / "model", ranks)
        if ranks.is_first:
            save_file({"peaks": torch.tensor(peaks), "rewards": rewards.detach(), **found}, Path(out) / "found")


def is_last_rank() -> bool:
    return os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)


def train_with_an_infinite_loss(config: str) -> None:
    """The second step's loss is infinite on the last rank, or on the only one."""
    for engine in (LocalEngine, DeepSpeedEngine):
        engine.loss_and_rewards = _infinite_in_the_second_step(engine.loss_and_rewards, engine)
    train(config)


def _infinite_in_the_second_step(loss_and_rewards, engine):
    steps, update = [], engine.update

    def count(self, lr, step):
        steps.append(step)
        return update(self, lr, step)

    def loss_of_step(self, pack):
        loss, rewards = loss_and_rewards(self, pack)
        return loss * (float("inf") if len(steps) == 1 and is_last_rank() else 1), rewards

    engine.update = count
    return loss_of_step


def train_and_stop_in_an_evaluation(config: str) -> None:
    """The last rank alone is asked to stop, at its second pack of the first evaluation."""
    run_packs = evaluation.run_packs

    def stop(*arguments, **options):
        for number, loaded in enumerate(run_packs(*arguments, **options)):
            if number == 1 and is_last_rank():
                os.kill(os.getpid(), signal.SIGTERM)
            yield loaded

    evaluation.run_packs = stop
    train(config)

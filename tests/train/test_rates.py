"""Learning rates: schedules against those of transformers, and rates by part against runs with that rate throughout."""

import json

import pytest
import torch
from transformers import get_scheduler

from fastrm.config import Config, OptimConfig
from fastrm.errors import ConfigError
from fastrm.train.engine import LocalEngine
from fastrm.train.metrics import read_rows
from fastrm.train.optim import check_lr_parts, learning_rate
from fastrm.train.resume import check_config
from tests.helpers.runs import fastrm_here, run, text_rows, tiny_config, write_rows
from tests.helpers.support import make_image, make_model, make_record, pack_of

LR = 3e-4
SCHEDULES = {
    "constant": ({"schedule": "constant"}, "constant_with_warmup", {}),
    "cosine": ({"schedule": "cosine"}, "cosine", {}),
    "cosine to a minimum": ({"schedule": "cosine", "min_lr_ratio": 0.2}, "cosine_with_min_lr", {"min_lr_rate": 0.2}),
    "linear": ({"schedule": "linear"}, "linear", {}),
    "linear to a minimum": ({"schedule": "linear", "min_lr_ratio": 0.2}, "polynomial", {"lr_end": 0.2 * LR}),
    "wsd": ({"schedule": "wsd", "decay_ratio": 0.3}, "warmup_stable_decay", {}),
    "wsd to a minimum": (
        {"schedule": "wsd", "decay_ratio": 0.3, "min_lr_ratio": 0.2}, "warmup_stable_decay", {"min_lr_ratio": 0.2},
    ),
}  # fmt: skip


def transformers_rates(name, num_steps, num_warmup, **options):
    """The rates of the steps by transformers' scheduler, the first of rate 0 left out of its warm-up."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler = get_scheduler(name, optimizer, num_warmup, num_steps, scheduler_specific_kwargs=options)
    rates = []
    for _ in range(num_steps + 1):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates[1 : num_warmup + 1] + rates[num_warmup:num_steps]


@pytest.mark.parametrize("num_steps, num_warmup", [(20, 4), (50, 0), (10, 2)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_is_that_of_transformers(name, num_steps, num_warmup):
    settings, theirs, options = SCHEDULES[name]
    settings = OptimConfig(lr=LR, warmup_ratio=num_warmup / num_steps, **settings)
    if settings.schedule == "wsd":
        options = {**options, "num_decay_steps": round(0.3 * num_steps)}
    wanted = transformers_rates(theirs, num_steps, num_warmup, **options)
    found = [learning_rate(step, num_steps, settings) for step in range(num_steps)]
    # Transformers' wsd warms up from its minimum, and ours from 0, as its other schedules do.
    first = num_warmup if "min_lr_ratio" in options else 0
    assert len(wanted) == num_steps and found[first:] == pytest.approx(wanted[first:], rel=1e-12)
    assert max(found) == pytest.approx(LR) and (min(found) > 0.0)


def test_stages_of_wsd_longer_than_the_run_are_refused():
    with pytest.raises(ValueError, match=r"warmup_ratio 0\.6 and optim\.decay_ratio 0\.5 are more than all steps"):
        OptimConfig(schedule="wsd", warmup_ratio=0.6, decay_ratio=0.5)


def make_config(states="fp32", weights="auto", freeze=(), **optim) -> Config:
    return Config.model_validate(
        {
            "model": {"init": {"model_type": "qwen2_5_vl"}, "tokenizer": "unused", "freeze": list(freeze)},
            "optim": {"lr": 1e-3, "weight_decay": 0.1, "states": states, **optim},
            "precision": {"weights": weights},
        }
    )


def steps_of(rate, num_steps=2, engine=None, **config):
    """(engine, its weights) after some steps on two packs, at a rate."""
    if engine is None:
        engine = LocalEngine(make_model("qwen2_5_vl"), make_config(**config))
    packs = [pack_of(engine.network, [make_record(n, images=[make_image(80, 60, n)])]) for n in range(2)]
    for step in range(num_steps):
        for pack in packs:
            engine.accumulate(pack)
        assert engine.update(rate, step).finite
    return engine, {name: tensor.clone() for name, tensor in engine.model_tensors()}


@pytest.mark.parametrize("states, weights", [("fp32", "auto"), ("8bit", "auto"), ("fp32", "bf16"), ("8bit", "bf16")])
def test_a_part_is_trained_at_its_own_rate(states, weights):
    """After one step each weight is that of a step at its part's rate throughout, to the bit."""
    parts = {"head": 1e-2, "vision": 1e-4, "projector": 2e-3}
    engine, found = steps_of(1e-3, 1, states=states, weights=weights, lr_parts=parts)
    wanted = {rate: steps_of(rate, 1, states=states, weights=weights)[1] for rate in (1e-3, *parts.values())}
    network = engine.network
    members = {part: network.parameters_of(part) for part in ("language", "vision", "projector", "head")}
    assert sum(map(len, members.values())) == len(list(network.parameters()))
    for name, parameter in network.named_parameters():
        part = next(part for part, own in members.items() if parameter in own)
        assert torch.equal(found[name], wanted[parts.get(part, 1e-3)][name]), name
    assert len({float(tensors["score.0.weight"][0, 0]) for tensors in wanted.values()}) == 4


def test_checkpoints_do_not_depend_on_the_parts():
    """States are stored by the name of the weight: a run goes on with its parts, to the bit."""
    parts = {"head": 1e-2}
    engine, wanted = steps_of(1e-3, 1, lr_parts=parts)
    model = {name: tensor.clone() for name, tensor in engine.model_tensors()}
    states = {name: tensor.clone() for name, tensor in engine.optimizer_tensors()}
    _, wanted = steps_of(1e-3, 1, engine)
    resumed = LocalEngine(make_model("qwen2_5_vl", seed=1), make_config(lr_parts=parts))
    resumed.load_tensors(model, states)
    _, found = steps_of(1e-3, 1, resumed)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_rates_of_parts_follow_the_schedule_and_are_logged(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", text_rows(16))
    optim = {"lr_parts": {"head": 5e-3, "language": 5e-4}, "schedule": "linear"}
    run(tiny_config(tmp_path, data, optim=optim, run={"max_steps": 4}))
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["lr"] for row in rows] == pytest.approx([1e-3, 1e-3, 2e-3 / 3, 1e-3 / 3])
    for row in rows:
        assert row["lr/head"] == pytest.approx(5 * row["lr"]) and row["lr/language"] == pytest.approx(row["lr"] / 2)
        assert "lr/vision" not in row


@pytest.mark.parametrize(
    "parts, freeze, message",
    [
        ({"vision": 1e-6}, ["vision"], "optim.lr_parts: vision has a learning rate, but model.freeze takes it out"),
        ({"tower": 1e-6}, [], "optim.lr_parts.tower"),
        ({"head": 0.0}, [], "optim.lr_parts.head: got 0.0"),
    ],
    ids=["frozen", "unknown", "zero"],
)
def test_a_rate_that_cannot_be_is_refused(tmp_path, capfd, parts, freeze, message):
    path = tiny_config(tmp_path, "digits:eval", optim={"lr_parts": parts}, model={"freeze": freeze})
    code, said = fastrm_here(capfd, "train", path)
    assert code == 64 and message in said and json.loads(said.splitlines()[-1])["error"] == "ConfigError"


def test_a_part_that_the_model_lacks_or_does_not_train_is_refused():
    with pytest.raises(ConfigError, match=r"optim\.lr_parts: qwen2 has no vision tower; name language and head only"):
        check_lr_parts(make_model("qwen2"), OptimConfig(lr_parts={"vision": 1e-6}))
    network = make_model("qwen2")
    network.model.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"optim\.lr_parts: no weight of language is trained; leave language out"):
        check_lr_parts(network, OptimConfig(lr_parts={"language": 1e-6}))


def test_a_run_goes_on_from_a_checkpoint_that_is_older_than_a_setting():
    saved = make_config(lr_parts={"head": 1e-2}).model_dump(mode="json")
    del saved["optim"]["decay_ratio"]
    check_config(saved, make_config(lr_parts={"head": 1e-2}))
    with pytest.raises(ConfigError, match=r"optim\.lr_parts\.head: 0\.01 in the checkpoint, 0\.02 now"):
        check_config(saved, make_config(lr_parts={"head": 2e-2}))
    with pytest.raises(ConfigError, match=r"optim\.decay_ratio: 0\.1 in the checkpoint, 0\.2 now"):
        check_config(saved, make_config(lr_parts={"head": 1e-2}, decay_ratio=0.2))

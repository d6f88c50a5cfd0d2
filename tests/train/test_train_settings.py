"""Settings of a training run: each changes what it says, and nothing else."""

import json

import pytest
import torch
from safetensors.torch import load_file

from fastrm.errors import DataError
from fastrm.train.metrics import read_rows
from tests.helpers.runs import run, text_rows, tiny_config, write_rows


def farthest(one, other):
    """Largest difference of two trained states, less the head's last bias: the loss sees differences of
    rewards only, so that bias's gradient is nothing but rounding, which AdamW scales up to full steps."""
    compared = (name for name in one if name != "score.2.bias" and one[name].numel())
    return max((one[name] - other[name]).abs().max() for name in compared)


def test_weights_do_not_depend_on_workers_or_the_token_budget(colours, tmp_path):
    finals = []
    for name, changes in {
        "a": {},
        "b": {"num_workers": 2},
        "c": {"max_tokens_per_group": 512, "tokens_per_pack": 512},
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        optim = {"tokens_per_pack": changes.pop("tokens_per_pack", 2048)}
        path = tiny_config(folder, colours, data=changes, optim=optim)
        run(path)
        finals.append(load_file(folder / "run" / "model" / "model.safetensors"))
    assert all(torch.equal(finals[0][key], finals[1][key]) for key in finals[0])
    assert farthest(finals[0], finals[2]) <= 2e-5


def test_records_of_one_prompt_merge_into_groups(tmp_path):
    rows = [{"prompt": f"q{n // 3}", "chosen": f"good {n}", "rejected": "bad"} for n in range(24)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    results = {}
    for merge in (True, False):
        folder = tmp_path / str(merge)
        folder.mkdir()
        path = tiny_config(folder, data, data={"merge_groups": merge}, run={"max_steps": 3})
        results[merge] = run(path)
    assert results[True]["preferences"] >= results[False]["preferences"] == 24
    assert results[True]["tokens_processed"] < results[False]["tokens_processed"]


@pytest.mark.parametrize("ties, preferences", [("ignore", 8), ("half", 24)])
def test_ties_are_ignored_and_counted_or_trained_as_halves(tmp_path, ties, preferences):
    rows = [
        {"prompt": f"q{n}", "responses": [{"text": t, "score": s} for t, s in (("a", 2), ("b", 1), ("c", 1))]}
        for n in range(6)
    ]
    path = tiny_config(
        tmp_path, write_rows(tmp_path / "rows.jsonl", rows), loss={"ties": ties}, run={"max_steps": 1},
        optim={"batch_pairs": 8 if ties == "ignore" else 24},
    )  # fmt: skip
    assert run(path)["preferences"] == preferences


def test_group_weight_counts_each_group_once(tmp_path):
    from fastrm.config import Config
    from fastrm.data.group import resolve_preferences
    from tests.helpers.support import make_record

    config = Config.model_validate({"model": {"path": "x"}, "optim": {"group_weight": "group"}})
    record, _ = resolve_preferences(make_record(0, num_responses=4), config)
    assert sum(p.weight for p in record.preferences) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "section, key, value",
    [
        ("loss", "center", 0.1), ("loss", "label_smoothing", 0.2), ("loss", "length_normalization", True),
        ("optim", "lr", 5e-3), ("optim", "betas", [0.5, 0.9]), ("optim", "eps", 1e-2), ("optim", "weight_decay", 1.0),
        ("optim", "schedule", "constant"), ("optim", "schedule", "linear"), ("optim", "schedule", "wsd"),
        ("optim", "warmup_ratio", 0.9), ("optim", "min_lr_ratio", 0.9), ("optim", "lr_parts", {"projector": 1e-5}),
        ("optim", "max_grad_norm", 1e-3), ("optim", "batch_pairs", 3), ("optim", "group_weight", "group"),
        ("run", "seed", 1), ("precision", "dtype", "bf16"), ("model", "anchor", "end_of_turn"),
        ("model", "head", {"layers": 3}), ("model", "head", {"activation": "tanh"}), ("model", "head", {"bias": False}),
        ("model", "freeze", ["language"]), ("data", "min_pixels", 28 * 28 * 9), ("data", "max_pixels", 28 * 28),
    ],
    ids=lambda value: str(value),
)  # fmt: skip
def test_every_setting_changes_the_trained_model(finished_plain, colours, tmp_path, section, key, value):
    changes = {section: {key: value}}
    if key == "min_pixels":
        changes["data"]["max_pixels"] = 28 * 28 * 16
    path = tiny_config(tmp_path, colours, **changes)
    run(path)
    changed = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert changed.keys() != finished_plain.keys() or any(
        changed[name].shape != finished_plain[name].shape or not torch.equal(changed[name], finished_plain[name])
        for name in changed
    )


@pytest.fixture(scope="module")
def finished_plain(colours, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    run(tiny_config(folder, colours))
    return load_file(folder / "run" / "model" / "model.safetensors")


def test_settings_of_memory_and_sharing_do_what_they_say(finished_plain, colours, tmp_path):
    """These change how much is computed or kept, and must not change what is learned."""
    results = {}
    for name, changes in {
        "plain": {},
        "rows": {"data": {"share_prefixes": False}},
        "recomputed": {"model": {"activation_checkpointing": "full"}},
        "partly recomputed": {"model": {"activation_checkpointing": "selective"}},
        "fused": {"model": {"fuse_projections": True}},
        "pruned": {"run": {"save_every": 1, "keep_checkpoints": 3}},
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        results[name] = run(tiny_config(folder, colours, **changes))
        weights = load_file(folder / "run" / "model" / "model.safetensors")
        assert farthest(weights, finished_plain) <= 2e-5, name
    assert results["rows"]["tokens_processed"] > 1.2 * results["plain"]["tokens_processed"]
    assert len(list((tmp_path / "pruned" / "run" / "checkpoints").iterdir())) == 3
    assert len(list((tmp_path / "plain" / "run" / "checkpoints").iterdir())) == 1


@pytest.mark.slow
def test_compiled_layers_train_the_same_model_and_are_counted(colours, tmp_path):
    losses = {}
    for name, count in (("off", None), ("layers", 2)):  # a decoder layer and a vision block; no evaluation
        (tmp_path / name).mkdir()
        path = tiny_config(tmp_path / name, colours)
        path.write_text(f"compile: {name}\n" + path.read_text())
        assert run(path)["compiled_graphs"] == count
        rows = (tmp_path / name / "run" / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(row)["loss"] for row in rows]
    assert len(losses["off"]) == 6
    assert losses["layers"] == pytest.approx(losses["off"], rel=1e-5)


def test_epochs_count_when_there_are_no_max_steps(colours, tmp_path):
    summary = run(tiny_config(tmp_path, colours, run={"max_steps": None, "epochs": 3}))
    assert summary["preferences"] == 3 * 72


@pytest.mark.parametrize("limit", [{"max_image_pixels": 1000}, {"max_image_bytes": 100}], ids=str)
def test_image_limits_refuse_what_is_larger(colours, tmp_path, limit):
    with pytest.raises(DataError, match=r"no usable group .*IMAGE_TOO_LARGE 48"):
        run(tiny_config(tmp_path, colours, data=limit))


def test_source_weight_scales_its_part_of_the_loss(tmp_path):
    heavy = write_rows(tmp_path / "heavy.jsonl", text_rows(8))
    light = write_rows(tmp_path / "light.jsonl", [{**row, "prompt": "q " + row["prompt"]} for row in text_rows(8)])
    finals = []
    for weight in (1.0, 50.0):
        folder = tmp_path / str(weight)
        folder.mkdir()
        sources = [{"path": str(heavy), "weight": weight}, {"path": str(light)}]
        path = tiny_config(folder, heavy, data={"train": sources}, run={"max_steps": 1})
        run(path)
        finals.append(read_rows(folder / "run" / "metrics.jsonl")[0]["grad_norm"])
    assert finals[0] != finals[1]

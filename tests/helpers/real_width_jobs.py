"""What the tests of real widths do in processes of their own (own_process.py)."""

import functools
import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from bench.models.random_model import (
    POOL_ELEMENTS,
    make_config,
    padded_tokenizer,
    published_options,
    random_tensor,
    write_model,
)
from fastrm import cli
from fastrm.config import load_config
from fastrm.data.tokenizer import load_tokenizer
from fastrm.evaluate.reward_model import RewardModel
from fastrm.model.network import RewardNetwork
from fastrm.train.engine import LocalEngine
from fastrm.train.loop import train
from fastrm.train.setup import export_model, make_network
from fastrm_kernels import preference_loss
from tests.helpers import stock
from tests.helpers.real_width_cases import FEW_ROWS, FULL, GROUPS, SMALL_TILE, record_of
from tests.helpers.support import pack_of
from tests.helpers.writers import LOSSES, TURNS, naive, writer_records

# Whole graphs as inductor gets them, without the minutes that it needs for them.
BACKEND = "aot_eager"
# Weights whose gradients are compared: of every kind of product, where the model has it.
COMPARED = (
    "layers.0.self_attn.q_proj.weight", "layers.0.self_attn.k_proj.bias", "layers.0.mlp.down_proj.weight",
    "layers.1.self_attn.v_proj.weight", "layers.1.self_attn.o_proj.weight", "language_model.norm.weight",
    "blocks.0.attn.qkv.weight", "patch_embed.proj.weight", "merger.mlp.0.weight",
    "visual.pos_embed.weight", "visual.merger.linear_fc1.weight", "deepstack_merger_list.0.linear_fc2.weight",
    "encoder.layer.0.attention.q_proj.weight", "multi_modal_projector.linear_1.weight", "score.0.weight",
)  # fmt: skip


def step_and_export(name: str, num_rows: int | None, folder: Path) -> dict:
    """Make two layers of a published model, take a step of the head and the projector, and export.

    With as many rows of the embedding, and InternVL with tiles of SMALL_TILE; or all rows and tiles as published.

    Moments of two whole layers would take longer than all the rest.
    """
    tile = SMALL_TILE if name.startswith("InternVL") and num_rows is not None else None
    write_model(name, folder / "model", layers=2, vocabulary=num_rows, tile=tile)
    gc.collect()
    freeze = "[language]" if name == "Qwen3-8B" else "[vision, language]"
    config = load_config(FULL, [f"model.path={folder / 'model'}", f"model.freeze={freeze}", "precision.weights=bf16"])
    tokenizer = load_tokenizer(config.model.path)
    network = make_network(config, tokenizer)
    engine = LocalEngine(network, config)
    head = network.score[0].weight.detach().clone()
    rewards = engine.accumulate(pack_of(network, [record_of(name)]))
    done = engine.update(1e-4, 0)
    export_model(engine, folder / "export")
    return {
        "im_end": tokenizer.convert_tokens_to_ids("<|im_end|>"), "grad_norm": done.grad_norm,
        "finite": done.finite and bool(rewards.isfinite().all()),
        "head_moved": not torch.equal(network.score[0].weight, head),
    }  # fmt: skip


def compare_with_stock(name: str, folder: Path) -> dict:
    """Rewards and gradients of an export in float32, by stock transformers and by fastrm, and its scores.

    Of the gradients their norms and the norms of their differences, by name.
    """
    # The check of the first rewards is a second comparison with stock, which takes half of this one's time; classifiers
    # (`score_groups`) and whole runs have it at these widths.
    model, record = RewardModel.from_pretrained(folder, dtype="fp32", check_exactness=False), record_of(name)
    network = model.network
    for key, parameter in network.named_parameters():
        parameter.requires_grad_(key.endswith(COMPARED))
    wanted, expected = _rewards_and_gradients(network, lambda: stock.stock_loss(network, [record]))
    network.set_kernels(torch.float32)
    found, gradients = _rewards_and_gradients(network, lambda: _packed_loss(network, record))
    assert gradients.keys() == expected.keys()
    question, texts = record.responses[0].messages[0], [response.text for response in record.responses]
    images = [ref.data for ref in record.responses[0].media]
    group = {"prompt": question.text, "images": images, "responses": texts}
    return {
        "wanted": wanted.tolist(), "found": found.tolist(), "scores": model.score([group])[0],
        "norms": {key: float(gradient.norm()) for key, gradient in expected.items()},
        "errors": {key: float((gradients[key] - gradient).norm()) for key, gradient in expected.items()},
    }  # fmt: skip


def compare_writer_with_stock(paradigm: str, folder: Path) -> dict:
    """Loss, rewards and gradients of a critic or judge of two layers of Qwen2.5-VL-7B, by stock and by fastrm."""
    write_model("Qwen2.5-VL-7B-Instruct", folder, layers=2, vocabulary=FEW_ROWS)
    config = load_config(
        {"paradigm": paradigm, "run": {"dir": "unused"}, "model": {"path": str(folder)}, "precision": {"dtype": "fp32"}}
    )
    network = make_network(config, load_tokenizer(str(folder)))
    network.encoder.turns = TURNS[paradigm]
    for key, parameter in network.named_parameters():
        parameter.requires_grad_(key.endswith((*COMPARED, "lm_head.weight")))
    records = writer_records("qwen2_5_vl", paradigm)[2:]  # two responses about an image
    (total, wanted), expected = _with_gradients(network, lambda: naive(network, records))
    network.set_kernels(torch.float32)
    (parts, found), gradients = _with_gradients(network, lambda: network(pack_of(network, records), LOSSES[paradigm]))
    return {
        "losses": [float(parts.sum()), float(total)], "wanted": wanted.tolist(), "found": found.tolist(),
        "norms": {key: float(gradient.norm()) for key, gradient in expected.items()},
        "errors": {key: float((gradients[key] - gradient).norm()) for key, gradient in expected.items()},
    }  # fmt: skip


def _with_gradients(network, compute):
    """What a function gives, a loss first, without their graph; and the gradients of its sum."""
    loss, rewards = compute()
    loss.sum().backward()
    found = {key: p.grad for key, p in network.named_parameters() if p.grad is not None}
    network.zero_grad(set_to_none=True)
    return (loss.detach(), rewards.detach()), found


def _rewards_and_gradients(network, compute):
    """Rewards (R,) and the compared gradients of a function that gives (loss, rewards)."""
    (_, rewards), found = _with_gradients(network, compute)
    return rewards, found


def _packed_loss(network, record):
    pack = pack_of(network, [record])
    rewards = network(pack)
    return preference_loss(rewards, pack.edges, center=stock.CENTER), rewards


def run_recipe(overrides: list[str], resume: str = "no") -> dict:
    """Train configs/full.yaml with overrides; the summary."""
    RewardNetwork.compile_layers = functools.partialmethod(RewardNetwork.compile_layers, BACKEND)
    return train(load_config(FULL, overrides), resume)


def rewards_of_export(folder: Path) -> dict:
    """Rewards of an export in float32, by stock transformers and by fastrm."""
    network, record = RewardModel.from_pretrained(folder, dtype="fp32").network, record_of("Qwen2.5-VL")
    with torch.no_grad():
        wanted = stock.stock_rewards(network, [record])
        network.set_kernels(torch.float32)
        return {"wanted": wanted.tolist(), "found": network(pack_of(network, [record])).tolist()}


def save_stock_classifier(folder: Path, dtype: torch.dtype) -> dict:
    """Save two layers of Qwen3-8B's widths as a random Qwen3ForSequenceClassification, with nothing but stock calls.

    Returns:
        the name of the class, and its shapes by the names of its weights.
    """
    from transformers import AutoModelForSequenceClassification

    options = published_options("Qwen3-8B", layers=2)
    tokenizer = padded_tokenizer("qwen3", FEW_ROWS, options["vocab_size"] - FEW_ROWS)
    config = make_config(options | {"num_labels": 1}, tokenizer, FEW_ROWS)
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config, dtype=dtype)
    pool = (0.02 * torch.randn(POOL_ELEMENTS, generator=torch.Generator().manual_seed(0))).to(dtype)
    state = {name: random_tensor(name, tuple(weight.shape), pool) for name, weight in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"kind": type(model).__name__, "shapes": {name: tuple(weight.shape) for name, weight in state.items()}}


def score_groups(model: Path, folder: Path) -> list[list[float]]:
    """Score GROUPS by the command line and return the rewards that it writes to `folder`."""
    rows, out = folder / "groups.jsonl", folder / "rewards.jsonl"
    rows.write_text("".join(json.dumps(group) + "\n" for group in GROUPS))
    code = run_command(cli.main, folder, ["fastrm", "score", str(model), str(rows), "--out", str(out)])
    assert not code, code
    return [json.loads(line)["rewards"] for line in out.read_text().splitlines()]


@torch.no_grad()
def classify(folder: Path, dtype: torch.dtype) -> list[list[float]]:
    """Rewards of GROUPS from the stock class, each conversation alone."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype).eval()

    def reward(prompt: str, response: str) -> float:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        tokens = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)
        return float(model(**tokens).logits)

    return [[reward(group["prompt"], response) for response in group["responses"]] for group in GROUPS]


def run_command(main: Callable[[], object], folder: Path, arguments: list[str]) -> int | str | None:
    """Call the entry of a program in a folder, with these arguments after its name; what it leaves with."""
    os.chdir(folder)
    sys.argv = arguments
    try:
        return main()
    except SystemExit as leave:
        return leave.code

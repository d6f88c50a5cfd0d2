"""Widths of real models, two layers deep: what toy sizes hide.

Hidden sizes, heads, head dimensions, vocabularies and token ids are the published ones (bench/random_model.py). Each
family loads, takes a step, is exported, and scores as stock transformers scores it, on one thread in less than 8 GB.
Whole runs are in test_real_widths_runs.py.
"""

import pytest
import torch

import stock
from fastrm.config import load_config
from fastrm.data.tokenizer import load_tokenizer
from fastrm.model.reward_model import RewardModel
from fastrm.train.engine import LocalEngine
from fastrm.train.setup import export_model, make_network
from fastrm_kernels import preference_loss
from random_model import SPECIAL_IDS, write_model
from real_width_cases import FULL, assert_rewards, record_of
from support import pack_of

pytestmark = pytest.mark.real_widths
# Weights whose gradients are compared: of every kind of product, where the model has it.
COMPARED = (
    "layers.0.self_attn.q_proj.weight", "layers.0.self_attn.k_proj.bias", "layers.0.mlp.down_proj.weight",
    "layers.1.self_attn.v_proj.weight", "layers.1.self_attn.o_proj.weight", "language_model.norm.weight",
    "blocks.0.attn.qkv.weight", "patch_embed.proj.weight", "merger.mlp.0.weight",
    "encoder.layer.0.attention.q_proj.weight", "multi_modal_projector.linear_1.weight", "score.0.weight",
)  # fmt: skip


def rewards_and_gradients(network, compute):
    """Rewards (R,) and the compared gradients of a function that gives (loss, rewards)."""
    loss, rewards = compute()
    loss.backward()
    found = {key: p.grad for key, p in network.named_parameters() if p.grad is not None}
    network.zero_grad(set_to_none=True)
    return rewards.detach(), found


def packed(network, records):
    pack = pack_of(network, records)
    rewards = network(pack)
    return preference_loss(rewards, pack.edges, center=stock.CENTER), rewards


@pytest.mark.parametrize("name", ["Qwen2.5-VL-7B-Instruct", "Qwen2-VL-7B-Instruct", "InternVL3-8B-hf", "Qwen3-8B"])
def test_real_widths_load_step_export_and_score_exactly(name, tmp_path):
    """The step trains the head and the projector: moments of two whole layers take longer than all the rest."""
    write_model(name, tmp_path / "model", layers=2)
    freeze = "[language]" if name == "Qwen3-8B" else "[vision, language]"
    config = load_config(FULL, [f"model.path={tmp_path / 'model'}", f"model.freeze={freeze}", "precision.weights=bf16"])
    tokenizer = load_tokenizer(config.model.path)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == SPECIAL_IDS["<|im_end|>"] == 151_645
    network, record = make_network(config, tokenizer), record_of(name)
    engine = LocalEngine(network, config)
    head = network.score[0].weight.detach().clone()
    rewards = engine.accumulate(pack_of(network, [record]))
    done = engine.update(1e-4, 0)
    assert done.finite and done.grad_norm > 0 and rewards.isfinite().all()
    assert not torch.equal(network.score[0].weight, head)
    export_model(engine, tmp_path / "export")
    del engine, network

    model = RewardModel.from_pretrained(tmp_path / "export", dtype="fp32")
    network = model.network
    for key, parameter in network.named_parameters():
        parameter.requires_grad_(key.endswith(COMPARED))
    wanted, expected = rewards_and_gradients(network, lambda: stock.stock_loss(network, [record]))
    network.use_kernels(torch.float32)
    found, gradients = rewards_and_gradients(network, lambda: packed(network, [record]))
    assert_rewards(found, wanted)
    assert gradients.keys() == expected.keys() and len(gradients) >= 6
    for key, gradient in expected.items():
        assert gradient.norm() > 0, f"{key}: the oracle's gradient is zero"
        assert (gradients[key] - gradient).norm() <= 1e-4 * gradient.norm(), key
    question, texts = record.responses[0].messages[0], [response.text for response in record.responses]
    images = [ref.data for ref in record.responses[0].media]
    group = {"prompt": question.text, "images": images, "responses": texts}
    assert_rewards(torch.tensor(model.score([group])[0]), wanted)

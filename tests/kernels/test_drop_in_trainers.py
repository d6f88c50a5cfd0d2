"""A fused head inside what trains and saves it: DistributedDataParallel, transformers, TRL's RewardTrainer."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from fastrm_kernels.preference_head.drop_in import FusedRewardHead, fuse_reward_head
from kernel_cases.drop_in_models import WIDTH, assert_near, assert_same_run, impls, make, run, tokens_of
from tests.helpers.support import make_tokenizer, words


def test_attributes_that_trainers_read_stay():
    model = fuse_reward_head(make("score-linear-bias")[0].half())
    assert model.score.weight.dtype == model.score.bias.dtype == torch.float16
    assert (model.score.in_features, model.score.out_features) == (WIDTH, 1)
    model = fuse_reward_head(make("score-linear")[0])
    assert model.score.bias is None
    model = fuse_reward_head(make("score-tanh")[0])
    assert model.score[0].weight is dict(model.named_parameters())["score.0.weight"]
    assert model.score[-1].out_features == 1 and model.score.in_features == WIDTH
    model = fuse_reward_head(make("trl-value-head")[0])
    assert model.v_head.summary.weight.device.type == "cpu"
    assert "in_features=16, activation=none, impl=auto" in repr(model.v_head)


def test_ddp_takes_a_fused_model_and_a_wrapped_one_is_refused(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        stock, _ = make("score-tanh")
        ddp = nn.parallel.DistributedDataParallel(fuse_reward_head(copy.deepcopy(stock)))
        assert_same_run(run(ddp, tokens_of()), run(stock, tokens_of()))
        found = r"DistributedDataParallel has no reward head, found module \(.*Backbone\)"
        with pytest.raises(ValueError, match=found + "; model.module has one: call fuse_reward_head on that, before"):
            fuse_reward_head(nn.parallel.DistributedDataParallel(stock))
    finally:
        torch.distributed.destroy_process_group()


SIZES = {
    "Qwen2": {"intermediate_size": 48, "num_key_value_heads": 1},
    "GPT2": {},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 24},
    "Bert": {"intermediate_size": 48},
}


def tiny_classifier(kind, tokenizer, **settings):
    """A random stock *ForSequenceClassification for CPU, seeded."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id, **{"num_labels": 1, **SIZES[kind], **settings},
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3.0)
    return model


@impls
@pytest.mark.parametrize("kind", ["Qwen2", "GPT2", "OPT"])
def test_transformers_classes_pool_and_save_as_before(kind, impl, tmp_path):
    tokenizer = make_tokenizer()
    stock = tiny_classifier(kind, tokenizer)
    fused = fuse_reward_head(copy.deepcopy(stock), impl)
    texts = ["the cat sits", "no", "is this a red dog on the blue cat yes so"]
    alone = [stock(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts]
    for side in ("left", "right"):
        tokenizer.padding_side = side
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        logits = fused(**batch).logits
        assert_near(logits, stock(**batch).logits, 1e-5)
        # OPT and GPT2 number positions from the left edge: only Qwen2 is exact there.
        if side == "right" or kind == "Qwen2":
            assert_near(logits, torch.stack(alone), 1e-5)
    assert fused.dtype == torch.float32 and fused.score.weight is fused.get_parameter("score.weight")
    fused.save_pretrained(tmp_path)
    loaded, info = type(stock).from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded.score) is nn.Linear and not any(info.values()), info
    assert_near(loaded(**batch).logits, logits, 1e-5)
    assert_near(fuse_reward_head(loaded, impl)(**batch).logits, logits, 0.0)


def test_transformers_classes_with_another_head_are_refused():
    tokenizer = make_tokenizer()
    words = r"^Qwen2ForSequenceClassification.score: found nn.Linear\(32, 2\) with 2 outputs, wanted 1. Supported heads"
    with pytest.raises(ValueError, match=words):
        fuse_reward_head(tiny_classifier("Qwen2", tokenizer, num_labels=2))
    words = r"^BertForSequenceClassification has no reward head, found bert .*, classifier \(nn.Linear\(32, 1\)\)"
    with pytest.raises(ValueError, match=words):
        fuse_reward_head(tiny_classifier("Bert", tokenizer))


def train_with_trl(model, tokenizer, folder, steps=4, **settings):
    """RewardTrainer on raw messages, nothing of it changed; returns its log entry of every step."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    rng = np.random.default_rng(0)

    def messages():
        answer = {"role": "assistant", "content": words(rng, int(rng.integers(1, 9)))}
        return [{"role": "user", "content": words(rng, 4)}, answer]

    arguments = RewardConfig(
        str(folder), per_device_train_batch_size=2, max_steps=steps, save_steps=steps, logging_steps=1,
        learning_rate=1e-2, use_cpu=True, report_to="none", disable_tqdm=True, **settings,
    )  # fmt: skip
    rows = Dataset.from_list([{"chosen": messages(), "rejected": messages()} for _ in range(2 * steps)])
    trainer = RewardTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    ("impl", "settings"),
    [
        ("eager", {"bf16": False}),
        ("triton", {"bf16": False}),
        # TRL's default is bf16 autocast, in which Triton's interpreter cannot multiply.
        ("eager", {}),
    ],
    ids=["eager", "triton", "eager-autocast"],
)
def test_trl_reward_trainer_takes_the_same_steps(impl, settings, tmp_path):
    pytest.importorskip("trl")
    tokenizer = make_tokenizer()
    stock = tiny_classifier("Qwen2", tokenizer)
    fused = fuse_reward_head(copy.deepcopy(stock), impl)
    before = stock.score.weight.detach().clone()
    wanted = train_with_trl(stock, tokenizer, tmp_path / "stock", **settings)
    got = train_with_trl(fused, tokenizer, tmp_path / "fused", **settings)
    assert isinstance(fused.score, FusedRewardHead) and len(got) == len(wanted) == 4
    for name in ("loss", "grad_norm", "mean_reward", "margin"):
        assert_near(*(torch.tensor([entry[name] for entry in log]) for log in (got, wanted)), 2e-5)
    assert_near(fused.score.weight, stock.score.weight, 2e-5)
    assert (stock.score.weight - before).abs().max() > 0.01
    loaded = type(stock).from_pretrained(tmp_path / "fused" / "checkpoint-4")
    assert type(loaded.score) is nn.Linear
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, fused.state_dict()[name]), name

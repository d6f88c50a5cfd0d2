"""SmolLM2's GGUF file becomes a folder that stock transformers and fastrm read; the check sees a wrong one."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.pretrained.convert import ConversionError, check, convert
from fastrm.model.loading import load_backbone
from tests.helpers.smollm2 import needs_smollm2

pytestmark = needs_smollm2


def test_the_model_knows_english_and_an_answer(smollm2_folder):
    lines = check(smollm2_folder)
    assert "perplexity" in lines[0] and "Paris" in lines[1]


def test_the_folder_has_stock_names_and_ties_its_embeddings(smollm2_folder):
    config = json.loads((smollm2_folder / "config.json").read_text())
    assert config["model_type"] == "llama" and "quantization_config" not in config
    assert config["tie_word_embeddings"] and config["head_dim"] == 64
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (9, 3)
    state = load_file(smollm2_folder / "model.safetensors")
    assert "lm_head.weight" not in state and all(tensor.dtype == torch.float32 for tensor in state.values())
    backbone = load_backbone(str(smollm2_folder))
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, state[f"model.{name}"]), name


def test_the_tokenizer_splits_each_digit_before_all_else(smollm2_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    assert tokenizer("In  2024:\n\n1. a").tokens() == ["In", "ĠĠ", "2", "0", "2", "4", ":", "ĊĊ", "1", ".", "Ġa"]
    turns = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_the_check_sees_rows_of_q_and_k_in_the_order_of_llama_cpp(smollm2_folder, tmp_path):
    """The two conventions of RoPE: halves of a head, or neighbours. A reader that does not reorder gives this model."""
    folder = tmp_path / "model"
    shutil.copytree(smollm2_folder, folder)
    state = load_file(folder / "model.safetensors")
    for name, weight in state.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            halves = weight.unflatten(0, (-1, 2, 32))
            state[name] = halves.transpose(1, 2).flatten(0, 2).contiguous()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match="does not know what it should"):
        check(folder)


def test_a_file_that_is_no_gguf_is_refused_and_nothing_is_written(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"not a model" * 10)
    with pytest.raises(ConversionError, match="not a GGUF file"):
        convert(file, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]

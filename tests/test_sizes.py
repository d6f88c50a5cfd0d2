"""Counts, FLOPs and bytes of real models and real data, against Python's integers, which have no width."""

from fractions import Fraction

import pytest

from fastrm.data.group import PreparedGroup, encode_group
from fastrm.data.tree import causal_pairs
from fastrm.model.architectures import PUBLISHED
from fastrm.train.data import make_tokenizer
from fastrm.train.setup import find_backbone_config, make_data_encoder
from fastrm.train.step_cost import make_cost_model
from prepared_sets import Made, config_of
from runs import colour_rows, text_rows, write_rows

# A dense model of about 235 billion parameters; FLOPs per token beyond 2^40.
WIDE_235B = {
    "model_type": "qwen2_5_vl",
    "text_config": {
        **PUBLISHED["Qwen2.5-VL-72B-Instruct"].options["text_config"],
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_hidden_layers": 72,
        "num_attention_heads": 128,
        "num_key_value_heads": 16,
    },
    "vision_config": {"hidden_size": 1280, "intermediate_size": 3456, "out_hidden_size": 16384},
}
# Of 0.1 billion parameters: products that wrap without an error.
SMALL = {
    "model_type": "qwen2_5_vl",
    "text_config": {
        **PUBLISHED["Qwen2.5-VL-3B-Instruct"].options["text_config"],
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
    },
    "vision_config": {"hidden_size": 320, "intermediate_size": 640, "num_heads": 4, "out_hidden_size": 768},
}
ARCHITECTURES = {
    "0.1B": SMALL,
    "3B": PUBLISHED["Qwen2.5-VL-3B-Instruct"].options,
    "7B": PUBLISHED["Qwen2.5-VL-7B-Instruct"].options,
    "72B": PUBLISHED["Qwen2.5-VL-72B-Instruct"].options,
    "235B": WIDE_235B,
    "InternVL3-8B": PUBLISHED["InternVL3-8B-hf"].options,
}


def ranked_rows(count: int) -> list[dict]:
    """Prompts of four ranked responses: six preferences each."""
    pairs = [[i, j] for i in range(4) for j in range(i + 1, 4)]
    texts = ["very good indeed", "rather good", "not so good", "bad"]
    return [
        {"id": f"r{n}", "prompt": f"Rank answer number {n}, please.", "responses": texts, "preferences": pairs}
        for n in range(count)
    ]


def exact_sharing(made: Made) -> tuple[int, int, Fraction]:
    """Tokens of an epoch, tokens of a pairwise trainer, and the quotient of their FLOPs, group by group."""
    architecture = find_backbone_config(made.config.model)
    cost = make_cost_model(architecture, made.config.model)
    encoder = make_data_encoder(made.config, architecture, make_tokenizer(made.config))
    tokens = unshared_tokens = shared = unshared = 0
    for record in made.train.records:
        group = encode_group(record, encoder)
        counted = PreparedGroup.of(group)
        tokens += counted.num_tokens
        shared += Fraction(cost.of_group(counted))
        lengths = [len(response.tokens) for response in group.responses]
        pictures = sum(Fraction(cost.of_image(*size)) for _, *size in counted.images)
        for preference in group.preferences:
            for length in (lengths[preference.winner], lengths[preference.loser]):
                unshared_tokens += length
                unshared += cost.per_token * length + cost.per_attention_pair * causal_pairs(length) + pictures
    return tokens, unshared_tokens, unshared / shared


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_sharing_of_a_prepared_set_is_exact_at_the_widths_of_real_models(tmp_path, name):
    colour_rows(tmp_path, 12)
    write_rows(tmp_path / "text.jsonl", text_rows(8) + ranked_rows(8))
    sources = [{"path": str(tmp_path / "colours.jsonl")}, {"path": str(tmp_path / "text.jsonl"), "repeat": 2}]
    made = Made(config_of(tmp_path, *sources, model={"init": ARCHITECTURES[name]}))
    tokens, unshared_tokens, speedup = exact_sharing(made)
    sharing = made.report["sharing"]
    assert (sharing["tokens"], sharing["unshared_tokens"]) == (tokens, unshared_tokens)
    assert sharing["sharing_factor"] == unshared_tokens / tokens
    assert sharing["predicted_speedup"] == pytest.approx(float(speedup), rel=1e-12)

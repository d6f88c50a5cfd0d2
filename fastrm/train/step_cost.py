"""The costs by which groups are balanced over ranks, derived from a model's configuration.

Configurations, not networks: under ZeRO-3 a rank's parameters are pieces whose shapes say nothing.
The formulas are those of `step_flops`; what depends on the number of responses alone (the head and the
anchors' part of the last layer) is left out, and so is the LM head of a critic or judge.
"""

from fastrm.config import ModelConfig
from fastrm.data.balance import CostModel
from fastrm.model.experts import expert_matrices
from fastrm.model.families import FAMILIES
from fastrm.model.vision.tower import Passes
from fastrm.paradigm_config import Paradigm


def make_cost_model(config, settings: ModelConfig, paradigm: Paradigm = "reward") -> CostModel:
    """Make the cost model of `plan_steps`: FLOPs of forward, backward and recomputation in a training step.

    Args:
        config: the backbone's transformers config.
        settings: says what is trained, and whether layers are computed again.
    """
    trained = {part: part not in settings.freeze for part in ("vision", "projector", "language")}
    full = settings.activation_checkpointing == "full"
    vision = getattr(config, "vision_config", None)
    vision_reached = vision is not None and trained["vision"]
    projector_reached = vision_reached or (vision is not None and trained["projector"])
    language_reached = projector_reached or trained["language"]
    language = Passes(trained["language"], language_reached, full and language_reached)
    costs = _language_costs(config.get_text_config(), language, settings.pooling == "anchor" and paradigm == "reward")
    if vision is not None:
        tower = Passes(trained["vision"], vision_reached, full and vision_reached)
        projector = Passes(trained["projector"], projector_reached, False)
        costs |= FAMILIES[config.model_type].media_costs(config, tower, projector)
    return CostModel(**costs)


def _language_costs(text, passes: Passes, pruned: bool) -> dict:
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    queries, keys = text.num_attention_heads * head_dim, text.num_key_value_heads * head_dim
    key_value = 2 * text.hidden_size * keys
    attention = 2 * text.hidden_size * queries + key_value
    product = text.hidden_size * text.intermediate_size  # gate, up or down
    layers = [
        passes.matrices(attention + sparse, last=0) if (sparse := expert_matrices(text, number)) else
        passes.matrices(attention + 3 * product, last=product)
        for number in range(text.num_hidden_layers - pruned)
    ]  # fmt: skip
    # A pruned last layer computes only keys and values, except for the anchors.
    last_layer = passes.matrices(key_value, last=0) if pruned else 0
    return {
        "per_token": sum(layers) + last_layer,
        "per_attention_pair": len(layers) * passes.attention(queries),
    }

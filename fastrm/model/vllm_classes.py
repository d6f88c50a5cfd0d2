"""An export in the eyes of vLLM: the class that serves it, the name of its head, and what would be read wrongly.

vLLM knows a classifier of one linear layer on the last token of a conversation; of a vision model, the head lies in the
language model and is named so (vllm/model_executor/models/adapters.py, `as_seq_cls_model`). Every other head is served
by the plugin in kernels/vllm_plugin, whose classes begin with Fastrm. Names and behaviour are those of vLLM 0.32.
"""

from dataclasses import dataclass
from pathlib import Path

from fastrm.errors import ConfigError
from fastrm.model.families import FAMILIES, STEMS, VISION_FAMILIES
from fastrm.model.network import RewardNetwork
from fastrm.model.stock_classes import StockReading, anchors_end, read_by_stock
from fastrm.model.text import IN_VLLM

# Names of the plugin's classes begin with it; those that need a whole conversation at once, with WHOLE.
_PLUGIN, WHOLE = "Fastrm", "FastrmWhole"
# Keys of config.json by which stock classes make the head and choose its activation: of regression, none.
_OF_THE_HEAD = ("num_labels", "id2label", "label2id", "problem_type")


@dataclass(frozen=True)
class VllmReading(StockReading):
    """The way in which vLLM reads an export.

    Attributes:
        needs_plugin: `architecture` is a class of the plugin.
        has_images: of the model's inputs, some are images.
        loses_bias: transformers has a class of the name `architecture` too, which would load the head and leave its
            bias out. It takes any folder with `score.weight`, which vLLM's class needs.
    """

    needs_plugin: bool = False
    has_images: bool = False
    loses_bias: bool = False

    @property
    def is_guarded(self) -> bool:
        """True if the files hold the empty tensor that stock classifiers of transformers refuse."""
        return self.needs_plugin

    def file_name(self, name: str, model_type: str) -> str:
        """Return the name of a weight in the export's files, from that in the network."""
        if name.startswith("score.") and not self.needs_plugin and model_type in VISION_FAMILIES:
            return f"language_model.{name}"
        return super().file_name(name, model_type)

    def complete(self, config: dict) -> None:
        """Add to the content of config.json what vLLM needs to know.

        Rotary frequencies of the kind `dynamic` are the plain ones up to max_position_embeddings, beyond which rewards
        would depend on others in the batch. vLLM would accept such lengths, so that config.json names the plain kind.
        Of a stock vision model the head lies in the language model, which for InternVL sees text_config alone.
        """
        super().complete(config)
        if self.has_images:
            config["text_config"] |= {name: config[name] for name in _OF_THE_HEAD if name in config}
        rope = config.get("text_config", config).get("rope_parameters") or {}
        if rope.get("rope_type") == "dynamic":
            rope["rope_type"] = "default"
            rope.pop("factor", None)

    def add_files(self, folder: Path, network: RewardNetwork) -> None:
        """Write what vLLM reads besides, into the folder of an export whose other files are there."""
        config = network.model.config
        if config.model_type in FAMILIES:
            FAMILIES[config.model_type].add_vllm_files(folder, config, network.encoder.tokenizer)


def read_by_vllm(network: RewardNetwork) -> VllmReading:
    """Find out which class of vLLM or of the plugin serves a network with its tokenizer.

    Raises:
        ConfigError: naming the value of config.json that vLLM does not read, so that its rewards would be others.
    """
    config, head = network.model.config, network.head_settings
    if network.paradigm != "reward":
        raise ConfigError(
            f"--for vllm is for rewards, and this is a {network.paradigm}, which writes; export it --for transformers"
        )
    _check_is_read(config)
    name = f"{STEMS[config.model_type]}ForSequenceClassification"
    stock = read_by_stock(network)
    why, kind = "", ""
    if head.layers > 1:
        why, kind = f"the head has {head.layers} layers", _PLUGIN
    # These need the whole conversation at once, which the plugin's classes tell vLLM by their name.
    if network.pooling != "anchor":
        why, kind = f"model.pooling is {network.pooling}", WHOLE
    elif not anchors_end(network.encoder):
        why, kind = f"model.anchor is {network.encoder.anchor}, and the chat template goes on after it", WHOLE
    has_images = config.model_type in VISION_FAMILIES
    loses_bias = head.bias and not kind and not has_images
    return VllmReading(
        True, kind + name, stock.pad_token, why, needs_plugin=bool(kind), has_images=has_images, loses_bias=loses_bias
    )


def _check_is_read(config) -> None:
    """Refuse values that vLLM 0.32 passes over, or for which it has no layer."""
    text, family = config.get_text_config(), config.model_type
    of_vision = FAMILIES[family].fixed_in_vllm(config) if family in FAMILIES else ({} if family in IN_VLLM else None)
    if of_vision is None:
        raise ConfigError(
            f"{family}: how vLLM would read its exports is not known here. Serve it with transformers: "
            "fastrm export MODEL --out FOLDER --for transformers, or with fastrm serve"
        )
    found = {"hidden_act": (text.hidden_act, "silu")} | of_vision
    for name, (value, wanted) in found.items():
        if value != wanted:
            raise ConfigError(
                f"{family}: {name} is {value!r}, and vLLM computes {wanted!r} whatever config.json says: its rewards "
                "would be others. Serve it with transformers: fastrm export MODEL --out FOLDER --for transformers"
            )

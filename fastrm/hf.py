"""Reward models in transformers: `import fastrm.hf` makes its Auto classes load fastrm's exports, every head included.

    import fastrm.hf
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained("runs/my/model", dtype="float32")
    rewards = model(**batch).logits[:, 0]

The classes are registered for the configurations of the stock families, and nothing of an export is run as code. They
read the `fastrm` section of config.json; a folder without one is left to the stock class, if there is any. A
conversation may be padded on either side, since the reward is read by `attention_mask`, not by the pad token.
"""

import torch
import transformers
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils.generic import can_return_tuple

from fastrm.errors import ConfigError, StorageError
from fastrm.model.families import FAMILIES, STEMS, check_family, has_axes
from fastrm.model.head import make_head
from fastrm.model.loading import shortened
from fastrm.model.paradigms import check_gives_rewards
from fastrm.model.stored_head import read_section
from fastrm.model.text import longest_path, path_limit_key
from fastrm.model.vllm_classes import WHOLE

# The head of a vision model in a folder for stock vLLM (fastrm/model/vllm_classes.py).
_VISION_NAMES = {r"^language_model\.score\.": "score."}


class RewardModelForSequenceClassification:
    """Base of the classes for each family: a stock base model and fastrm's head, which reads what an export says.

    Attributes:
        stock: the class of transformers that loads a folder without a `fastrm` section; None: there is none.
    """

    base_model_prefix = "model"
    # The reward is what everything else is measured by: the head computes in float32, whatever the backbone does.
    _keep_in_fp32_modules_strict = ("score",)
    # Beside a head that stock classes misread, exports hold an empty tensor of this name (stock_classes.py).
    _keys_to_ignore_on_load_unexpected = (r"^score\.weight$",)
    stock: type | None = None

    def __init__(self, config):
        check_family(config)
        head, self.anchor, self.pooling = read_section(config.name_or_path or "the model", _section(config))
        config.num_labels = 1
        super().__init__(config)
        self.num_labels = 1
        self.model = AutoModel.from_config(config)
        score = make_head(config.get_text_config().hidden_size, head)
        if not _has_bare_head(config, head.layers):
            config.problem_type = None  # what is saved again says how its head is named
        self.score = score if head.layers > 1 or config.problem_type == "regression" else nn.Sequential(score)
        self.post_init()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *model_args, config=None, output_loading_info=False, **kwargs
    ):
        """Load an export of fastrm; other folders go to the stock class. Arguments are those of transformers.

        Raises:
            ConfigError: if there is neither a `fastrm` section in config.json nor a stock class, it is malformed, or
                it says that the model is a critic or a judge.
            StorageError: if weights are missing, which transformers would draw at random.
        """
        if config is None:
            config = cls.config_class.from_pretrained(pretrained_model_name_or_path)
        check_gives_rewards(str(pretrained_model_name_or_path), _section(config))
        if _section(config) is None:
            if cls.stock is None:
                raise ConfigError(
                    f"{pretrained_model_name_or_path}/config.json: has no `fastrm` section, and transformers has no "
                    f"class of its own for sequence classification with {config.model_type}; to convert the reward "
                    f"model of another trainer: fastrm export MODEL --out FOLDER --for transformers"
                )
            options = {"config": config, "output_loading_info": output_loading_info}
            return cls.stock.from_pretrained(pretrained_model_name_or_path, *model_args, **options, **kwargs)
        if config.model_type in FAMILIES:
            kwargs.setdefault("key_mapping", {**FAMILIES[config.model_type].loaded_names, **_VISION_NAMES})
        model, report = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, config=config, output_loading_info=True, **kwargs
        )
        if missing := sorted(report["missing_keys"]):
            raise StorageError(
                f"{pretrained_model_name_or_path}: {len(missing):,} weights are in no file and would be random: "
                f"{shortened(missing)}; copy the whole folder again, or write it anew with fastrm export"
            )
        return (model, report) if output_loading_info else model

    @classmethod
    def _from_config(cls, config, **kwargs):
        if _section(config) is None and cls.stock is not None:
            return cls.stock._from_config(config, **kwargs)
        return super()._from_config(config, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        """Return rewards (B, 1) float32 as `logits`, of B conversations as the chat template renders them.

        Args:
            input_ids: (B, n) int64.
            attention_mask: (B, n), 0 for padding on either side; may be left out for one conversation.
            labels: (B,) rewards that are wanted; `loss` is then the mean of the squared differences.
            kwargs: of the stock base model: pixel_values, image_grid_thw, mm_token_type_ids, use_cache ...

        Raises:
            ValueError: for several conversations without a mask, or a conversation without a token to read.
        """
        given = input_ids if input_ids is not None else inputs_embeds
        mask = _checked_mask(given, attention_mask)
        limit = longest_path(self.config)
        if limit is not None and int(mask.sum(-1).max()) > limit:
            key = path_limit_key(self.config)
            raise ValueError(f"a conversation of more than {limit} tokens: with {key} rewards are exact up to that")
        if position_ids is None and not has_axes(self.config):  # models with axes count their own
            position_ids = (mask.long().cumsum(-1) - 1).clamp(min=0)
        kwargs.setdefault("use_cache", False)
        if has_axes(self.config) and kwargs.get("mm_token_type_ids") is None:
            kwargs["mm_token_type_ids"] = self._media_kinds(input_ids)
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds,
            return_dict=True, **kwargs,
        )  # fmt: skip
        states = self._states(outputs.last_hidden_state, self._last_read(input_ids, mask), mask)
        with torch.autocast(states.device.type, enabled=False):
            rewards = self.score(states.to(next(self.score.parameters()).dtype)).float()
        loss = None if labels is None else nn.functional.mse_loss(rewards.squeeze(-1), labels.float().view(-1))
        return SequenceClassifierOutput(
            loss=loss, logits=rewards, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def _media_kinds(self, input_ids: torch.Tensor | None) -> torch.Tensor | None:
        """Return the kinds of tokens (B, n): 1 for images, 2 for videos; stock models refuse images without them."""
        if input_ids is None:
            return None
        return (input_ids == self.config.image_token_id).int() + 2 * (input_ids == self.config.video_token_id).int()

    def _last_read(self, input_ids: torch.Tensor | None, mask: torch.Tensor) -> torch.Tensor:
        """Return the place (B,) of the token that each conversation ends with, its anchor."""
        readable = mask
        if self.anchor != "last_token":
            if input_ids is None:
                raise ValueError(f"the anchor {self.anchor} is found by input_ids; got inputs_embeds")
            if self.anchor == "before_padding":
                readable = mask & (input_ids != self.config.get_text_config().pad_token_id)
            else:
                readable = mask & (input_ids == self._anchor_token_id())
        if not bool(readable.any(-1).all()):
            raise ValueError(f"a conversation of the batch has no token that the anchor {self.anchor} could be")
        places = torch.arange(mask.shape[-1], device=mask.device)
        return torch.where(readable, places, -1).amax(-1)

    def _anchor_token_id(self) -> int:
        number = _section(self.config).get("anchor_token_id")
        if number is None:
            raise ConfigError(
                "config.json: its `fastrm` section does not say which token ends a turn, as exports of before do not; "
                "write it anew: fastrm export MODEL --out FOLDER --for transformers"
            )
        return number

    def _states(self, hidden: torch.Tensor, last: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return what the head reads (B, D), from the last states (B, n, D)."""
        if self.pooling == "anchor":
            return hidden[torch.arange(len(hidden), device=hidden.device), last.to(hidden.device)]
        places = torch.arange(mask.shape[-1], device=mask.device)
        counted = (mask & (places <= last[:, None])).unsqueeze(-1).to(hidden.device)
        return (hidden.float() * counted).sum(1) / counted.sum(1)


def _section(config) -> dict | None:
    return getattr(config, "fastrm", None)


def _has_bare_head(config, layers: int) -> bool:
    """Return whether the files name the head `score.weight`, as stock classifiers of transformers and vLLM do.

    A single layer that they would misread is `score.0.*` (fastrm/model/stock_classes.py, fastrm/model/vllm_classes.py).
    """
    is_for_plugin = any(name.startswith(WHOLE) for name in config.architectures or ())
    return layers == 1 and config.problem_type == "regression" and not is_for_plugin


def _checked_mask(given: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return which tokens (B, n) are no padding, bool."""
    if mask is None:
        if given.shape[0] > 1:
            raise ValueError(
                f"got {given.shape[0]} conversations without attention_mask; pass the tokenizer's, which tells padding "
                "from tokens"
            )
        return torch.ones(given.shape[:2], dtype=torch.bool, device=given.device)
    if mask.ndim != 2:
        raise ValueError(f"attention_mask has shape {list(mask.shape)}, wanted (conversations, tokens)")
    return mask.bool()


def _make_class(stem: str) -> type:
    """Make the class of a family, on transformers' base class of that family.

    Args:
        stem: of names of classes, as Qwen2VL.
    """
    config = getattr(transformers, f"{stem}Config")
    base = getattr(transformers, f"{stem}PreTrainedModel")
    members = {
        "__doc__": f"A reward model of fastrm on a {stem}.",
        "__module__": __name__,
        "config_class": config,
        "stock": getattr(transformers, f"{stem}ForSequenceClassification", None),
    }
    return type(f"Fastrm{stem}ForSequenceClassification", (RewardModelForSequenceClassification, base), members)


# The class for each configuration of transformers; the classes are names of this module too.
CLASSES = {_class.config_class: _class for _class in map(_make_class, STEMS.values())}
globals().update({_class.__name__: _class for _class in CLASSES.values()})

for _config, _class in CLASSES.items():
    # Without exist_ok a class for one of transformers' own configurations is ignored in silence. transformers 5.17 has
    # no such exception, so that there its table is written directly.
    AutoModelForSequenceClassification.register(_config, _class, exist_ok=True)
    AutoModelForSequenceClassification._model_mapping._extra_content[_config] = _class

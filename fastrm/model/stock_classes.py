"""An export in the eyes of stock transformers: names of weights that all classes know, a head that none misreads.

AutoModel reads any export as its backbone and names the head's weights as unexpected. The stock class for sequence
classification computes `score(state of the last token that is not the pad token)`, with a linear `score` without bias.
An export that means the same is a checkpoint of that class, by its names, its `architectures` and its pad token. Any
other is kept out of it: beside the head's own weights, `score.0.weight` and so on, its files hold an empty
`score.weight`, which has the shape of no number of labels, so that the stock class refuses to load instead of drawing a
random head.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from fastrm.data.record import Message, Response
from fastrm.data.template import ConversationEncoder, TurnLoss
from fastrm.json_files import to_json
from fastrm.model.families import FAMILIES
from fastrm.model.network import RewardNetwork
from fastrm.model.places import GENERATION
from fastrm.model.weight_writer import Entry

# The name of the tensor without elements that makes stock classifiers refuse an export.
GUARD = "score.weight"
# Letters in the names of special tokens for padding, the likeliest first.
_PADDING_NAMES = ("finetunerightpadid", "pad", "padding", "endoftext", "unk")
# The responses by which the ends of conversations are found.
_SAMPLES = ("Yes: it is.", "no\n", "4")


@dataclass(frozen=True)
class StockReading:
    """The way in which stock classes read an export.

    Attributes:
        classifies: its head on its anchor is what a stock classifier computes, with `pad_token`.
        architecture: name of the stock class that is the nearest to it; None: that of the backbone, as there is none,
            such as a classifier of vision models.
        pad_token: content of the token that the export pads with; None: the tokenizer has none that fits.
        why: where `classifies` is false, what the stock class would read wrongly.
        has_head: the export holds a reward head.
    """

    classifies: bool
    architecture: str | None
    pad_token: str | None
    why: str = ""
    has_head: bool = True

    @property
    def is_guarded(self) -> bool:
        """True if the files hold the empty tensor that stock classifiers refuse."""
        return self.has_head and not self.classifies

    def file_name(self, name: str, model_type: str) -> str:
        """Return the name of a weight in the export's files, from that in the network.

        Vision models have those of the published checkpoints (`VisionFamily.file_names`).
        """
        if name.startswith("score."):
            kind = name.removeprefix("score.")
            return f"score.0.{kind}" if self.is_guarded and "." not in kind else name
        renamed = FAMILIES[model_type].file_names if model_type in FAMILIES else {}
        for inner, outer in renamed.items():
            if name.startswith(inner):
                return outer + name.removeprefix(inner)
        return name

    def file_entries(self, entries: Iterable[Entry], model_type: str) -> list[Entry]:
        """Return (name, shape, dtype) of all tensors in the export's files, from those of the network."""
        found = [(self.file_name(name, model_type), shape, dtype) for name, shape, dtype in entries]
        return [*found, (GUARD, (0,), torch.float32)] if self.is_guarded else found

    def complete(self, config: dict) -> None:
        """Add to the content of config.json what its readers need to know."""
        if self.classifies:
            config |= {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
            config["problem_type"] = "regression"
        if self.architecture is not None:
            config["architectures"] = [self.architecture]

    def add_files(self, folder: Path, network: RewardNetwork) -> None:
        """Write what else the reader needs into the folder of an export, whose other files are there."""
        if network.paradigm != "reward":
            (folder / GENERATION).write_text(to_json(generation_of(network), indent=2, sort_keys=True) + "\n")


def read_by_stock(network: RewardNetwork) -> StockReading:
    """Find out how stock classes read a network with its tokenizer, by rendering short conversations."""
    encoder, head = network.encoder, network.head_settings
    if network.paradigm != "reward":
        writes, own = _generator(network.model.config), encoder.tokenizer.pad_token
        has_head, why = network.paradigm == "critic", f"a {network.paradigm} writes first"
        return StockReading(False, writes, own, why, has_head=has_head)
    before_padding, why = encoder.anchor == "before_padding" and encoder.pad_token_id is not None, ""
    if before_padding:  # read like the stock class, by the model's own pad token
        pad_token = encoder.tokenizer.convert_ids_to_tokens(encoder.pad_token_id)
    else:
        pad_token = _pad_token(encoder, network.model.config.get_text_config().vocab_size)
    if network.pooling != "anchor":
        why = f"model.pooling is {network.pooling}"
    elif head.layers > 1:
        why = f"the head has {head.layers} layers"
    elif head.bias:
        why = "the head has a bias"
    elif not before_padding and not anchors_end(encoder):
        why = f"model.anchor is {encoder.anchor}, and the chat template goes on after it"
    elif pad_token is None:
        why = "every special token of the tokenizer ends conversations or stands in them, so none can pad"
    if why:
        return StockReading(False, None, pad_token if before_padding else encoder.tokenizer.pad_token, why)
    return StockReading(True, _classifier(network.model.config), pad_token)


def generation_of(network: RewardNetwork) -> dict:
    """Return the generation_config.json of a model that writes: its base's, with all the tokens that end its texts.

    They are those of the base's generation_config.json and of the tokenizer, and the token up to which turns were
    learnt: a base model's tokenizer may end texts with another one than its chat template ends turns with, and its
    texts would not end. config.json is not asked: a class's default may be an ordinary token of this vocabulary.
    """
    learner = copy.copy(network.encoder)
    learner.learn_turns(TurnLoss(per_token=True))
    turn = learner.encode(_samples()[0])
    own = network.generation.get("eos_token_id")
    ends = [*(own if isinstance(own, list) else [own]), learner.tokenizer.eos_token_id]
    ends.append(int(turn.tokens[turn.turn[1] - 1]))
    return network.generation | {"eos_token_id": [end for end in dict.fromkeys(ends) if end is not None]}


def anchor_token_id(encoder: ConversationEncoder) -> int | None:
    """Return the token that `end_of_turn` reads, for readers without the chat template; None for other anchors."""
    if encoder.anchor != "end_of_turn":
        return None
    return int(encoder.encode(_samples()[0]).tokens[-1])


def padding_note(network: RewardNetwork) -> str | None:
    """Return a line that says that an export pads with another token than the network's tokenizer, or None."""
    reading, own = read_by_stock(network), network.encoder.tokenizer.pad_token
    if reading.pad_token == own or network.encoder.anchor == "before_padding":
        return None
    why = "had no pad token" if own is None else f"padded with {own}, with which conversations end"
    return (
        f"export: its tokenizer and config.json pad with {reading.pad_token}, so that stock classifiers find the last "
        f"token; the tokenizer {why}"
    )


def with_padding(tokenizer, pad_token: str | None):
    """Return the tokenizer, or a copy of it that pads with another token."""
    if pad_token == tokenizer.pad_token:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = pad_token
    return tokenizer


def _classifier(config) -> str | None:
    """Return the name of transformers' own class, whatever `fastrm.hf` or others have registered in this process."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as classes

    return classes.get(config.model_type)


def _generator(config) -> str:
    """Return the name of transformers' own class that writes."""
    from transformers.models.auto import modeling_auto as auto

    is_vision = config.model_type in FAMILIES
    names = (
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if is_vision else auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    )
    return names[config.model_type]


def _pad_token(encoder: ConversationEncoder, vocab_size: int) -> str | None:
    """Return a special token with which no conversation ends: the tokenizer's own pad token, or another.

    A special token comes from the template and never from text, so a few conversations show all that occur. The stock
    classifier takes a token for padding wherever it stands, so only the last of a conversation matters.
    """
    conversations = [_to_the_last_token(encoder).encode(sample).tokens for sample in _samples()]
    ends = {int(tokens[-1]) for tokens in conversations}
    usable = {token: number for token, number in encoder.special_ids.items() if number < vocab_size}
    own = encoder.tokenizer.pad_token
    if own in usable and usable[own] not in ends:
        return own
    media = set() if encoder.vision is None else set(encoder.vision.placeholders.values())
    # A new pad token must not be in use for anything else.
    taken = {int(token) for tokens in conversations for token in tokens} | media
    free = [token for token, number in usable.items() if number not in taken]
    free = [token for token in free if token not in (encoder.tokenizer.eos_token, encoder.tokenizer.bos_token)]
    return min(free, key=lambda token: (_likelihood(token), usable[token]), default=None)


def _likelihood(token: str) -> int:
    letters = "".join(filter(str.isalpha, token)).lower()
    return _PADDING_NAMES.index(letters) if letters in _PADDING_NAMES else len(_PADDING_NAMES)


def anchors_end(encoder: ConversationEncoder) -> bool:
    """Return whether the anchor is the last token of a conversation as the template renders it."""
    to_the_end = _to_the_last_token(encoder)
    return all(len(encoder.encode(sample).tokens) == len(to_the_end.encode(sample).tokens) for sample in _samples())


def _to_the_last_token(encoder: ConversationEncoder) -> ConversationEncoder:
    if encoder.anchor == "last_token":
        return encoder
    changed = copy.copy(encoder)
    changed.anchor = "last_token"
    return changed


def _samples() -> list[Response]:
    return [Response((Message("user", ("Is 1 < 2?",)), Message("assistant", (text,)))) for text in _SAMPLES]

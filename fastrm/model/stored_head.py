"""The reward head in a folder, read from its files, whoever wrote them.

Read are the head of an export (`fastrm` section in config.json), and linear heads or `Sequential` ones under the names
of the classes in `_KINDS`. Each kind says which token its class reads for one conversation without padding, and what
else its class does to the reward. What is none of these is refused by name, as is every weight of a checkpoint that
would be left out.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from pydantic import ValidationError
from torch import nn

from fastrm.config import HeadConfig, ModelConfig
from fastrm.errors import ConfigError, StorageError
from fastrm.model.loading import Backbone, shortened
from fastrm.model.paradigms import paradigm_in
from fastrm.model.places import ModelPlace
from fastrm.model.weight_files import VALUE_HEAD, StoredTensor, finder

ANCHORS = {
    "last_token": "the last token",
    "end_of_turn": "the token that ends the turn",
    "before_padding": "the last token that is not padding",
}
POOLINGS = ("anchor", "mean")
_SCORE_KEY = re.compile(r"(?:(\d+)\.)?(weight|bias)")
# The modules that trainers put the head into.
_INSIDE = ("", "model.", "language_model.", "pretrained_model.")
# Keys of config.json for OpenRLHF's head: its place, and the normalisation of its rewards.
OPENRLHF_KEYS = ("value_head_prefix", "normalize_reward", "mean", "std")
# Buffers that OpenRLHF has written beside its head. The values that count are those of config.json; without them
# there, the buffers are named as lost.
_BUFFERS = {"mean", "std"}


@dataclass(frozen=True)
class _Kind:
    """A name of heads in files, and the behaviour of the class that writes it.

    Attributes:
        reads: last_token, stock (the last token that is not the pad token of config.json), or None: no file says it.
        activation: between the layers of a Sequential; None: no file says it.
    """

    name: str
    reads: str | None
    activation: str | None = None


_KINDS = (
    # transformers' GenericForSequenceClassification, ms-swift's seq_cls, Skywork's; OpenRLHF by its config.json.
    _Kind("score", "stock"),
    # TRL's ValueHead: in the checkpoint, or LLaMA-Factory's file beside it, which reads the last attended token.
    _Kind("v_head.summary", "last_token"),
    # OpenRLHF's RewardModel (openrlhf/models/model.py): the last attended token.
    _Kind("value_head", "last_token"),
    # MM-RLHF (llava/model/language_model/llava_qwen.py): dropout, linear, tanh, dropout, linear.
    _Kind("rm_head", "last_token", "tanh"),
    # InternLM's and InternLM-XComposer's: a linear layer, whose reading no file states.
    _Kind("v_head", None),
)
# Classes whose Sequential head has a known activation.
_ACTIVATIONS = {"Qwen2ForRewardModel": "relu"}


@dataclass(frozen=True)
class FoundHead:
    """A reward head in files.

    Attributes:
        head: its depth, activation and bias.
        anchor: the token that it reads; None: no file says it.
        pooling: anchor or mean; None: no file says it.
        layers: (weight, bias or None) of each layer.
        names: of its weights in the files.
        mean, std: the reward is (output - mean) / std.
        is_export: written by fastrm.
        activation_is_known: False: `head.activation` is a default, since no file says it.
    """

    head: HeadConfig
    anchor: str | None
    pooling: str | None
    layers: tuple[tuple[StoredTensor, StoredTensor | None], ...]
    names: tuple[str, ...]
    mean: float = 0.0
    std: float = 1.0
    is_export: bool = False
    activation_is_known: bool = True

    def load_into(self, score: nn.Module) -> None:
        """Fill a head of `make_head` with the weights, in its own dtype; a normalisation goes into the last layer.

        Raises:
            StorageError: if a file cannot be read.
        """
        linears = [module for module in score.modules() if isinstance(module, nn.Linear)]
        with torch.no_grad():
            for linear, (weight, bias) in zip(linears, self.layers, strict=True):
                weight.read_into(linear.weight.view(-1))  # rounded once, into the head's own dtype
                if linear.bias is not None:
                    linear.bias.copy_(torch.zeros(weight.shape[0]) if bias is None else bias.read())
            if (self.mean, self.std) != (0.0, 1.0):
                linears[-1].bias.sub_(self.mean).div_(self.std)
                linears[-1].weight.div_(self.std)

    def describe(self) -> str:
        """Describe the head in one line, as in "head: 1 layer, no bias, from score.weight; reads the last token"."""
        count = self.head.layers
        parts = [f"{count} layer{'s' * (count > 1)}"]
        if count > 1:
            said = "" if self.activation_is_known else " as model.head says, since no file does"
            parts.append((self.head.activation if self.head.activation != "none" else "no activation") + said)
        normalised = (self.mean, self.std) != (0.0, 1.0)
        parts.append("bias" if any(bias is not None for _, bias in self.layers) else "no bias")
        reads = "the mean over all tokens" if self.pooling == "mean" else ANCHORS[self.anchor or "last_token"]
        extra = f", normalised by mean {self.mean:g} and std {self.std:g}" if normalised else ""
        return f"head: {', '.join(parts)}, from {shortened(self.names)}; reads {reads}{extra}"


def find_head(opened: Backbone, tokenizer, settings: ModelConfig | None = None) -> FoundHead | None:
    """Find the head in the files of a backbone; None if there is none and config.json does not mention one.

    Every weight of the files is then the backbone's, the head's, or of no use to any reward model.

    Args:
        tokenizer: says whether conversations end with the pad token.
        settings: of a training run, for what no file says; None: that is an error.

    Raises:
        ConfigError: for heads that are not read, or not all of it is known.
        StorageError: for weights of a head of another shape than its class has.
    """
    config = opened.place.read_config()
    found = _groups(opened.rest, config)
    used = {name for group in found.values() for name in group.values()}
    if config.keys() >= _BUFFERS or (_is_openrlhf(config) and not config.get("normalize_reward")):
        used |= _BUFFERS
    lost = [name for name in opened.rest if name not in used]
    where = opened.place.given
    if len(found) > 1:
        names = [name for group in found.values() for name in group.values()]
        raise ConfigError(f"{where}: holds {len(found)} reward heads: {shortened(names)}. {_way_on(names)}")
    if lost:
        raise ConfigError(
            f"{where}: weights of the files belong neither to the {opened.model.config.model_type} backbone nor to a "
            f"reward head that is known here, and would be lost: {shortened(lost)}. {_way_on(lost)}"
        )
    if not found:
        _check_no_head_expected(opened.place, config)
        return None
    ((kind, group),) = found.items()
    if "fastrm" in config:
        normalised = _normalisation(where, config) != (0.0, 1.0)
        return _exported(where, config["fastrm"], group, _layers(where, group, opened), normalised=normalised)
    return _foreign(where, config, kind, group, opened, tokenizer, settings)


def _groups(rest: Mapping[str, StoredTensor], config: dict) -> dict[_Kind, dict[str, str]]:
    """Return heads by kind: key in the head ("weight", "0.bias") -> name in the files."""
    found: dict[_Kind, dict[str, str]] = {}
    for kind in _kinds(config):
        for name in rest:
            inside = next((name.removeprefix(p) for p in _INSIDE if name.startswith(f"{p}{kind.name}.")), "")
            key = inside.removeprefix(f"{kind.name}.")
            if inside and _SCORE_KEY.fullmatch(key):
                found.setdefault(kind, {})[key] = name
    return found


def _is_openrlhf(config: dict) -> bool:
    return isinstance(config.get("value_head_prefix"), str) or "normalize_reward" in config


def _kinds(config: dict) -> Sequence[_Kind]:
    """Return the known kinds; OpenRLHF's config.json names its head and says that it reads the last attended token."""
    prefix = config.get("value_head_prefix")
    name = prefix if isinstance(prefix, str) else "score"
    own = [_Kind(name, "last_token")] if _is_openrlhf(config) else []
    return own + [kind for kind in _KINDS if not own or kind.name != name]


def _layers(where: str, group: Mapping[str, str], opened: Backbone) -> list[tuple[StoredTensor, StoredTensor | None]]:
    """Return (weight, bias) of each layer in order, of the shapes that a head here can have."""
    width = opened.model.config.get_text_config().hidden_size
    keys = sorted({key.rpartition(".")[0] for key in group}, key=lambda key: int(key or 0))
    layers = []
    for place, key in enumerate(keys):
        dot = key and f"{key}."
        name = group.get(f"{dot}weight")
        if name is None or ("" in keys and len(keys) > 1):
            raise StorageError(
                f"{where}: reward head {shortened(group.values())}: not the weights of linear layers, {dot}weight is "
                "missing; download or copy the checkpoint again"
            )
        rows = 1 if place == len(keys) - 1 else width
        _check_shape(where, name, opened.rest[name], (rows, width))
        bias = group.get(f"{dot}bias")
        if bias is not None:
            _check_shape(where, bias, opened.rest[bias], (rows,))
        layers.append((opened.rest[name], None if bias is None else opened.rest[bias]))
    return layers


def _check_shape(where: str, name: str, tensor: StoredTensor, wanted: tuple[int, ...]) -> None:
    if tensor.shape != wanted:
        raise StorageError(
            f"{where}: {name} has shape {list(tensor.shape)}, wanted {list(wanted)}: a reward head here has layers as "
            f"wide as the model and one output, no several labels. {_way_on([name])}"
        )


def _exported(
    where: str, section: object, group: Mapping[str, str], layers: list[tuple], *, normalised: bool
) -> FoundHead:
    """Return the head that config.json's `fastrm` section describes."""
    head, anchor, pooling = read_section(where, section)
    if normalised:
        raise ConfigError(
            f"{where}/config.json: has a `fastrm` section and normalize_reward, which exports do not have; remove the "
            "section, and the head is read as OpenRLHF's, or remove normalize_reward"
        )
    biases = sum(bias is not None for _, bias in layers)
    if len(layers) != head.layers or biases != head.bias * head.layers:
        raise StorageError(
            f"{where}: reward head: got {len(layers)} layers with {biases} biases in the files, wanted {head.layers} "
            f"with {head.bias * head.layers} as the `fastrm` section of config.json says; copy the whole folder again"
        )
    return FoundHead(head, anchor, pooling, tuple(layers), tuple(group.values()), is_export=True)


def read_section(where: str, section: object) -> tuple[HeadConfig, str, str]:
    """Read an export's `fastrm` section as (head, anchor, pooling).

    Raises:
        ConfigError: if it is malformed.
    """
    try:
        # The first exports do not state the pooling, which was the anchor.
        head, anchor = HeadConfig(**section["head"]), section["anchor"]
        pooling = section.get("pooling", "anchor")
        if anchor in ANCHORS and pooling in POOLINGS:
            return head, anchor, pooling
    except (KeyError, TypeError, AttributeError, ValidationError):
        pass
    raise ConfigError(
        f"{where}/config.json: no valid `fastrm` section; wanted, for example, "
        '{"head": {"layers": 1, "bias": false}, "anchor": "last_token", "pooling": "anchor"}'
    )


def _foreign(
    where: str, config: dict, kind: _Kind, group: dict, opened: Backbone, tokenizer, settings: ModelConfig | None
) -> FoundHead:
    """Return a head that another trainer wrote."""
    architecture = next(iter(config.get("architectures") or ()), "")
    if architecture.endswith("ForTokenClassification") or "Process" in architecture:
        raise ConfigError(
            f"{where}: config.json names {architecture}, which gives a reward for each token; wanted one for a "
            f"response. {_way_on(group.values())}"
        )
    layers = _layers(where, group, opened)
    activation = _stored_activation(where, group, _ACTIVATIONS.get(architecture, kind.activation))
    is_known = activation is not None
    if not is_known and settings is not None:
        activation = settings.head.activation
    if activation is None:
        raise ConfigError(
            f"{where}: no file says which activation stands between the layers of {shortened(group.values())}; add it "
            f'to config.json: "fastrm": {_section_text(layers)}, with tanh, relu, silu or none'
        )
    if len(layers) > 5:
        raise ConfigError(f"{where}: a head of {len(layers)} layers; wanted at most 5. {_way_on(group.values())}")
    mean, std = _normalisation(where, config)
    bias = any(bias is not None for _, bias in layers) or (mean, std) != (0.0, 1.0)
    head = HeadConfig(layers=len(layers), activation=activation, bias=bias)
    anchor = kind.reads
    if anchor == "stock":
        pad = opened.model.config.get_text_config().pad_token_id
        anchor = "before_padding" if pad is not None and _may_end_with(tokenizer, pad) else "last_token"
    pooling = None if kind.reads is None else "anchor"
    return FoundHead(
        head, anchor, pooling, tuple(layers), tuple(group.values()), mean, std, activation_is_known=is_known
    )


def _stored_activation(where: str, group: Mapping[str, str], usual: str | None) -> str | None:
    """Return the activation between the layers; none if their numbers in the Sequential are consecutive.

    Args:
        usual: the activation of the class that wrote the head, None if no file says it.
    """
    numbers = sorted(int(key.partition(".")[0]) if "." in key else 0 for key in group if key.endswith("weight"))
    steps = [after - before for before, after in itertools.pairwise(numbers)]
    if all(step == 1 for step in steps):
        return "none"
    if 1 in steps:
        raise ConfigError(
            f"{where}: between some layers of {shortened(group.values())} stands a module without weights, between "
            f"others none; a reward head here has one activation between all of them. {_way_on(group.values())}"
        )
    return usual


def _section_text(layers: Sequence[tuple]) -> str:
    bias = "true" if any(bias is not None for _, bias in layers) else "false"
    head = f'{{"layers": {len(layers)}, "activation": "silu", "bias": {bias}}}'
    return f'{{"head": {head}, "anchor": "last_token", "pooling": "anchor"}}'


def _may_end_with(tokenizer, pad: int) -> bool:
    """Return whether this token may be the last of a rendered conversation; not if all end with another one.

    Raises:
        ConfigError: if the chat template cannot render any.
    """
    from jinja2 import TemplateError

    try:
        ends = {
            tokenizer.apply_chat_template(
                [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": text}],
                tokenize=True, return_dict=False,
            )[-1]
            for text in ("Yes.", "No, 7")
        }  # fmt: skip
    except (TemplateError, TypeError) as error:
        raise ConfigError(f"the chat template cannot render a question and an answer: {error}; change it") from None
    return len(ends) > 1 or pad in ends


def _normalisation(where: str, config: dict) -> tuple[float, float]:
    """Return (mean, std) of OpenRLHF's rewards, from config.json as its class takes them."""
    if not config.get("normalize_reward") or "mean" not in config:
        return 0.0, 1.0
    values = [config.get(name) for name in ("mean", "std")]
    values = [value[0] if isinstance(value, list) and value else value for value in values]
    if not all(isinstance(value, (int, float)) for value in values) or not values[1] > 0:
        raise ConfigError(
            f"{where}/config.json: normalize_reward with mean {values[0]!r} and std {values[1]!r}; wanted two numbers, "
            "the second above 0"
        )
    return float(values[0]), float(values[1])


def _check_no_head_expected(place: ModelPlace, config: dict) -> None:
    """Refuse to make a random head for a model whose files should hold one."""
    where = place.given
    for folder in dict.fromkeys((place.base, place.adapter or place.base)):
        if (pickled := finder(folder)("value_head.bin")) is not None:
            raise ConfigError(
                f"{pickled}: a reward head in a format that can run code, which is not read; save it as {VALUE_HEAD} "
                "with safetensors.torch.save_file, or set model.head: new to train a new one"
            )
    writer = paradigm_in(where, config.get("fastrm"))
    is_export = "fastrm" in config and (writer is None or writer["kind"] != "judge")  # a judge has none
    names = [*(config.get("architectures") or ()), *(["a fastrm export"] if is_export else ())]
    kinds = ("ForSequenceClassification", "RewardModel", "SequenceRegression", "a fastrm export", "WithValueHead")
    named = next((name for name in names if any(kind in name for kind in kinds)), None)
    if named is not None:
        raise ConfigError(
            f"{where}: config.json names {named}, but no file holds the weights of its reward head (looked for "
            f"{', '.join(kind.name for kind in _KINDS)}); copy the whole folder again. To train a new head on purpose, "
            "set model.head: new"
        )


def _way_on(names: Sequence[str]) -> str:
    return (
        f"To train a new head on purpose, without {shortened(names, 1)}, set model.head: new; docs/models.md lists "
        "what is read"
    )


def missing_head(place: ModelPlace) -> ConfigError:
    """Return the error for a model without a head that is to be used for scoring."""
    return ConfigError(
        f"{place.given}: a backbone has no reward head yet (looked for {', '.join(kind.name for kind in _KINDS)} in "
        "its weights, and value_head.safetensors beside them): train one with model.path, or name the model/ folder of "
        "a run"
    )

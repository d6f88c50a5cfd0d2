"""The likely cause of a difference between a server's rewards and those of the model here.

Each explanation is tried, not guessed: the model here computes what a server with that fault would answer, and an
explanation is named if it gives the server's rewards within the band. Where no rewards can tell, the number of tokens
that the server counts, and the kinds of prompts that do agree, narrow it down.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fastrm.data.sources.layouts.groups import group_record
from fastrm.data.template import ConversationEncoder
from fastrm.errors import ConfigError, RecordError
from fastrm.evaluate.reward_model import RewardModel
from fastrm.evaluate.scoring import score_records
from fastrm.serve.check.prompts import KEPT, SYSTEM, CheckedPrompt

PRECISIONS = ("fp32", "bf16", "fp16")
_ROUNDINGS = 4  # a difference up to this many times what a precision does is of that precision's size
_EXACT = 100  # texts that differ by less than this part of the band are computed in the same precision
_NEARER = 4  # an explanation leaves at most this part of the difference
_CONCATENATED = """\
{%- for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text or '' }}
{%- endfor %}{% endif %}{% endfor %}"""


@dataclass(frozen=True)
class Cell:
    """The rewards of one response: the server's and ours.

    Attributes:
        num_tokens: that we count and that the server does, where it says so; 0 for a reward that it remembered.
    """

    prompt: CheckedPrompt
    place: int
    ours: float
    served: float
    num_tokens: tuple[int, int | None]

    @property
    def difference(self) -> float:
        return abs(self.served - self.ours)


class Explainer:
    """A search for the explanation of a difference.

    Args:
        model: that the server is said to serve.
        reload: loads it in a precision, fp32, bf16 or fp16.
        band: the largest difference that needs no explanation.
    """

    def __init__(self, model: RewardModel, reload: Callable[[str], RewardModel], band: float):
        self._model, self._reload, self._band = model, reload, band

    def explain(self, cells: Sequence[Cell]) -> str:
        """Return the likely cause in a sentence or two.

        Args:
            cells: of which at least one differs by more than the band.
        """
        texts = [cell for cell in cells if not cell.prompt.images]
        if (cause := self._function_of_ours(cells)) is not None:
            return cause
        if self._agree(texts):
            return self._precision(cells, texts) or self._images(cells)
        return self._template(texts) or self._precision(cells, texts) or self._unknown(cells)

    def _agree(self, cells: Sequence[Cell]) -> bool:
        return all(cell.difference <= self._band for cell in cells)

    def _is_near(self, cells: Sequence[Cell], predicted: Sequence[float]) -> bool:
        """Return whether predictions are within the band, and much nearer than our rewards: noise fits any of them."""
        most = min(self._band, max(cell.difference for cell in cells) / _NEARER)
        return all(abs(cell.served - value) <= most for cell, value in zip(cells, predicted, strict=True))

    def _function_of_ours(self, cells: Sequence[Cell]) -> str | None:
        ours, served = (np.array([getattr(cell, name) for cell in cells]) for name in ("ours", "served"))
        if len(cells) > 1 and np.ptp(served) == 0:
            if served[0] == 1:
                return (
                    "activation: every reward is 1, as a softmax over one label gives; ask the server for raw values, "
                    "or serve with another endpoint"
                )
            return (
                f"constant: every reward is {served[0]:g}, whatever is asked; look at the head's weights there, and "
                "whether the server reads the conversation"
            )
        if self._is_near(cells, 1 / (1 + np.exp(-ours))):
            return (
                "activation: the server's rewards are the sigmoid of ours; send use_activation: false, or set "
                "problem_type: regression in the served config.json"
            )
        if len(cells) < 4 or np.ptp(ours) == 0:
            return None
        factor, offset = np.polyfit(ours, served, 1)
        if self._is_near(cells, factor * ours + offset):
            return (
                f"scale: the server's rewards are {factor:.4g} of ours and {offset:.4g} more, as logit_mean and "
                "logit_sigma of its pooler, or `serve --normalize`, make them; order is kept where the factor is "
                "positive"
            )
        return None

    def _images(self, cells: Sequence[Cell]) -> str:
        """Explain rewards of which those without images agree."""
        images = [cell for cell in cells if cell.prompt.images]
        blind = self._scored(self._model, [cell.prompt.without_images() for cell in images], images)
        if blind is not None and self._is_near(images, blind):
            return "images: the server does not read them, its rewards are those of the text alone"
        counted = next((cell for cell in images if _is_miscounted(cell)), None)
        if counted is not None:
            ours, theirs = counted.num_tokens
            return (
                f"image resizing: a conversation has {theirs:,} tokens there and {ours:,} here; serve with "
                "min_pixels and max_pixels of training (vLLM: --mm-processor-kwargs)"
            )
        kept = [cell for cell in images if cell.prompt.kind == KEPT]
        if any(cell.difference <= self._band for cell in kept):
            return (
                "image resizing: images that need none agree, others do not; serve with min_pixels, max_pixels and the "
                "resampling of training (vLLM: --mm-processor-kwargs '{\"use_fast\": false}')"
            )
        return (
            "images: even those that are kept as they are disagree; compare preprocessor_config.json (pixel limits, "
            "image_mean, image_std) and the order of images"
        )

    def _template(self, cells: Sequence[Cell]) -> str | None:
        """Explain rewards of texts by another rendering of the conversation."""
        for name, encoder in self._renderings():
            values = self._scored(_with_encoder(self._model, encoder), [cell.prompt.group for cell in cells], cells)
            if values is None:
                continue
            if self._is_near(cells, values):
                return name
            if self._is_near(cells, 1 / (1 + np.exp(-np.array(values)))):
                return f"{name}; and activation: they are the sigmoid of that"
        with_system = [cell for cell in cells if cell.prompt.kind == SYSTEM]
        if with_system and self._agree(with_system):
            return (
                "template: prompts with a system turn agree, others do not, so the server's template has another "
                "default system turn; serve with the exported chat_template.jinja"
            )
        counted = next((cell for cell in cells if _is_miscounted(cell)), None)
        if counted is None:
            return None
        ours, theirs = counted.num_tokens
        return (
            f"template or tokenizer: a conversation has {theirs:,} tokens there and {ours:,} here; serve with the "
            "exported chat_template.jinja and tokenizer files"
        )

    def _renderings(self) -> Iterator[tuple[str, ConversationEncoder]]:
        encoder = self._model.network.encoder
        template = encoder.tokenizer.get_chat_template()
        whole = f"{{% set whole %}}{template}{{% endset %}}"
        default = _default_system(encoder)
        others = {
            "anchor: the server's text lacks the white space at the end of the last turn, where the reward is read; "
            "serve with the exported chat_template.jinja": whole + "{{ whole.rstrip() }}",
            "template: the server opens another turn behind the response; send add_generation_prompt: false":
                "{% set add_generation_prompt = true %}" + template,
            "template: the server puts prompt and response together without any; use an endpoint that takes messages "
            "(stock vLLM's /score is none)": _CONCATENATED,
            "template: the token that begins texts is there twice; send add_special_tokens: false":
                "{{ bos_token }}" + template if encoder.tokenizer.bos_token else "",
            "template: the server leaves the default system turn out; serve with the exported chat_template.jinja":
                whole + f"{{{{ whole | replace({default!r}, '', 1) }}}}" if default else "",
        }  # fmt: skip
        for name, text in others.items():
            if text and (other := _other_encoder(encoder, text)) is not None:
                yield name, other

    def _precision(self, cells: Sequence[Cell], texts: Sequence[Cell]) -> str | None:
        """Explain small differences everywhere, in texts too, by the precision of the server."""
        if _rms([cell.difference for cell in texts]) < self._band / _EXACT:
            return None
        used = next((name for name in PRECISIONS if self._model.weights.startswith(name)), "")
        found = []
        for name in PRECISIONS:
            values = None if name == used else self._scored(self._reload(name), [c.prompt.group for c in cells], cells)
            if values is not None:
                size = _rms([value - cell.ours for value, cell in zip(values, cells, strict=True)])
                left = _rms([value - cell.served for value, cell in zip(values, cells, strict=True)])
                found.append((left, size, name))
        away = _rms([cell.difference for cell in cells])
        left, size, name = min(found, default=(0.0, 0.0, ""))
        if away > _ROUNDINGS * size:
            return None
        return (
            f"dtype: the differences (root mean square {away:.2g}) are of the size that {name} makes here "
            f"({size:.2g} against {used}); serve with --dtype of the model, or compare with --dtype {name}"
        )

    def _unknown(self, cells: Sequence[Cell]) -> str:
        ours, served = (np.array([getattr(cell, name) for cell in cells]) for name in ("ours", "served"))
        alike = np.corrcoef(ours, served)[0, 1] if np.ptp(ours) > 0 and np.ptp(served) > 0 else 0.0
        what = "another template, or weights of lower precision" if alike > 0.9 else "another model, head or template"
        return (
            f"unknown: none of the faults that are tried gives these rewards (correlation with ours {alike:.2f}); "
            f"likely {what}: compare config.json, the weights and chat_template.jinja of what is served"
        )

    def _scored(self, model: RewardModel, groups: Sequence[dict], cells: Sequence[Cell]) -> list[float] | None:
        """Return what a model gives the response of each cell; None if it refuses one of the groups."""
        distinct = {id(cell.prompt): group for cell, group in zip(cells, groups, strict=True)}
        try:
            records = [group_record(group, number) for number, group in enumerate(distinct.values())]
        except RecordError:
            return None
        found = dict(zip(distinct, score_records(model.network, records, 32768), strict=True))
        if any(isinstance(rewards, RecordError) for rewards in found.values()):
            return None
        return [found[id(cell.prompt)][cell.place] for cell in cells]


def _is_miscounted(cell: Cell) -> bool:
    ours, theirs = cell.num_tokens
    return theirs not in (None, 0, ours)


def _rms(values: Sequence[float]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _with_encoder(model: RewardModel, encoder: ConversationEncoder) -> RewardModel:
    """Return the model, its weights shared, with another encoder."""
    network = copy.copy(model.network)
    network.encoder, network.first_use = encoder, None
    return RewardModel(network, model.weights)


def _other_encoder(encoder: ConversationEncoder, template: str) -> ConversationEncoder | None:
    """Return an encoder of another template; None if no response could be rewarded by it."""
    tokenizer = copy.deepcopy(encoder.tokenizer)
    tokenizer.chat_template = template
    try:
        return ConversationEncoder(
            tokenizer, encoder.vision, anchor=encoder.anchor, limits=encoder.limits, date=encoder.date,
            pad_token_id=encoder.pad_token_id,
        )  # fmt: skip
    except ConfigError:
        return None


def _default_system(encoder: ConversationEncoder) -> str:
    """Return the system turn that the template writes in front of a conversation without one; empty for none."""
    from jinja2 import TemplateError

    turns = [{"role": "user", "content": "zq0qz"}]
    try:
        text, again = (encoder.tokenizer.apply_chat_template(turns * n, tokenize=False) for n in (1, 2))
    except TemplateError:  # some templates want roles to alternate
        return ""
    opening, _, rest = again.removeprefix(text).partition("zq0qz")
    head = text.partition("zq0qz")[0]
    return head.removesuffix(opening) if rest and head.endswith(opening) else ""

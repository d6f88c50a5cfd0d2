"""The public class `RewardModel`: a trained reward model as other programs use it."""

import datetime
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from fastrm.data.record import Record
from fastrm.errors import ConfigError, RecordError, option
from fastrm.evaluate.group_scorer import TOKENS_PER_PACK, GroupScorer
from fastrm.evaluate.scoring import score_records
from fastrm.limits import MediaLimits
from fastrm.model.export import kept_date, load_model
from fastrm.model.first_use import FirstUse, weights_of
from fastrm.model.kernel_choice import CHOICES
from fastrm.model.layers import BACKENDS
from fastrm.model.loading import stored_dtype
from fastrm.model.network import RewardNetwork, pick_device
from fastrm.model.places import checked_path
from fastrm.model.reward_statistics import normalization_of
from fastrm.names import checked_dtype

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class RewardModel(GroupScorer):
    """A scorer of responses by an exported reward model.

        model = fastrm.RewardModel.from_pretrained("runs/quickstart/model")
        model.score([{"prompt": "Which digit?", "images": ["7.png"], "responses": ["seven", "two"]}])

    Attributes:
        network: the weights, and the tokeniser and image processor that belong to them; `network.adopted` says in
            words how a head that others trained was read.
        weights: in words, the dtype of the backbone and why it is that.
        date: in words, the date that a chat template which reads the clock is given; "" for another template.
    """

    def __init__(self, network: RewardNetwork, weights: str = "", date: str = ""):
        self.network, self.weights, self.date = network.eval(), weights, date

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: str | int | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        kernels: str = "auto",
        attention: str = "auto",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        template_date: datetime.date | str | None = None,
        limits: MediaLimits = MediaLimits(),
        check_exactness: bool = True,
        normalize: bool = False,
        behind_critique: bool = False,
    ) -> "RewardModel":
        """Load the `model/` folder of a run, or a reward model that others trained (docs/models.md).

        Args:
            device: auto (cuda if there is one), cpu, cuda, or one GPU: cuda:1, 1, torch.device("cuda", 1).
            dtype: of the backbone: fp32, bf16, fp16 (also as float32, torch.bfloat16 ...), or auto: as in the files
                where those are bf16 or fp16, else bf16 on cuda and fp32 on cpu. The final norm of a response's last
                state and the head compute in float32 either way.
            kernels: auto, triton, eager: as in a training configuration.
            attention: auto to follow `kernels`, sdpa, flash, flash_attn, triton.
            min_pixels, max_pixels: images are resized to these limits; default: those of the training run.
            template_date: for a chat template that reads the clock, a date or 2026-07-26; default: that of the
                training run, else today, with which rewards change from day to day.
            limits: an image or a video that declares more is refused before it is decoded.
            check_exactness: before the first rewards of text, of images and of videos, compare two with those of the
                stock transformers class with the same weights. The result is kept in the user's cache
                (first_use.py), so that a model is checked once.
            normalize: subtract the mean of the model's held-out rewards and divide by their deviation, which a run
                stores with its model (`network.reward_statistics`).
            behind_critique: the conversations that are scored end with a critique, so that a critic may score them; it
                is refused otherwise, as is a judge in any case.

        Raises:
            ConfigError: for a value that is none of the choices, if the folder is not a reward model, or
                if the device cannot do what is asked.
            StorageError: if its weights are damaged or incomplete.
        """
        try:
            dtype = checked_dtype(dtype)
        except ValueError as error:
            raise ConfigError(f"{option('dtype')}: {error}") from None
        _check_choice("kernels", kernels, CHOICES)
        _check_choice("attention", attention, ("auto", *BACKENDS))
        target = pick_device(device)
        wanted = None if dtype == "auto" else DTYPES[dtype]
        given = _date(template_date)
        network = load_model(
            Path(checked_path(path)), min_pixels, max_pixels, dtype=wanted, device=target, date=given,
            behind_critique=behind_critique,
        )  # fmt: skip
        network.encoder.limits = limits
        if normalize:
            network.normalization = normalization_of(network.reward_statistics, path)
        network.set_kernels(network.model.dtype, kernels=kernels, attention=attention)
        if check_exactness:
            network.first_use = FirstUse(network, weights_of(path))
        weights = _describe(network.model.dtype, stored_dtype(str(path)), dtype)
        return cls(network, weights, _describe_date(network.encoder.date, given, kept_date(path)))

    @property
    def device(self) -> torch.device:
        """The device that computes."""
        return self.network.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the backbone's weights."""
        return self.network.model.dtype

    @property
    def max_tokens(self) -> int | None:
        """The most tokens of a prompt with one response: `max_position_embeddings` of config.json, None without.

        A longer one is computed, as transformers does, unless the rotary embedding depends on the length (rope_type
        dynamic), where it is refused.
        """
        return getattr(self.network.model.config.get_text_config(), "max_position_embeddings", None)

    def _score(
        self,
        records: Sequence[Record],
        tokens_per_pack: int = TOKENS_PER_PACK,
        num_workers: int = 0,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[list[float] | RecordError]:
        return score_records(
            self.network, records, tokens_per_pack, num_workers, lambda done: progress(done, len(records))
        )


def _describe(used: torch.dtype, stored: torch.dtype, asked: str) -> str:
    names = {dtype: name for name, dtype in DTYPES.items()}
    if used is stored:
        return f"{names[used]}, as in the files"
    why = "as asked for" if asked != "auto" else "on a GPU" if used is torch.bfloat16 else "on a CPU"
    return f"{names[used]} {why}; the files have {names.get(stored, 'fp64')}"


def _date(given: datetime.date | str | None) -> datetime.date | None:
    try:
        return datetime.date.fromisoformat(given) if isinstance(given, str) else given
    except ValueError:
        raise ConfigError(f"{option('template_date')}: got {given!r}, wanted a date such as 2026-07-26") from None


def _describe_date(used: datetime.date | None, given: datetime.date | None, kept: datetime.date | None) -> str:
    if used is None:
        return ""
    if given is not None:
        return f"{used}, as asked for"
    return f"{used}, as in training" if kept is not None else f"{used}, today: the model keeps no date, give it one"


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}: got {value!r}, wanted one of {', '.join(choices)}")

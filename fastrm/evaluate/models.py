"""The models of `fastrm score` and `fastrm eval`, loaded and weighted as the command line says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from fastrm.data.record import Record
from fastrm.errors import ConfigError, RecordError
from fastrm.evaluate.ensemble import VALIDATION_PAIRS, Ensemble, Rewards
from fastrm.evaluate.reading import read_in_order
from fastrm.evaluate.scoring import refuse_non_finite
from fastrm.limits import MediaLimits
from fastrm.model.config_keys import describe_unknown_keys
from fastrm.ui import Display

# The number of validation records that are read at a time.
_CHUNK = 256


@dataclass(frozen=True, kw_only=True)
class ScoringOptions:
    """The options that `score` and `eval` share: the places of rows and images, and settings of the models."""

    images: str | None
    data_format: str
    columns: Mapping[str, str] = field(default_factory=dict)
    ignore: Sequence[str] = ()
    tokens_per_pack: int
    num_workers: int
    device: str
    dtype: str
    max_image_pixels: int
    max_image_bytes: int
    template_date: str | None = None
    max_video_bytes: int = MediaLimits.max_video_bytes
    max_video_seconds: float = MediaLimits.max_video_seconds
    check_exactness: bool = True


@dataclass(frozen=True)
class ModelChoice:
    """The models, and the way to combine their rewards.

    Attributes:
        models: folders of reward models, or one ensemble file.
        combine: mean, accuracy or margin; None: the mean, or what the file says.
        validation: preferences that give the weights of accuracy and margin.
        route: ``text=MODEL``, or None.
        save: the file to write the ensemble to, or None.
    """

    models: tuple[Path, ...]
    combine: str | None = None
    validation: str | None = None
    route: str | None = None
    save: Path | None = None

    def check(self) -> None:
        """Refuse a choice that cannot work, before anything is loaded.

        Raises:
            ConfigError: for no model, a malformed route, or a validation file that is not used.
        """
        if not self.models:
            raise ConfigError("name a model: fastrm eval MODEL... DATA, or --scores FILE for somebody else's scores")
        weighted = self.combine in ("accuracy", "margin")
        if weighted and self.validation is None:
            raise ConfigError(f"--ensemble {self.combine} takes its weights from --validation FILE; name one")
        if weighted and len(self.models) < 2:
            raise ConfigError(f"--ensemble {self.combine} needs two models or more, got {len(self.models)}")
        if self.validation is not None and not weighted:
            raise ConfigError("--validation is for the weights of --ensemble accuracy or margin; add one of them")
        _text_route(self.route)


def open_models(choice: ModelChoice, options: ScoringOptions, display: Display) -> Ensemble:
    """Load the models, fit weights if they are asked for, and save the ensemble if that is asked for.

    Raises:
        ConfigError, StorageError: for models that cannot be used.
        DataError: for validation preferences that give no weights.
    """
    ensemble = Ensemble.from_pretrained(
        list(choice.models),
        combine=choice.combine or "mean",
        text=_text_route(choice.route),
        device=options.device,
        dtype=options.dtype,
        template_date=options.template_date,
        max_image_pixels=options.max_image_pixels,
        max_image_bytes=options.max_image_bytes,
        max_video_bytes=options.max_video_bytes,
        max_video_seconds=options.max_video_seconds,
        check_exactness=options.check_exactness,
    )
    for member in ensemble.models:
        if member.network.first_use is not None:
            member.network.first_use.say = display.say
    for line in dict.fromkeys(f"weights: {member.weights}" for member in ensemble.models):
        display.say(line)
    for line in dict.fromkeys(describe_unknown_keys(member.network.model.config) for member in ensemble.models):
        if line is not None:
            display.say(line)
    for date in dict.fromkeys(member.date for member in ensemble.models if member.date):
        display.say(f"chat template: reads the clock, which stands at {date} (--template-date)")
    for line in dict.fromkeys(member.network.adopted for member in ensemble.models if member.network.adopted):
        display.say(line)
    if choice.validation is not None:
        margins = _validation_margins(ensemble, choice.validation, options, display)
        ensemble.fit_weights(margins)
        weights = ", ".join(
            f"{name} {weight:.4f}" for name, weight in zip(ensemble.names, ensemble.weights, strict=True)
        )
        display.say(f"weights by {choice.combine} on {margins.shape[1]:,} validation preferences: {weights}")
    if choice.save is not None:
        ensemble.save(choice.save)
    return ensemble


def _text_route(route: str | None) -> Path | None:
    if route is None:
        return None
    kind, _, model = route.partition("=")
    if kind != "text" or not model:
        raise ConfigError(f"--route: got {route!r}, wanted text=MODEL, for inputs without images")
    return Path(model)


def _validation_margins(ensemble: Ensemble, validation: str, options: ScoringOptions, display: Display) -> np.ndarray:
    """Return margins (M, E) of the first `VALIDATION_PAIRS` preferences without ties, in the file's order.

    Rows that cannot be scored are left out by name; records that a route takes say nothing of the members.
    """
    rows = read_in_order(validation, None, options.data_format, require_preferences=True)
    update, margins = display.task("validating"), []
    while len(margins) < VALIDATION_PAIRS and (chunk := list(islice(rows, _CHUNK))):
        records = [row for row in chunk if isinstance(row, Record) and not (ensemble.text and not row.media)]
        for row in chunk:
            if not isinstance(row, Record):
                display.say(f"validation row left out: {row[1].message} ({row[1].code})")
        for record, result in zip(
            records, ensemble.score_records(records, options.tokens_per_pack, options.num_workers), strict=True
        ):
            if isinstance(result, RecordError):
                refuse_non_finite(record.origin, result)
                display.say(f"validation row left out: {record.origin}: {result.message} ({result.code})")
            else:
                margins += _margins(record, result)
        update(min(len(margins), VALIDATION_PAIRS), VALIDATION_PAIRS)
    return np.array(margins[:VALIDATION_PAIRS], dtype=np.float64).reshape(-1, len(ensemble.members)).T


def _margins(record: Record, rewards: Rewards) -> list[list[float]]:
    """Return margins (M,) for each preference of a record."""
    return [[member[p.winner] - member[p.loser] for member in rewards.members] for p in record.preferences if not p.tie]

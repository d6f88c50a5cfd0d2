"""The models of `fastrm score` and `fastrm eval`, loaded and weighted as the command line says."""

from itertools import islice

import numpy as np

from fastrm.data.record import Record
from fastrm.errors import RecordError
from fastrm.evaluate.ensemble import VALIDATION_PAIRS, Ensemble, Rewards
from fastrm.evaluate.options import ModelChoice, ScoringOptions
from fastrm.evaluate.reading import read_in_order
from fastrm.evaluate.scoring import refuse_non_finite
from fastrm.model.config_keys import describe_unknown_keys
from fastrm.ui import Display

# The number of validation records that are read at a time.
_CHUNK = 256


def open_models(
    choice: ModelChoice, options: ScoringOptions, display: Display, *, behind_critique: bool = False
) -> Ensemble:
    """Load the models, fit weights if they are asked for, and save the ensemble if that is asked for.

    Args:
        behind_critique: as for `RewardModel.from_pretrained`.

    Raises:
        ConfigError, StorageError: for models that cannot be used.
        DataError: for validation preferences that give no weights.
    """
    ensemble = Ensemble.from_pretrained(
        list(choice.models),
        combine=choice.combine or "mean",
        text=choice.text_model,
        device=options.device,
        dtype=options.dtype,
        template_date=options.template_date,
        limits=options.limits,
        check_exactness=options.check_exactness,
        normalize=options.normalize,
        behind_critique=behind_critique,
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


def _validation_margins(ensemble: Ensemble, validation: str, options: ScoringOptions, display: Display) -> np.ndarray:
    """Return margins (M, E) of the first `VALIDATION_PAIRS` preferences without ties, in the file's order.

    Rows that cannot be scored are left out by name; records that a route takes say nothing of the members.
    """
    rows = read_in_order(validation, None, options.rows.data_format, require_preferences=True)
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

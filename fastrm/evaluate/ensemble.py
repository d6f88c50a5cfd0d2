"""Several reward models as one: mean or weighted rewards, and another model for inputs without images.

The plain mean of raw rewards is the default, as in BaseReward [P]. Its weighted forms [P] take weights from
1,000 validation preferences: each member's accuracy, or its mean chosen-minus-rejected margin, normalised to sum
to 1. An ensemble of one model is that model.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, model_validator

from fastrm.data.record import Record, VideoRef
from fastrm.data.template import ConversationEncoder
from fastrm.errors import ConfigError, DataError, RecordError, option
from fastrm.evaluate.group_scorer import TOKENS_PER_PACK, GroupScorer
from fastrm.evaluate.reward_model import RewardModel
from fastrm.evaluate.scoring import score_with_each
from fastrm.model.places import checked_path
from fastrm.storage import write_whole
from fastrm.yaml_files import dump_yaml, read_yaml, validate

COMBINATIONS = ("mean", "accuracy", "margin")
VALIDATION_PAIRS = 1000  # [P]
SUFFIXES = (".yaml", ".yml")
_SUM_TOLERANCE = 1e-6  # tolerance of the sum of a file's weights, which may be rounded


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Route(_Strict):
    """The inputs that go to another model."""

    text: str
    """The reward model for inputs without images and videos, a folder."""


class EnsembleFile(_Strict):
    """The file of an ensemble, in which folders are relative to the file."""

    members: tuple[str, ...]
    """The reward models, each the model/ folder of a run."""
    combine: Literal["mean", "accuracy", "margin"] = "mean"
    """The way to combine rewards; accuracy and margin name the source of the weights."""
    weights: tuple[float, ...] | None = None
    """The weights of the members, which sum to 1; none for the mean."""
    route: Route | None = None
    """The inputs that go to another model."""

    @model_validator(mode="after")
    def _check(self):
        if not self.members:
            raise ValueError("members is empty; name at least one reward model")
        if self.combine == "mean":
            if self.weights is not None:
                raise ValueError("combine: mean takes no weights; leave them out, or set combine: accuracy or margin")
            return self
        if self.weights is None or len(self.weights) != len(self.members):
            got = "none" if self.weights is None else str(len(self.weights))
            raise ValueError(f"combine: {self.combine} needs {len(self.members)} weights, got {got}")
        if not all(weight >= 0 for weight in self.weights) or abs(sum(self.weights) - 1) > _SUM_TOLERANCE:
            raise ValueError(f"weights are {list(self.weights)}, wanted numbers from 0 that sum to 1")
        return self


@dataclass(frozen=True)
class Rewards:
    """The rewards of one record.

    Attributes:
        combined: (R,) the ensemble's reward of each response.
        members: (R,) of each member; where a route took the record, the route's rewards for all of them.
    """

    combined: list[float]
    members: list[list[float]]

    def take(self, places: Sequence[int]) -> "Rewards":
        """Return the rewards of some of the responses."""
        combined = [self.combined[place] for place in places]
        return Rewards(combined, [[rewards[place] for place in places] for rewards in self.members])


class Ensemble(GroupScorer):
    """An ensemble that scores responses with several reward models, as `RewardModel` does with one.

        ensemble = fastrm.Ensemble.from_pretrained(["runs/a/model", "runs/b/model"])
        ensemble.score([{"prompt": "Which digit?", "images": ["7.png"], "responses": ["seven", "two"]}])

    A group that one member cannot score is not scored. All models are held in memory on one device and run one after
    another. Members that read inputs alike share decoding, tokenisation and packs.

    Attributes:
        members: the reward models.
        names: of the members, for reports.
        combine: mean, accuracy or margin.
        weights: one for each member; None: the plain mean.
        text: the model for inputs without images and videos; None: the members.
    """

    def __init__(
        self,
        members: Sequence[RewardModel],
        names: Sequence[str] | None = None,
        *,
        combine: str = "mean",
        weights: Sequence[float] | None = None,
        text: RewardModel | None = None,
        text_name: str | None = None,
    ):
        if not members:
            raise ConfigError("an ensemble needs at least one reward model")
        if combine not in COMBINATIONS:
            raise ConfigError(f"ensemble: got {combine!r}, wanted one of {', '.join(COMBINATIONS)}")
        self.members = list(members)
        self.names = list(names or (f"member {number}" for number in range(1, len(members) + 1)))
        self.combine = combine
        self.weights = None if weights is None else list(weights)
        self.text, self.text_name = text, text_name

    @property
    def models(self) -> list[RewardModel]:
        """The members, and the model of the route."""
        return self.members if self.text is None else [*self.members, self.text]

    @classmethod
    def from_pretrained(
        cls,
        models: str | Path | Sequence[str | Path],
        *,
        combine: str = "mean",
        weights: Sequence[float] | None = None,
        text: str | Path | None = None,
        **options,
    ) -> "Ensemble":
        """Load an ensemble file, or reward models.

        Args:
            models: a YAML file that `save` wrote, or one or more folders of reward models.
            combine, weights, text: of a list of models; a file has its own.
            options: of `RewardModel.from_pretrained`, for every model.

        Raises:
            ConfigError, StorageError: as `RewardModel.from_pretrained`, or for a file that cannot be used.
        """
        is_one = isinstance(models, (str, bytes, os.PathLike)) or not isinstance(models, Iterable)
        paths = [checked_path(path) for path in ([models] if is_one else models)]
        if len(paths) == 1 and Path(paths[0]).suffix in SUFFIXES:
            if combine != "mean" or weights is not None or text is not None:
                raise ConfigError(f"{paths[0]}: is an ensemble with its own weights and route; change them in the file")
            return cls._from_file(Path(paths[0]), options)
        for path in paths:
            if Path(path).suffix in SUFFIXES:
                raise ConfigError(f"{path}: an ensemble cannot be a member of another; name its members")
        loaded = [RewardModel.from_pretrained(path, **options) for path in paths]
        text_model = None if text is None else RewardModel.from_pretrained(text, **options)
        text_name = None if text is None else str(text)
        return cls(
            loaded,
            [str(path) for path in paths],
            combine=combine,
            weights=weights,
            text=text_model,
            text_name=text_name,
        )

    @classmethod
    def _from_file(cls, file: Path, options: dict) -> "Ensemble":
        tree, places = read_yaml(file)
        settings = validate(EnsembleFile, tree, places, str(file))

        def place(name: str) -> str:
            return os.path.normpath(file.parent / name)

        return cls.from_pretrained(
            [place(name) for name in settings.members],
            combine=settings.combine,
            weights=settings.weights,
            text=None if settings.route is None else place(settings.route.text),
            **options,
        )

    def save(self, file: str | Path) -> None:
        """Write the ensemble as a YAML file, usable wherever a model folder is; the models stay in their places.

        Raises:
            ConfigError: accuracy or margin without weights yet.
            StorageError: the file cannot be written.
        """
        file = Path(file)
        if self.combine != "mean" and self.weights is None:
            raise ConfigError(f"{file}: combine: {self.combine} has no weights yet; fit them with a validation file")
        tree = {"members": [_relative(name, file) for name in self.names], "combine": self.combine}
        if self.weights is not None:
            tree["weights"] = self.weights
        if self.text is not None:
            tree["route"] = {"text": _relative(self.text_name, file)}
        write_whole(file, dump_yaml(tree))

    def _score(
        self,
        records: Sequence[Record],
        tokens_per_pack: int = TOKENS_PER_PACK,
        num_workers: int = 0,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[list[float] | RecordError]:
        results = self.score_records(records, tokens_per_pack, num_workers, progress)
        return [result if isinstance(result, RecordError) else result.combined for result in results]

    def score_records(
        self,
        records: Sequence[Record],
        tokens_per_pack: int,
        num_workers: int = 0,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[Rewards | RecordError]:
        """Return the rewards of each record's responses, or why it could not be scored, in order.

        A record that one member cannot score is not scored at all.

        Args:
            progress: called with (passes done, passes in all); a record takes one for each set of
                members that read it alike.
        """
        routed = [self._is_routed(record) for record in records]
        parts = [(list(self.members), [number for number, text in enumerate(routed) if not text])]
        parts.append(([self.text] * (self.text is not None), [number for number, text in enumerate(routed) if text]))
        jobs = [
            (models, places, numbers)
            for models, numbers in parts
            if numbers
            for places in sharing(models, _have_videos(records[number] for number in numbers))
        ]
        total, before = sum(len(numbers) for _, _, numbers in jobs), 0
        by_model: dict[int, dict[int, list[float] | RecordError]] = {}
        for models, places, numbers in jobs:
            results = score_with_each(
                [models[place].network for place in places], [records[number] for number in numbers],
                tokens_per_pack, num_workers, lambda done, before=before: progress(before + done, total),
            )  # fmt: skip
            before += len(numbers)
            for number, result in zip(numbers, results, strict=True):
                rows = [result] * len(places) if isinstance(result, RecordError) else result
                by_model.setdefault(number, {}).update(zip(places, rows, strict=True))
        return [self._joined(by_model[number], routed[number]) for number in range(len(records))]

    def scoring(self, record: Record) -> list[RewardModel]:
        """Return the models that score a record: the members, or the model of the route."""
        return [self.text] if self._is_routed(record) else self.members

    def _is_routed(self, record: Record) -> bool:
        return self.text is not None and not record.media

    def _joined(self, by_model: dict[int, list[float] | RecordError], routed: bool) -> Rewards | RecordError:
        rewards = [by_model[place] for place in sorted(by_model)]
        error = next((result for result in rewards if isinstance(result, RecordError)), None)
        if error is not None:
            return error
        if routed:
            return Rewards(rewards[0], rewards * len(self.members))
        return Rewards(combine(rewards, self.weights), rewards)

    def fit_weights(self, margins: np.ndarray) -> None:
        """Set the weights of accuracy or margin from validation preferences.

        Args:
            margins: (M, E) chosen-minus-rejected rewards of every member on every pair.

        Raises:
            DataError: they give no weights.
        """
        self.weights = validation_weights(self.combine, margins, self.names)


def combine(members: Sequence[Sequence[float]], weights: Sequence[float] | None) -> list[float]:
    """Combine the members' rewards (M, R) to (R,): their plain mean, or their sum with weights (M,)."""
    if weights is None:
        return [sum(rewards) / len(rewards) for rewards in zip(*members, strict=True)]
    return [sum(w * r for w, r in zip(weights, rewards, strict=True)) for rewards in zip(*members, strict=True)]


def validation_weights(how: str, margins: np.ndarray, names: Sequence[str]) -> list[float]:
    """Compute weights of the members, summing to 1.

    Args:
        how: accuracy (share of positive margins) or margin (their mean).
        margins: (M, E).

    Raises:
        DataError: for no pairs, a negative mean margin, or margins that are all zero.
    """
    pairs, setting = option("validation", "margins"), option("ensemble", "combine")
    if margins.shape[1] == 0:
        raise DataError(
            f"{pairs}: has no preference that every member could score; name others (inputs that a route sends "
            "elsewhere do not count)"
        )
    values = (margins > 0).mean(axis=1) if how == "accuracy" else margins.mean(axis=1)
    for name, value in zip(names, values, strict=True):
        if value < 0:
            raise DataError(
                f"{setting} {how}: {name} has a mean margin of {value:.4g} on the validation preferences: it prefers "
                "the rejected responses; leave it out, or use mean or accuracy"
            )
    if not values.sum() > 0:
        raise DataError(
            f"{setting} {how}: every member's {how} is 0 on the validation preferences, which gives no weights; use "
            "mean, or other preferences"
        )
    return (values / values.sum()).tolist()


def _have_videos(records: Iterable[Record]) -> bool:
    return any(isinstance(ref, VideoRef) for record in records for ref in record.media)


def sharing(models: Sequence[RewardModel], has_videos: bool) -> list[list[int]]:
    """Return the places of the models in groups, each of models that read inputs with, or without, videos alike."""
    alike: dict[str, list[int]] = {}
    for place, model in enumerate(models):
        key = f"{model.network.device} {_reading(model.network.encoder, has_videos)}"
        alike.setdefault(key, []).append(place)
    return list(alike.values())


def _reading(encoder: ConversationEncoder, has_videos: bool) -> str:
    """Return a text that is equal for encoders with the same tokens, positions and pixels of a conversation."""
    tokenizer = encoder.tokenizer
    vision = {} if encoder.vision is None else dict(vars(encoder.vision))
    if not has_videos:
        # In Qwen2-VL and Qwen2.5-VL images have the same positions; only those of videos depend on tokens_per_second.
        vision.pop("tokens_per_second", None)
    settings = {
        name: value.to_json_string() if hasattr(value, "to_json_string") else repr(value)
        for name, value in vision.items()
    }
    return repr(
        (
            tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, encoder.anchor, encoder.limits,
            encoder.anchor == "before_padding" and encoder.pad_token_id, type(encoder.vision).__name__, settings,
        )
    )  # fmt: skip


def _relative(name: str, file: Path) -> str:
    return os.path.relpath(name, file.parent)

"""A served model: it prepares groups one by one, in any thread, and computes packs of them, in one.

A model is an `Ensemble`, often of one member. Members that read inputs alike share a reading: one encoder, one
tokenisation and one pack. A group that a route takes has the reading of the route's model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch

from fastrm.data.group import GroupSize
from fastrm.data.media.format import Patches
from fastrm.data.packing import EncodedGroup
from fastrm.data.record import Message, Record, Response
from fastrm.data.template import ConversationEncoder
from fastrm.errors import RecordError
from fastrm.evaluate.ensemble import Ensemble, combine, sharing
from fastrm.evaluate.merging import PromptGroup
from fastrm.evaluate.reward_model import RewardModel
from fastrm.evaluate.scoring import Ready, make_ready, score_encoded
from fastrm.model.network import RewardNetwork
from fastrm.serve.caches import BoundedCache, remembering_images
from fastrm.serve.rendered_text import RenderedTextReader

# On a CPU a product with the head's one output computes rows in fours and the rest by other code: with a multiple of
# four, each row is the same to the bit wherever it stands (MKL 2024.2 in float32: tests/serve/test_scheduler.py).
RESPONSE_MULTIPLE = 4


class Reading(NamedTuple):
    """The members that read inputs alike: their places in the ensemble, and the encoder that they share."""

    places: list[int]
    networks: list[RewardNetwork]
    encoder: ConversationEncoder


@dataclass(frozen=True)
class Prepared:
    """A group that can be packed.

    Attributes:
        record: its prompt and responses.
        is_routed: the route's model scores it.
        ready: its tokens, for each reading.
        places: of each of its responses among the distinct ones.
    """

    record: Record
    is_routed: bool
    ready: tuple[Ready, ...]

    @property
    def places(self) -> list[int]:
        return self.ready[0].places

    @property
    def num_tokens(self) -> int:
        """The tokens of the group by itself, each shared run of them counted once."""
        return max(one.counted.num_tokens for one in self.ready)

    @property
    def key(self) -> tuple:
        """The key of the prompt with its images and of who scores it: groups of equal keys can be joined."""
        return self.is_routed, self.record.prompt_key


def join(parts: Sequence[Prepared]) -> tuple[Prepared, list[list[int]]]:
    """Return one group with the distinct responses of all, and the places in it of each part's responses.

    Args:
        parts: one or more groups of one key.
    """
    if len(parts) == 1:
        return parts[0], [parts[0].places]
    merged = PromptGroup()
    found: dict[tuple, tuple[int, int]] = {}  # key of a response -> its part, and its place among the distinct ones
    for number, part in enumerate(parts):
        merged.add(number, part.record)
        for response, place in zip(part.record.responses, part.places, strict=True):
            found.setdefault(response.key, (number, place))
    record = replace(parts[0].record, responses=tuple(merged.responses.values()), preferences=())
    ready = tuple(_join_reading(parts, reading, found) for reading in range(len(parts[0].ready)))
    return Prepared(record, parts[0].is_routed, ready), merged.places


def _join_reading(parts: Sequence[Prepared], reading: int, found: dict[tuple, tuple[int, int]]) -> Ready:
    responses = tuple(parts[number].ready[reading].group.responses[place] for number, place in found.values())
    group = replace(parts[0].ready[reading].group, responses=responses)
    return Ready(0, group, GroupSize.of(group), list(range(len(responses))))


class Scorer:
    """A model under the name by which requests ask for it.

    Args:
        name: of the model.
        ensemble: the model, or several that answer as one.
        tokens_per_pack: token budget of a pack; a group with more is refused.
        images: keeps decoded images; None: each is decoded when its pack is built.
    """

    def __init__(
        self, name: str, ensemble: Ensemble, tokens_per_pack: int, images: BoundedCache[Patches] | None = None
    ):
        self.name, self.ensemble, self.tokens_per_pack = name, ensemble, tokens_per_pack
        self.keeps_images = images is not None
        self._members = _readings(ensemble.members, images)
        self._route = _readings([ensemble.text] if ensemble.text is not None else [], images)

    @cached_property
    def reader(self) -> RenderedTextReader:
        """The reader of texts that were rendered with the first member's chat template."""
        return RenderedTextReader(self.ensemble.members[0].network.encoder)

    def is_routed(self, record: Record) -> bool:
        """Return whether the route's model scores a group, which depends on all of its responses."""
        return self.ensemble.text is not None and not record.media

    def prepare(self, record: Record, is_routed: bool) -> Prepared:
        """Tokenise a group and decode its images into the cache; may be called from any thread.

        Args:
            record: the group, or a part of its responses.
            is_routed: of the whole group.

        Raises:
            RecordError: the codes of `RewardModel.score`.
        """
        ready = [self._prepare(record, reading) for reading in self._readings_of(is_routed)]
        return Prepared(record, is_routed, tuple(ready))

    def _prepare(self, record: Record, reading: Reading) -> Ready:
        encoder = reading.encoder.looking_anew()
        ready = make_ready(0, record, encoder, reading.networks, self.tokens_per_pack)
        if self.keeps_images:
            # In this thread, so that the one that computes finds them decoded.
            sizes = {span.ref.key: span for response in ready.group.responses for span in response.media}
            for span in sizes.values():
                encoder.vision.cut(span.ref, span.size, encoder.limits)
        return ready

    def run(self, groups: Sequence[Prepared]) -> list[list[float] | RecordError]:
        """Compute the rewards of the groups' distinct responses, in order, in as few packs as can be.

        Raises:
            ExactnessError: as `RewardModel.score`.
        """
        results: list[list[float] | RecordError | None] = [None] * len(groups)
        for is_routed in (False, True):
            numbers = [number for number, group in enumerate(groups) if group.is_routed == is_routed]
            if numbers:
                found = self._run([groups[number] for number in numbers], is_routed)
                for number, result in zip(numbers, found, strict=True):
                    results[number] = result
        return results

    def _readings_of(self, is_routed: bool) -> list[Reading]:
        return self._route if is_routed else self._members

    def _run(self, groups: Sequence[Prepared], is_routed: bool) -> list[list[float] | RecordError]:
        rows: list[dict[int, list[float]] | RecordError] = [{} for _ in groups]
        for number, reading in enumerate(self._readings_of(is_routed)):
            ready = [group.ready[number] for group in groups]
            encoded, sizes = [one.group for one in ready], [one.counted for one in ready]
            if padding := self._padding(reading, encoded):
                encoded.append(padding.group)
                sizes.append(padding.counted)
            for pack in score_encoded(reading.networks, encoded, sizes, reading.encoder, self.tokens_per_pack):
                for place, result in pack:
                    if place == len(groups):  # the padding
                        continue
                    rows[place] = _with(rows[place], reading.places, result)
        weights = None if is_routed else self.ensemble.weights
        return [
            row if isinstance(row, RecordError) else combine([row[place] for place in sorted(row)], weights)
            for row in rows
        ]

    def _padding(self, reading: Reading, encoded: Sequence[EncodedGroup]) -> Ready | None:
        """Return a group that makes the responses a multiple of RESPONSE_MULTIPLE, or None if they are one.

        With it no bit of a small model's reward depends on the other groups of the pack.
        """
        missing = -sum(len(group.responses) for group in encoded) % RESPONSE_MULTIPLE
        if not missing or reading.networks[0].device.type != "cpu":
            return None
        messages = (Message("user", ("a",)), Message("assistant", ("b",)))
        response = reading.encoder.encode(Response(messages))
        group = replace(encoded[0], responses=(response,) * missing)
        return Ready(0, group, GroupSize.of(group), [])


def _with(
    row: dict[int, list[float]] | RecordError, places: list[int], result: torch.Tensor | RecordError
) -> dict[int, list[float]] | RecordError:
    """Return the members' rewards of a group with those of one more reading, or why one cannot score it."""
    if isinstance(row, RecordError) or isinstance(result, RecordError):
        return row if isinstance(row, RecordError) else result
    return row | dict(zip(places, result.tolist(), strict=True))


def _readings(models: list[RewardModel], images: BoundedCache[Patches] | None) -> list[Reading]:
    readings = []
    for places in sharing(models, has_videos=True) if models else []:
        encoder = models[places[0]].network.encoder
        if images is not None:
            encoder = remembering_images(encoder, images)
        readings.append(Reading(places, [models[place].network for place in places], encoder))
    return readings

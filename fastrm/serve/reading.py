"""The reading of a request's group: its bounds, the rewards that are known already, and what is left to compute."""

from dataclasses import replace
from typing import NamedTuple

from fastrm.data.record import Record
from fastrm.data.sources.layouts.groups import group_record
from fastrm.data.sources.media import Resolve
from fastrm.errors import RecordError
from fastrm.serve.caches import BoundedCache, is_known_by_content, response_digests
from fastrm.serve.scorer import Prepared, Scorer


class Read(NamedTuple):
    """A group whose responses were looked up.

    Attributes:
        known: the rewards that are known, by the digests of `keys`.
        prepared: the other responses; None if there are none.
        keys: of all responses, in order; empty where rewards must not be kept.
    """

    known: dict[bytes, float]
    prepared: Prepared | None
    keys: list[bytes]


class GroupReader:
    """The way from a group as it was sent to a `Prepared` one; any number of threads may share it.

    Args:
        rewards: keeps the rewards of responses.
        max_responses: of a group.
    """

    def __init__(self, rewards: BoundedCache[float], max_responses: int):
        self._rewards, self._max_responses = rewards, max_responses

    def read(self, scorer: Scorer, group: dict, index: int, resolve: Resolve) -> Read:
        """Return what is known of a group and what has to be computed.

        Raises:
            RecordError: TOO_MANY_RESPONSES, before any work for them; as `group_record` and `Scorer.prepare`.
        """
        self._check_count(group)
        record = group_record(group, index, resolve=resolve)
        is_routed = scorer.is_routed(record)
        if record.preferences or not self._rewards.capacity or not is_known_by_content(record):
            return Read({}, scorer.prepare(record, is_routed), [])
        return self._look_up(scorer, record, is_routed)

    def complete(self, read: Read, rewards: list[float]) -> list[float]:
        """Return the rewards of all responses of a group, and keep those that were computed."""
        if not read.keys:
            return rewards
        computed = zip((key for key in read.keys if key not in read.known), rewards, strict=True)
        found = read.known | dict(computed)
        for key, reward in found.items():
            self._rewards.store(key, reward)
        return [found[key] for key in read.keys]

    def _check_count(self, group: object) -> None:
        responses = group.get("responses") if isinstance(group, dict) else None
        if isinstance(responses, (list, tuple)) and len(responses) > self._max_responses:
            raise RecordError(
                "TOO_MANY_RESPONSES",
                f"the group has {len(responses):,} responses, limit {self._max_responses:,} (--max-responses); "
                "send them as several groups",
            )

    def _look_up(self, scorer: Scorer, record: Record, is_routed: bool) -> Read:
        keys = response_digests(scorer.name, is_routed, record)
        known = {key: reward for key in set(keys) if (reward := self._rewards.get(key)) is not None}
        missing = [response for key, response in zip(keys, record.responses, strict=True) if key not in known]
        prepared = scorer.prepare(replace(record, responses=tuple(missing)), is_routed) if missing else None
        return Read(known, prepared, keys)

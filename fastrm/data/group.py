"""A group: one prompt with its responses, of one record or of several; and the counts by which groups are batched.

Counting tokenises every conversation and reads media headers only; images are decoded when a pack needs
them. Afterwards the order and the packs of every step follow from the counts alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from fastrm.config import Config
from fastrm.data.media.format import MediaSpan
from fastrm.data.packing import EncodedGroup
from fastrm.data.record import Preference, Record, Response
from fastrm.data.template import ConversationEncoder, EncodedResponse, too_long
from fastrm.errors import RecordError

# Records of one prompt are merged up to this many responses. More would save little, and a step that is
# mostly one prompt is a poor batch.
MAX_MERGED_RESPONSES = 16


class GroupMedium(NamedTuple):
    """One image or video of a group: its key, and its size in merged patches, which are its tokens.

    A prepared set numbers its media; elsewhere keys are `MediaRef.key`. A video has several `frames`.
    """

    key: str | int
    height: int
    width: int
    frames: int = 1

    @property
    def num_tokens(self) -> int:
        return self.frames * self.height * self.width


@dataclass(frozen=True)
class GroupSize:
    """Token counts of a group, as batching needs them.

    Attributes:
        num_tokens: of the group's tree.
        num_attention_pairs: query-key pairs of one causal layer over the tree.
        media: distinct images and videos, in order.
        num_lead_tokens: tokens up to the end of the first one, which groups that begin with the same
            medium share in a pack; 0 without media, or if nothing is shared.
    """

    num_tokens: int
    num_preferences: int
    num_attention_pairs: int = 0
    media: tuple[GroupMedium, ...] = ()
    num_lead_tokens: int = 0

    @classmethod
    def of(cls, group: EncodedGroup, share: bool = True) -> "GroupSize":
        """Count a tokenised group; `share`: packs will hold it as a prefix tree."""
        tree = group.tree(share)
        spans = [span for response in group.responses for span in response.media]
        sizes = {span.ref.key: span.size for span in spans}
        return cls(
            num_tokens=sum(tree.lengths),
            num_preferences=len(group.preferences),
            num_attention_pairs=tree.num_attention_pairs,
            media=tuple(GroupMedium(key, size.height, size.width, size.frames) for key, size in sizes.items()),
            num_lead_tokens=_end_of_first(spans) if share and spans else 0,
        )

    @property
    def first_medium(self) -> str | int | None:
        return self.media[0].key if self.media else None


def _end_of_first(spans: Sequence[MediaSpan]) -> int:
    """Return the token behind the last run of the first medium, from the runs of a group's responses in order."""
    last = spans[0]
    for span in spans[1:]:
        if span.ref.key != last.ref.key or not 0 < span.first_token == last.first_token + last.num_tokens:
            break
        last = span
    return last.stop


def encode_group(record: Record, encoder: ConversationEncoder) -> EncodedGroup:
    """Tokenise all responses of a record.

    Raises:
        RecordError: as `ConversationEncoder.encode`.
    """
    responses = tuple(encoder.encode(response) for response in record.responses)
    return EncodedGroup(record.id, record.source, record.origin, responses, record.preferences)


def encode_within(record: Record, encoder: ConversationEncoder, max_tokens: int) -> EncodedGroup:
    """Tokenise all responses of a record that may have so many tokens together, but not those of one far over that.

    Raises:
        RecordError: as `ConversationEncoder.encode`; TOO_LONG for more than about twice `max_tokens`.
    """
    encoder, num_tokens, before = encoder.up_to(max_tokens), 0, np.zeros(0, dtype=np.int64)
    encoded: dict[int, EncodedResponse] = {}
    # In the order of their texts, so that those that share a beginning, which is counted once, are neighbours.
    for number in sorted(range(len(record.responses)), key=lambda number: record.responses[number].text):
        encoded[number] = encoder.encode(record.responses[number])
        tokens = encoded[number].tokens
        num_tokens, before = num_tokens + len(tokens) - num_common(before, tokens), tokens
        if num_tokens > 2 * max_tokens:
            raise too_long(max_tokens)
    responses = tuple(encoded[number] for number in range(len(encoded)))
    return EncodedGroup(record.id, record.source, record.origin, responses, record.preferences)


def num_common(first: np.ndarray, second: np.ndarray) -> int:
    """Return the number of tokens with which two conversations (n,) and (m,) begin alike."""
    length = min(len(first), len(second))
    differs = np.flatnonzero(first[:length] != second[:length])
    return int(differs[0]) if len(differs) else length


def resolve_preferences(record: Record, config: Config) -> tuple[Record, int]:
    """Apply loss.ties and optim.group_weight; return (record with final edges, number of ties left out)."""
    edges: list[Preference] = []
    ignored = 0
    for p in record.preferences:
        if not p.tie:
            edges.append(p)
        elif config.loss.ties == "half":
            edges.append(replace(p, weight=p.weight / 2))
            edges.append(replace(p, winner=p.loser, loser=p.winner, weight=p.weight / 2, margin=-p.margin))
        else:
            ignored += 1
    if config.optim.group_weight == "group" and edges:
        total, mean = sum(p.weight for p in edges), sum(p.weight for p in edges) / len(edges)
        edges = [replace(p, weight=p.weight * mean / total) for p in edges]
    return replace(record, preferences=tuple(edges)), ignored


def join_records(parts: list[Record]) -> Record:
    """Return one record with the distinct responses of all, and all their preferences."""
    if len(parts) == 1:
        return parts[0]
    responses: dict[tuple, int] = {}
    kept: list[Response] = []
    preferences: list[Preference] = []
    for record in parts:
        numbers = []
        for response in record.responses:
            key = response.key
            if key not in responses:
                responses[key] = len(kept)
                kept.append(response)
            numbers.append(responses[key])
        preferences += [replace(p, winner=numbers[p.winner], loser=numbers[p.loser]) for p in record.preferences]
    return replace(parts[0], responses=tuple(kept), preferences=tuple(preferences))


def check_distinct(group: EncodedGroup) -> None:
    """Refuse a preference between responses of equal tokens and media, such as texts that a template trims.

    Raises:
        RecordError: IDENTICAL_RESPONSES.
    """
    for preference in group.preferences:
        winner, loser = group.responses[preference.winner], group.responses[preference.loser]
        same_media = [span.ref.key for span in winner.media] == [span.ref.key for span in loser.media]
        is_pair = not (preference.tie or preference.is_rating)
        if is_pair and same_media and np.array_equal(winner.tokens, loser.tokens):
            raise RecordError(
                "IDENTICAL_RESPONSES",
                f"response {preference.winner} is preferred to response {preference.loser}, but the chat template "
                f"makes the same {len(winner.tokens):,} tokens of both, so that their rewards are always equal; remove "
                "the preference",
            )


def check_length(num_tokens: int, config: Config) -> None:
    """Refuse a group whose tree is over data.max_tokens_per_group.

    Raises:
        RecordError: TOO_LONG.
    """
    limit = config.data.max_tokens_per_group
    if num_tokens > limit:
        raise RecordError(
            "TOO_LONG",
            f"the group has {num_tokens:,} tokens, limit {limit:,}; raise data.max_tokens_per_group "
            "(and optim.tokens_per_pack), or lower data.max_pixels; nothing is ever truncated",
        )

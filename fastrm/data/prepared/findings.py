"""Findings in a source's preferences: pairs that contradict each other, and a preference for length.

A reward model learns length where the chosen responses are the longer ones, whatever else they are. Both findings are
computed on one row of `PAIR` for each preference that is not a tie.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fastrm.data.record import Record

PAIR = np.dtype(
    [
        ("key", "<u8"),  # of the two responses with their prompts, in either order
        ("is_swapped", "?"),  # whether the response with the greater hash is chosen
        ("chosen", "<u4"),  # characters of the response
        ("rejected", "<u4"),
        ("row", "<u4"),  # of the file, as origins count
        ("file", "<u4"),  # number of the file in its source; 0 unless files are numbered
    ]
)


# Shares of preferences for the longer response between which no preference for length is reported, and how many
# pairs are needed to report one.
EVEN = (0.4, 0.6)
_ENOUGH = 100


@dataclass(frozen=True)
class PairFindings:
    """The findings in the preferences of one source, without ties.

    Attributes:
        num_pairs: number of preferences.
        contradicting: number of pairs of responses that are preferred both ways.
        example: (file, row) of the first such pair, one for each way; None without any.
        longer, shorter: preferences whose chosen response has more, or fewer, characters than the rejected one.
        chosen, rejected: median characters; 0 without pairs.
    """

    num_pairs: int
    contradicting: int
    example: tuple[tuple[int, int], tuple[int, int]] | None
    longer: int
    shorter: int
    chosen: int
    rejected: int

    @property
    def share_longer(self) -> float | None:
        """The share of pairs whose longer response is chosen, among pairs of different lengths."""
        unequal = self.longer + self.shorter
        return self.longer / unequal if unequal else None

    @property
    def contradiction(self) -> str | None:
        """A sentence about pairs that are preferred both ways; None without any."""
        if not self.contradicting:
            return None
        pairs = "pair of responses is" if self.contradicting == 1 else "pairs of responses are"
        return f"{self.contradicting:,} {pairs} preferred both ways"

    @property
    def liking(self) -> str | None:
        """A sentence about a preference for length that a model may learn; None if it is weak."""
        share = self.share_longer
        if share is None or self.longer + self.shorter < _ENOUGH or EVEN[0] <= share <= EVEN[1]:
            return None
        length = "longer" if share > EVEN[1] else "shorter"
        return (
            f"a model that only prefers the {length} response is right in {100 * max(share, 1 - share):.3g} % of the "
            "preferences, and may learn just that"
        )


def bare_sentence(lesson: str, count: int) -> str | None:
    """Return the sentence about texts that teach a model no writing; None without any.

    Args:
        lesson: what they have not, as `TextReading.lesson`.
    """
    if not count:
        return None
    if lesson == "critique":
        what = "response has" if count == 1 else "responses have"
        return f"{count:,} {what} no critique: their rewards are read behind an empty one"
    what = "text of a judge has" if count == 1 else "texts of judges have"
    return f"{count:,} {what} no thinking: they teach the verdict alone"


def pair_rows(record: Record, responses: Sequence[bytes]) -> Iterator[tuple]:
    """Yield the rows of `PAIR` of a record.

    Args:
        responses: `response_hash` of each.
    """
    row = record.origin.rpartition(":")[2]
    row = int(row) if row.isdecimal() else 0
    for p in record.preferences:
        if not (p.tie or p.is_rating):
            winner, loser = responses[p.winner], responses[p.loser]
            key = hashlib.blake2b(min(winner, loser) + max(winner, loser), digest_size=8).digest()
            lengths = (len(record.responses[number].text) for number in (p.winner, p.loser))
            yield int.from_bytes(key, "little"), winner > loser, *lengths, row, 0


def find_in_pairs(pairs: np.ndarray) -> PairFindings:
    """Compute the findings in rows of `PAIR`; equal pairs of one direction count once as contradicting."""
    keys, first, which = np.unique(pairs["key"], return_index=True, return_inverse=True)
    is_swapped = np.bincount(which, weights=pairs["is_swapped"], minlength=len(keys)) > 0
    is_straight = np.bincount(which, weights=~pairs["is_swapped"], minlength=len(keys)) > 0
    both = np.flatnonzero(is_swapped & is_straight)
    example = None
    if len(both):
        mine = pairs[which == both[np.argmin(first[both])]]
        other = mine[mine["is_swapped"] != mine["is_swapped"][0]]
        example = tuple((int(pair["file"]), int(pair["row"])) for pair in (mine[0], other[0]))
    chosen, rejected = pairs["chosen"].astype(np.int64), pairs["rejected"].astype(np.int64)
    return PairFindings(
        num_pairs=len(pairs),
        contradicting=len(both),
        example=example,
        longer=int((chosen > rejected).sum()),
        shorter=int((chosen < rejected).sum()),
        chosen=int(np.median(chosen)) if len(pairs) else 0,
        rejected=int(np.median(rejected)) if len(pairs) else 0,
    )

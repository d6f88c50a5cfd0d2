"""Single elimination between the responses of a row: who meets whom next, and how far each response came."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastrm.data.record import Record
from fastrm.prompts.verdicts import Verdict, majority

Order = tuple[int, ...]
Verdicts = Mapping[tuple[str, Order], Sequence]


@dataclass(frozen=True)
class Standings:
    """The state of one row's bracket.

    Attributes:
        next_round: the ordered pairs of the first round that has not been judged whole, each match in both orders;
            empty when the bracket has ended.
        rewards: the share of the rounds that each response survived, None for one that met another in a match without a
            verdict; None before the end.
    """

    next_round: list[Order]
    rewards: list[float | None] | None


def play(record: Record, seed: int, texts: Verdicts) -> Standings:
    """Return the state of a row's bracket, played as far as verdicts go.

    n responses need ceil(log2 n) rounds and n - 1 matches. The draw is made by the seed and the row's id, not by the
    order in the row, where published files have the preferred response first. The first of the draw have byes in the
    first round, as many as n lacks to a power of two; a bye counts as a round survived. A match that both responses win
    equally often, as where a verdict turns with the order, goes to the one that is earlier in the draw. So does one
    without a verdict in either order, but that is the draw's word alone: neither response has a reward then.

    Args:
        texts: what the votes for each (row's id, ordered pair) said.
    """
    size = len(record.responses)
    standing = random.Random(f"bracket {seed} {record.id}").sample(range(size), size)
    num_rounds, survived = (size - 1).bit_length(), [0] * size
    byes = 2**num_rounds - size
    undecided: set[int] = set()
    while len(standing) > 1:
        waiting, playing = standing[:byes], standing[byes:]
        matches = list(zip(playing[::2], playing[1::2], strict=True))
        orders = [order for match in matches for order in (match, match[::-1])]
        if any((record.id, order) not in texts for order in orders):
            return Standings(orders, None)
        undecided.update(number for match in matches if not _has_verdict(record.id, match, texts) for number in match)
        standing, byes = [*waiting, *(_winner(record.id, match, texts) for match in matches)], 0
        for number in standing:
            survived[number] += 1
    shares = [rounds / max(num_rounds, 1) for rounds in survived]
    return Standings([], [None if number in undecided else share for number, share in enumerate(shares)])


def _has_verdict(name: str, match: tuple[int, int], texts: Verdicts) -> bool:
    return any(majority(texts[name, order]) is not None for order in (match, match[::-1]))


def _winner(name: str, match: tuple[int, int], texts: Verdicts) -> int:
    lead = 0
    for order in (match, match[::-1]):
        verdict = majority(texts[name, order])
        if verdict in (Verdict.FIRST, Verdict.SECOND):
            lead += 1 if order[verdict is Verdict.SECOND] == match[0] else -1
    return match[lead < 0]

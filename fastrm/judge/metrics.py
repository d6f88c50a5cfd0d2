"""Figures of a judge from what it wrote; docs/judges.md defines each."""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fastrm.data.record import Record
from fastrm.judge.bracket import play
from fastrm.judge.generations import Generation
from fastrm.prompts.spec import JudgeSpec
from fastrm.prompts.verdicts import Verdict, majority

# What a judge said of a preference: the winner is better, the loser is, or neither; None: nothing that can be read.
_RIGHT, _WRONG, _TIE = 1, -1, 0
_Outcome = int | None


@dataclass(frozen=True)
class Judged:
    """The outcomes of one preference.

    Attributes:
        source: of the row.
        outcomes: by whether the winner was shown first; a pointwise judge has one, under None.
    """

    source: str
    outcomes: dict[bool | None, _Outcome]

    @property
    def share_right(self) -> float:
        """The share of the orders in which the winner was called better."""
        return sum(outcome == _RIGHT for outcome in self.outcomes.values()) / len(self.outcomes)

    @property
    def in_both_orders(self) -> bool:
        return {True, False} <= self.outcomes.keys()


def measure(spec: JudgeSpec, records: Sequence[Record], generations: Iterable[Generation]) -> dict:
    """Return the figures of a judge under the names that `--json` has.

    Args:
        generations: of these records; those with the same id and order are votes.
    """
    texts = read_verdicts(spec, generations)
    failures = [
        {"id": name, "order": list(order)} for (name, order), said in texts.items() for one in said if one is None
    ]
    rewards = _rewards(spec, texts, records)
    ended = {row["id"] for row in rewards} if spec.order == "bracket" else set()
    judged, missing, tied, not_met = [], [], 0, 0
    for record in records:
        for preference in record.preferences:
            if preference.tie:
                tied += 1
                continue
            outcomes = _outcomes(spec, texts, record.id, preference.winner, preference.loser)
            if outcomes:
                judged.append(Judged(record.source, outcomes))
            elif record.id in ended:
                not_met += 1
            else:
                missing.append(record.id)
    return {
        **_figures(judged),
        "preferences_tied": tied,
        "preferences_not_met": not_met,
        "num_generations": sum(map(len, texts.values())),
        "num_parse_failures": len(failures),
        "sources": {
            source: _accuracy([one for one in judged if one.source == source])
            for source in sorted({one.source for one in judged})
        },
        "rewards": rewards,
        "failures": failures,
        "missing": missing,
    }


def read_verdicts(spec: JudgeSpec, generations: Iterable[Generation]) -> dict[tuple[str, tuple[int, ...]], list]:
    """Return what texts say by (row's id, order), a list with an entry for each vote; None for no verdict."""
    texts = defaultdict(list)
    for generation in generations:
        texts[generation.id, generation.order].append(spec.parse(generation.text))
    return dict(texts)


def _rewards(spec: JudgeSpec, texts: Mapping[tuple[str, tuple[int, ...]], Sequence], records: Sequence[Record]) -> list:
    if spec.kind != "pairwise":
        return []
    if spec.order != "bracket":
        return tournaments(texts, records)
    played = [(record.id, play(record, spec.decoding.seed, texts).rewards) for record in records]
    return [{"id": name, "rewards": rewards} for name, rewards in played if rewards is not None]


def tournaments(texts: Mapping[tuple[str, tuple[int, ...]], Sequence], records: Sequence[Record]) -> list[dict]:
    """Return {"id", "rewards"} for each row of more than two responses of which all ordered pairs were judged.

    The reward of a response is the share of its 2 (n - 1) comparisons that it won, a tie counting one half, as
    R1-Reward's are made for GRPO (BaseReward, arXiv 2509.16127, section 5.4: preferences summed).
    """
    found = []
    for record in records:
        size = len(record.responses)
        pairs = list(itertools.permutations(range(size), 2))
        if size < 3 or not all((record.id, pair) in texts for pair in pairs):
            continue
        won = [0.0] * size
        for first, second in pairs:
            verdict = majority(texts[record.id, (first, second)])
            if verdict is not None:
                share = {Verdict.FIRST: 1.0, Verdict.SECOND: 0.0, Verdict.TIE: 0.5}[verdict]
                won[first] += share
                won[second] += 1 - share
        found.append({"id": record.id, "rewards": [wins / (2 * (size - 1)) for wins in won]})
    return found


def _outcomes(spec: JudgeSpec, texts: dict, name: str, winner: int, loser: int) -> dict[bool | None, _Outcome]:
    if spec.kind == "pointwise":
        votes = [texts.get((name, (response,))) for response in (winner, loser)]
        if None in votes:
            return {}
        scores = [[score for score in given if score is not None] for given in votes]
        if not all(scores):
            return {None: None}
        better, worse = (np.mean(given) for given in scores)
        return {None: int(np.sign(better - worse))}
    found = {}
    for order in ((winner, loser), (loser, winner)):
        if (name, order) in texts:
            winner_first = order[0] == winner
            found[winner_first] = _outcome(majority(texts[name, order]), winner_first)
    return found


def _outcome(verdict: Verdict | None, winner_first: bool) -> _Outcome:
    if verdict is None or verdict is Verdict.TIE:
        return None if verdict is None else _TIE
    return _RIGHT if (verdict is Verdict.FIRST) == winner_first else _WRONG


def _figures(judged: Sequence[Judged]) -> dict:
    shown_first = [one.outcomes[True] for one in judged if True in one.outcomes]
    pairs = [(one.outcomes[True], one.outcomes[False]) for one in judged if one.in_both_orders]
    read = [pair for pair in pairs if None not in pair]
    decided = [
        (outcome == _RIGHT) == winner_first
        for one in judged
        for winner_first, outcome in one.outcomes.items()
        if winner_first is not None and outcome in (_RIGHT, _WRONG)
    ]
    return {
        **_accuracy(judged),
        "accuracy_as_released": _mean([outcome == _RIGHT for outcome in shown_first]),
        "position_flip_rate": _mean([first != second for first, second in read]),
        "first_place_rate": _mean(decided),
        "ties": sum(outcome == _TIE for one in judged for outcome in one.outcomes.values()),
        "preferences_in_one_order": sum(not (one.in_both_orders or None in one.outcomes) for one in judged),
    }


def _accuracy(judged: Sequence[Judged]) -> dict:
    shares = np.array([one.share_right for one in judged])
    return {"accuracy": _mean(shares), "preferences": len(judged), "interval": _interval(shares)}


def _mean(values: Sequence) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _interval(shares: np.ndarray) -> tuple[float, float] | None:
    """Return the 95 % bootstrap interval (percentile) of a mean of preferences, whose two orders are not independent.

    None for fewer than two preferences.
    """
    from scipy.stats import bootstrap  # takes most of a second to import

    if len(shares) < 2:
        return None
    found = bootstrap((shares,), np.mean, method="percentile", n_resamples=2000, batch=100, rng=0)
    return tuple(map(float, found.confidence_interval))

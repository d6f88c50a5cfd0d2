"""Figures of a judge from what it wrote; docs/judges.md defines each."""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from fastrm.data.record import Record
from fastrm.evaluate.judge_figures import Judged, Outcome, accuracy, figures, outcome
from fastrm.judge.bracket import play
from fastrm.judge.generations import Generation
from fastrm.prompts.spec import JudgeSpec
from fastrm.prompts.verdicts import Verdict, majority

# By (row's id, order) what each vote said: a verdict, a number, or None.
Said = Mapping[tuple[str, tuple[int, ...]], Sequence]


def measure(spec: JudgeSpec, records: Sequence[Record], texts: Said, released: Said | None = None) -> dict:
    """Return the figures of a judge under the names that `--json` has.

    Args:
        texts: what its texts about these records say, as `read_verdicts` returns it; of a critic, rewards behind them.
        released: the same by the released rule; None: it is no other.
    """
    failures = [
        {"id": name, "order": list(order)} for (name, order), said in texts.items() for one in said if one is None
    ]
    found = {record.id: _rewards(spec, texts, record) for record in records}
    rewards = [{"id": name, "rewards": row} for name, row in found.items() if row is not None]
    ended = {row["id"] for row in rewards} if spec.order == "bracket" else set()
    judged, missing, tied, not_met = [], [], 0, 0
    for record in records:
        for preference in record.preferences:
            if preference.tie:
                tied += 1
                continue
            outcomes = outcomes_of(spec, texts, record.id, preference.winner, preference.loser)
            if outcomes:
                by_release = outcomes_of(spec, released or texts, record.id, preference.winner, preference.loser)
                judged.append(Judged(record.source, record.id, outcomes, by_release))
            elif record.id in ended:
                not_met += 1
            else:
                missing.append(record.id)
    return {
        **figures(judged),
        "preferences_tied": tied,
        "preferences_not_met": not_met,
        "num_generations": sum(map(len, texts.values())),
        "num_parse_failures": len(failures),
        "questions_without_verdict": sum(all(one is None for one in said) for said in texts.values()),
        "sources": {
            source: accuracy([one for one in judged if one.source == source])
            for source in sorted({one.source for one in judged})
        },
        "rewards": rewards,
        "rewards_missing": [one.id for one in records if _lacks_texts(spec, texts, one, found[one.id])],
        "failures": failures,
        "missing": missing,
    }


def read_verdicts(
    spec: JudgeSpec, generations: Iterable[Generation], *, as_released: bool = False
) -> dict[tuple[str, tuple[int, ...]], list]:
    """Return what texts say by (row's id, order), a list with an entry for each vote; None for no verdict.

    Args:
        as_released: texts that were cut are read as whole ones are.
    """
    texts = defaultdict(list)
    for one in generations:
        said = spec.read(one.text, is_cut=one.is_cut and not as_released)
        texts[one.id, one.order].append(said)
    return dict(texts)


def describe_texts(generations: Sequence[Generation]) -> dict:
    """Return the figures of a judge's texts themselves, under the names that `--json` has."""
    return {"texts_cut": sum(one.is_cut for one in generations)}


def _rewards(spec: JudgeSpec, texts: Said, record: Record) -> list[float | None] | None:
    """Return the rewards of a record's responses; None where the texts that they are made of are not there."""
    size = len(record.responses)
    if spec.kind != "pairwise":
        return _mean_scores([texts.get((record.id, (number,)), ()) for number in range(size)])
    if size < 2:
        return None
    if spec.order == "bracket":
        return play(record, spec.decoding.seed, texts).rewards
    # Of two responses both orders are a round robin, which was not asked for.
    return tournament(texts, record) if spec.order == "round_robin" or size > 2 else None


def _mean_scores(votes: Sequence[Sequence[float | None]]) -> list[float | None] | None:
    """Return the mean of each response's scores, None without one; None for no votes at all."""
    given = [[score for score in scores if score is not None] for scores in votes]
    return [float(np.mean(scores)) if scores else None for scores in given] if any(votes) else None


def _lacks_texts(spec: JudgeSpec, texts: Said, record: Record, rewards: list | None) -> bool:
    """Return whether a record has no rewards, or not all, since there is no text that they would be made of.

    Of a row with preferences a judge of single responses lacks those that the preferences lack, and others are not
    asked for.
    """
    if spec.kind == "pairwise":
        return spec.gives_rewards and rewards is None
    if not all(one.tie for one in record.preferences):
        return False
    return any((record.id, (number,)) not in texts for number in range(len(record.responses)))


def tournament(texts: Said, record: Record) -> list[float | None] | None:
    """Return the rewards of a record of which all ordered pairs were judged; None if one was not.

    The reward of a response is the share that it won of those of its 2 (n - 1) comparisons that have a verdict, a tie
    counting one half, as R1-Reward's are made for GRPO (BaseReward, arXiv 2509.16127, section 5.4: preferences summed).
    It is None for a response without such a comparison.
    """
    size = len(record.responses)
    pairs = list(itertools.permutations(range(size), 2))
    if not all((record.id, pair) in texts for pair in pairs):
        return None
    shares: list[list[float]] = [[] for _ in range(size)]
    for first, second in pairs:
        verdict = majority(texts[record.id, (first, second)])
        if verdict is not None:
            share = {Verdict.FIRST: 1.0, Verdict.SECOND: 0.0, Verdict.TIE: 0.5}[verdict]
            shares[first].append(share)
            shares[second].append(1 - share)
    return [sum(won) / len(won) if won else None for won in shares]


def outcomes_of(spec: JudgeSpec, texts: Said, name: str, winner: int, loser: int) -> dict[bool | None, Outcome]:
    """Return what was said of a preference, by whether the winner was shown first; of single responses under None."""
    if spec.kind != "pairwise":
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
            found[winner_first] = outcome(majority(texts[name, order]), winner_first)
    return found

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
                by_release = _outcomes(spec, released or texts, record.id, preference.winner, preference.loser)
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
        "sources": {
            source: accuracy([one for one in judged if one.source == source])
            for source in sorted({one.source for one in judged})
        },
        "rewards": rewards,
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


def _rewards(spec: JudgeSpec, texts: Said, records: Sequence[Record]) -> list:
    if spec.kind != "pairwise":
        return _mean_scores(texts, records)
    if spec.order != "bracket":
        return tournaments(texts, records)
    played = [(record.id, play(record, spec.decoding.seed, texts).rewards) for record in records]
    return [{"id": name, "rewards": rewards} for name, rewards in played if rewards is not None]


def _mean_scores(texts: Said, records: Sequence[Record]) -> list[dict]:
    """Return {"id", "rewards"} for each row with a score: the mean of each response's scores, None without one."""
    found = []
    for record in records:
        votes = [texts.get((record.id, (number,)), ()) for number in range(len(record.responses))]
        given = [[score for score in scores if score is not None] for scores in votes]
        if any(given):
            found.append({"id": record.id, "rewards": [float(np.mean(scores)) if scores else None for scores in given]})
    return found


def tournaments(texts: Said, records: Sequence[Record]) -> list[dict]:
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


def _outcomes(spec: JudgeSpec, texts: dict, name: str, winner: int, loser: int) -> dict[bool | None, Outcome]:
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

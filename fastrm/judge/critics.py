"""Critics: the rewards that a reward model reads behind critiques of responses."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fastrm.data.record import Message, Record, Response
from fastrm.data.tokenizer import load_tokenizer
from fastrm.errors import ConfigError, RecordError
from fastrm.evaluate.command import score_rows
from fastrm.evaluate.ensemble import SUFFIXES, Rewards
from fastrm.evaluate.models import open_models
from fastrm.evaluate.options import ModelChoice, ScoringOptions
from fastrm.evaluate.scoring import refuse_non_finite
from fastrm.judge.generations import Generation
from fastrm.judge.questions import make_questions
from fastrm.model.loading import open_backbone
from fastrm.model.stored_head import find_head, missing_head
from fastrm.prompts.spec import JudgeSpec
from fastrm.ui import Display

Said = dict[tuple[str, tuple[int, ...]], list[float]]
Score = Callable[[Sequence[Record]], list[Rewards | RecordError]]


def scorer_of(spec: JudgeSpec) -> str:
    """Return the reward model of a critic; of its files only what says that it is one is read.

    Raises:
        ConfigError: if the SPEC names none, or a model without a reward head.
        StorageError: if its weights are damaged or incomplete.
    """
    is_here = spec.generator is not None and spec.generator.url is None
    scorer = spec.scorer or (spec.generator.model if is_here else None)
    if scorer is None:
        raise ConfigError("scorer: a critic needs the reward model that reads its critiques; name its folder")
    if Path(scorer).suffix not in SUFFIXES:
        opened = open_backbone(scorer)
        if find_head(opened, load_tokenizer(opened.place.tokenizer)) is None:
            raise ConfigError(f"scorer: {missing_head(opened.place)}")
    return scorer


def read_rewards(
    spec: JudgeSpec,
    records: Sequence[Record],
    critiques: Iterable[Generation],
    options: ScoringOptions,
    display: Display,
    refused: list[str],
) -> Said:
    """Return the reward behind each critique by (row's id, order), a list with an entry for each vote.

    The conversations of a row, of all its responses and all their critiques, are one group, in which they share what
    they begin with.

    Args:
        critiques: of these records.
        options: of the scorer.
        refused: takes the reasons for critiques that cannot be scored, which have no entry.

    Raises:
        ConfigError, StorageError: for a scorer that cannot be used.
        DataError: for a reward that is not a finite number.
    """
    by_row: dict[str, list[Generation]] = defaultdict(list)
    for critique in critiques:
        by_row[critique.id].append(critique)
    unshown: dict[str, str] = {}
    groups = conversations(spec, records, by_row, unshown)
    refused += unshown.values()
    scorer = open_models(ModelChoice((Path(scorer_of(spec)),)), options, display, behind_critique=True)
    results = _score(lambda some: score_rows(scorer, some, options, display), groups)
    said: Said = defaultdict(list)
    for group, rewards in zip(groups, results, strict=True):
        for critique, reward in zip(by_row[group.id], rewards, strict=True):
            if isinstance(reward, RecordError):
                place = f"response {critique.order[0]}"
                refused.append(f"{group.origin}: the critique of {place}: {reward.message} ({reward.code})")
            else:
                said[critique.id, critique.order].append(reward)
    return dict(said)


def conversations(
    spec: JudgeSpec,
    records: Sequence[Record],
    critiques: Mapping[str, Sequence[Generation]],
    refused: dict[str, str] | None = None,
) -> list[Record]:
    """Return the groups of conversations that end with critiques: of each row that has some, in their order.

    Args:
        critiques: by row's id.
        refused: as of `make_questions`.
    """
    criticised = [record for record in records if record.id in critiques]
    asked = {(one.id, one.order): one.messages for one in make_questions(spec, criticised, refused=refused)}
    shown = {name for name, _ in asked}
    groups = []
    for record in (record for record in criticised if record.id in shown):
        turns = [(*asked[one.id, one.order], Message("assistant", (one.text,))) for one in critiques[record.id]]
        groups.append(replace(record, responses=tuple(map(Response, turns)), preferences=()))
    return groups


def _score(score: Score, groups: Sequence[Record]) -> list[list[float | RecordError]]:
    """Score groups; the halves of one that is refused, as too long or for one conversation, are scored by themselves.

    Raises:
        DataError: for a reward that is not a finite number.
    """
    results, halves = score(groups), []
    for group, result in zip(groups, results, strict=True):
        if isinstance(result, RecordError):
            refuse_non_finite(group.origin, result)
            if (middle := len(group.responses) // 2) > 0:
                parts = group.responses[:middle], group.responses[middle:]
                halves += [replace(group, responses=part) for part in parts]
    parts = iter(_score(score, halves) if halves else ())
    return [
        result.combined if isinstance(result, Rewards)
        else [*next(parts), *next(parts)] if len(group.responses) > 1 else [result]
        for group, result in zip(groups, results, strict=True)
    ]  # fmt: skip


def describe_critiques(spec: JudgeSpec, critiques: Sequence[Generation]) -> dict:
    """Return the figures of critiques themselves, under the names that `--json` has."""
    cut = [one for one in critiques if one.is_cut]
    faults = {"cut": cut, "empty": [one for one in critiques if not one.text.strip()]}
    return {
        "scorer": scorer_of(spec),
        "num_generations": len(critiques),
        **{f"critiques_{fault}": len(found) for fault, found in faults.items()},
        "failures": [
            {"id": one.id, "order": list(one.order), "reason": fault}
            for fault, found in faults.items()
            for one in found
        ],
    }

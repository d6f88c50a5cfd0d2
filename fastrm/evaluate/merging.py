"""Groups of the rows of one prompt: its images and text are scored once, each distinct response once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from fastrm.data.record import Record, Response
from fastrm.errors import RecordError

Result = TypeVar("Result")


@dataclass
class PromptGroup:
    """The records of one prompt.

    Attributes:
        rows: numbers of the records.
        places: for each of them, which of the distinct responses its own are, in order.
        responses: the distinct responses, by what a model reads of them.
    """

    rows: list[int] = field(default_factory=list)
    places: list[list[int]] = field(default_factory=list)
    responses: dict[tuple, Response] = field(default_factory=dict)

    def add(self, row: int, record: Record) -> None:
        """Add a record with the group's prompt."""
        keys = [response.key for response in record.responses]
        for key, response in zip(keys, record.responses, strict=True):
            self.responses.setdefault(key, response)
        numbers = {key: number for number, key in enumerate(self.responses)}
        self.rows.append(row)
        self.places.append([numbers[key] for key in keys])


def merge_prompts(records: Sequence[Record]) -> list[PromptGroup]:
    """Group records with the same prompt and images, in order of their first one."""
    groups: dict[tuple, PromptGroup] = {}
    for row, record in enumerate(records):
        groups.setdefault(record.prompt_key, PromptGroup()).add(row, record)
    return list(groups.values())


def score_merged(
    score: Callable[[Sequence[Record]], list[Result | RecordError]],
    take: Callable[[Result, list[int]], Result],
    records: Sequence[Record],
) -> list[Result | RecordError]:
    """Score every record, in one pass over the prompts' groups.

    A group that cannot be scored as a whole, for example because it is too long, is scored row by row, so
    that merging refuses no row that would be scored by itself.

    Args:
        score: of records, in order.
        take: the result of some of a record's responses, by their numbers.
    """
    groups = merge_prompts(records)
    merged = [
        replace(records[group.rows[0]], responses=tuple(group.responses.values()), preferences=()) for group in groups
    ]
    results: list[Result | RecordError | None] = [None] * len(records)
    alone: list[int] = []
    for group, result in zip(groups, score(merged), strict=True):
        if isinstance(result, RecordError) and len(group.rows) > 1:
            alone += group.rows
            continue
        for row, places in zip(group.rows, group.places, strict=True):
            results[row] = result if isinstance(result, RecordError) else take(result, places)
    if alone:
        parts = [replace(records[row], preferences=()) for row in alone]
        for row, result in zip(alone, score(parts), strict=True):
            results[row] = result
    return results

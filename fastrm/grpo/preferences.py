"""Questions to a policy that is a judge, made of preferences."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby, islice

from fastrm.data.paradigm import TextReading
from fastrm.data.record import Record, Response
from fastrm.data.sources import RefusedRow, source_files
from fastrm.errors import DataError, RecordError
from fastrm.grpo.config import QuestionsSection
from fastrm.grpo.questions import Question, check_images, check_rows
from fastrm.prompts.spec import JudgeSpec


@dataclass(frozen=True)
class Comparison(Question):
    """A question whose true answer, 1 or 2, is the place of the better response.

    Attributes:
        source: of the row.
        number: of the preference in its file; its two orders have the same.
    """

    source: str = ""
    number: int = 0


def read_comparisons(
    source: QuestionsSection, spec: JudgeSpec, *, order: str, seed: int, left_out: Counter
) -> list[Comparison]:
    """Read the preferences of a source as questions to a judge; ties are left out.

    Args:
        order: as `QuestionsSection.order`, where the source has none.
        seed: of random orders.
        left_out: takes the number of ties, by the source's path.

    Raises:
        DataError: for a row that cannot be used or shown, no rows at all, nothing but ties, or fewer rows than
            `source.rows` names.
    """
    reading = _reading(spec, source.order or order, seed)
    found = []
    for first, (record,) in _rows(source, None):
        left_out[source.path] += sum(one.tie for one in record.preferences)
        # Only the verdict is learnt: completions have critiques of their own, of some of them or with other verdicts.
        responses = tuple(replace(response, critique="") for response in record.responses)
        for number, one in enumerate(record.preferences, first):
            asked = replace(record, responses=responses, preferences=(one,))
            found += [] if one.tie else _compare(reading, spec, asked, number)
    if not found:
        raise DataError(f"{source.path}: nothing but ties, and a judge learns which of two responses is better")
    return found


def read_lessons(source: QuestionsSection, spec: JudgeSpec, *, seed: int) -> list[Comparison]:
    """Read the preferences of a source with the texts that `paradigm: judge` trains on, for a supervised start.

    Raises:
        DataError: as `read_comparisons`, and for a row of nothing but ties.
    """
    lessons = []
    for first, parts in _rows(source, _reading(spec, source.order or "random", seed)):
        number, known = first - 1, set()
        for record in parts:
            for one in record.preferences:
                number += not one.again
                response = record.responses[one.winner]
                if response.key not in known:  # equal texts are learnt once
                    known.add(response.key)
                    lessons.append(_comparison(spec, record, response, number))
    return lessons


def _reading(spec: JudgeSpec, order: str, seed: int) -> TextReading:
    return TextReading("judge", spec.prompt, spec.system, spec.parser, order=order, seed=seed)


def _rows(source: QuestionsSection, reading: TextReading | None) -> list[tuple[int, list[Record]]]:
    """Return of each row the preferences that the file has before it, and its records: a long list has several."""
    files = [replace(file, reading=reading) for file in source_files(source.path, images=source.images)]
    start, stop = source.rows or (0, None)
    rows, before = [], 0
    records = _checked(item for file in files for item in file.read())
    # Parts of a row have its id; the questions about one of the digits have an origin, and ids of their own.
    for _, parts in islice(groupby(records, key=lambda record: (record.origin, record.id)), stop):
        rows.append((before, list(parts)))
        before += sum(not one.again for record in rows[-1][1] for one in record.preferences)
    check_rows(source, len(rows[start:]))
    return rows[start:]


def _checked(items) -> Iterator[Record]:
    """Yield records; none may be missing, since accuracies are counted on all of them."""
    for item in items:
        if isinstance(item, RefusedRow):
            raise DataError(f"{item.origin}: {item.message} ({item.code})")
        yield item


def _compare(reading: TextReading, spec: JudgeSpec, record: Record, number: int) -> list[Comparison]:
    """Return the questions about the one preference of a record."""
    try:
        shown = reading.convert(record)
    except RecordError as error:
        raise DataError(f"{record.origin}: {error.message} ({error.code})") from None
    return [_comparison(spec, record, response, number) for response in shown.responses]


def _comparison(spec: JudgeSpec, record: Record, shown: Response, number: int) -> Comparison:
    truth = str(spec.parse(shown.text).value)
    question = Comparison(shown.messages[:-1], truth, record.origin, shown.text, record.source, number)
    try:
        check_images(question)
    except RecordError as error:
        raise DataError(f"{record.origin}: {error.message} ({error.code})") from None
    return question

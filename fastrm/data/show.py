"""Rows of data as a model reads them, for people: what is shared, what is refused, and where two responses differ.

With a model's encoder texts are the tokens that the model reads, decoded; without one they are the rows' own.
"""

import difflib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from fastrm.data.check import nearby
from fastrm.data.group import check_distinct, encode_group
from fastrm.data.media.images import decode_image
from fastrm.data.paradigm import TextReading
from fastrm.data.prepared.content import with_digests
from fastrm.data.prepared.units import open_source
from fastrm.data.record import ImageRef, MediaRef, Message, Record
from fastrm.data.sources import KeyTally, RefusedRow
from fastrm.data.template import ConversationEncoder
from fastrm.data.tree import Tree
from fastrm.data_config import SourceConfig
from fastrm.errors import RecordError
from fastrm.limits import MediaLimits
from fastrm.report.page import Example, MarkedText, thumbnail

# The most of a row that is shown, so that a page of strange rows can still be opened.
_PAGE_TEXT, _TERMINAL_TEXT, _MAX_IMAGES = 20_000, 400, 8
# Words with the white space before them; of scripts without spaces, and of signs, each character.
_WORD = re.compile(r"\s*(?:[^\W\u2e80-\uffff]+|\S)|\s+")
_LEAST_EQUAL = 3  # words
_STYLES = {"new": ("green", "{+", "+}"), "gone": ("red", "[-", "-]")}  # of colour terminals; as wdiff writes elsewhere

Labelled = tuple[str, str]  # (label, text)


@dataclass(frozen=True)
class ShownRow:
    """A row as it is shown.

    Attributes:
        prompt: the texts that all responses share.
        responses: the rest of each, the most preferred first.
        media: images and videos, each with a description.
    """

    title: str
    notes: Sequence[str] = ()
    prompt: Sequence[Labelled] = ()
    responses: Sequence[Labelled] = ()
    media: Sequence[tuple[MediaRef, str]] = ()


def first_rows(
    source: SourceConfig, limits: MediaLimits, encoder: ConversationEncoder | None, count: int,
    reading: TextReading | None = None,
) -> list[ShownRow]:  # fmt: skip
    """Return the first rows of a source, those that are refused among them.

    Raises:
        ConfigError, DataError: the source cannot be read at all.
    """
    rows: list[ShownRow] = []
    for file in open_source(source, reading):
        tally, before, notes = KeyTally(), Counter(), []
        for item in file.read(keys=tally):
            notes += [f"layout: {name}" for name in tally.layouts - before]
            before = tally.layouts.copy()
            if isinstance(item, RefusedRow) and item.partial:  # the record follows
                notes.append(f"left out: {item.message} ({item.code})")
                continue
            if isinstance(item, RefusedRow):
                rows.append(refused_row(item.origin, item.code, item.message, notes))
            else:
                rows.append(show_or_refuse(item, limits, encoder, notes))
            notes = []
            if len(rows) == count:
                return rows
    return rows


def refused_row(origin: str, code: str, message: str, notes: Sequence[str] = ()) -> ShownRow:
    """Return what is shown of a row that cannot be used."""
    return ShownRow(origin, [*notes, f"refused: {code}"], [("reason", message)])


def show_or_refuse(
    record: Record, limits: MediaLimits, encoder: ConversationEncoder | None, notes: Sequence[str] = ()
) -> ShownRow:
    """Return a record as it is shown, or the reason why a model cannot read it."""
    try:
        return show_record(with_digests(record, limits), encoder, notes)
    except RecordError as error:
        return refused_row(record.origin, error.code, error.message, notes)


def show_record(record: Record, encoder: ConversationEncoder | None, notes: Sequence[str] = ()) -> ShownRow:
    """Return a record as it is shown.

    Raises:
        RecordError: the encoder refuses it.
    """
    prompt, texts, sizes, media = _as_written(record) if encoder is None else _as_read(record, encoder)
    pairs = [p for p in record.preferences if not (p.tie or p.is_rating)]
    wins, losses = Counter(p.winner for p in pairs), Counter(p.loser for p in pairs)
    order = sorted(range(len(texts)), key=lambda number: losses[number] - wins[number])
    # Its texts say which response is preferred, and each stands for itself.
    is_of_judge = record.original is not None and all(p.is_rating for p in record.preferences)
    noun, responses = "text" if is_of_judge else "response", []
    for number in order:
        beaten = sorted(p.loser + 1 for p in pairs if p.winner == number)
        label = f"{noun} {number + 1}" + (f", preferred to {', '.join(map(str, beaten))}" if beaten else "")
        rated = [p for p in record.preferences if p.is_rating and p.winner == number and record.original is None]
        label += "".join(f", rated {p.margin:g}" for p in rated)
        if len(texts) == 2 and wins.total() and not (wins[number] and losses[number]):
            label = "chosen" if wins[number] else "rejected"
        responses.append((f"{label}: {texts[number][0]}", texts[number][1]))
    ties = sum(p.tie for p in record.preferences)
    about = [f"source: {record.source}", f"texts: {len(texts):,}" if is_of_judge else f"preferences: {len(pairs):,}"]
    about += [f"ties: {ties:,}"] if ties else []
    return ShownRow(record.origin, [*notes, *about, *sizes], prompt, responses, media)


def _as_written(record: Record) -> tuple[list[Labelled], list[Labelled], list[str], list[tuple[MediaRef, str]]]:
    """Return (prompt, (length, text) of each response, notes, media) of the row's own texts."""
    turns = [response.messages for response in record.responses]
    common = 0
    while common < min(map(len, turns)) - 1 and len({messages[common].key for messages in turns}) == 1:
        common += 1
    prompt = [(message.role, _written(message)) for message in turns[0][:common]]
    if record.responses[0].arguments:
        prompt.insert(0, ("for the chat template", record.responses[0].arguments))
    texts = ["\n".join(map(_written, messages[common:])) for messages in turns]
    note = f"prompt: {_length(' '.join(text for _, text in prompt))}, shared by all responses"
    return prompt, [(_length(text), text) for text in texts], [note], [(ref, _name(ref)) for ref in record.media]


def _as_read(record: Record, encoder: ConversationEncoder):
    """Return what `_as_written` returns, of the tokens that a model reads."""
    group = encode_group(record, encoder)
    check_distinct(group)
    tree, tokens = group.tree(), [response.tokens.tolist() for response in group.responses]
    shared, own = tokens_shared(tree)
    lead, decode = shared, encoder.tokenizer.decode
    while lead and decode(tokens[0][:lead]).endswith("\ufffd"):  # the border is inside a character
        lead -= 1
    texts = [
        (f"{counted(alone, 'token')} of its own", _runs_counted(decode(ids[lead:])))
        for alone, ids in zip(own, tokens, strict=True)
    ]
    kept, apart = sum(tree.lengths), sum(map(len, tokens))
    note = f"{kept:,} tokens in the prefix tree, {apart:,} in separate conversations ({apart / kept:.2f} times)"
    prompt = [(f"shared by all: {shared:,} tokens", _runs_counted(decode(tokens[0][:lead])))] if shared else []
    sizes = {span.ref.key: span.size for response in group.responses for span in response.media}
    media = [
        (ref, f"{_name(ref)}: {sizes[key].frames * sizes[key].height * sizes[key].width:,} tokens")
        for key, ref in group.media.items()
    ]
    return prompt, texts, [note], media


def tokens_shared(tree: Tree) -> tuple[int, list[int]]:
    """Return the number of tokens that all sequences of a tree share, and the number that each has alone."""
    users: list[set[int]] = [set() for _ in tree.parents]
    for sequence, (segment, _) in enumerate(tree.ends):  # every sequence ends where a segment does
        while segment >= 0:
            users[segment].add(sequence)
            segment = tree.parents[segment]
    sequences = range(len(tree.ends))

    def total(wanted: set[int]) -> int:
        return sum(length for length, found in zip(tree.lengths, users, strict=True) if found == wanted)

    return total(set(sequences)) if len(sequences) > 1 else 0, [total({sequence}) for sequence in sequences]


def _length(text: str) -> str:
    return f"{counted(len(text.split()), 'word')}, {counted(len(text), 'character')}"


def _name(ref: MediaRef) -> str:
    return f"{ref.noun} {nearby(ref)}"


def counted(number: int, one: str, many: str = "") -> str:
    """Return a number with the name of what is counted, such as `1 row` or `2 rows`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _written(message: Message) -> str:
    """Return a turn as text, with media as their names and what only the template renders as JSON."""
    parts = [part if isinstance(part, str) else f"<{part.noun} {nearby(part)}>" for part in message.parts]
    return " ".join(filter(None, ["".join(parts), message.fields]))


def _runs_counted(text: str) -> str:
    """Replace a special token that stands many times in a row by one and the number."""
    return re.sub(r"(<[^<>\s]+>)\1{2,}", lambda run: f"{run[1]} x {len(run[0]) // len(run[1])} ", text)


def differences(first: str, second: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return two texts in runs (text, mark): what only the first has is "new", what only the second has "gone".

    One or two equal words between differences are no more than chance, and are marked with them.
    """
    words = [_WORD.findall(text) for text in (first, second)]
    runs: tuple[list, list] = ([], [])
    for tag, *places in difflib.SequenceMatcher(None, *words).get_opcodes():
        start, stop = places[:2]
        is_border = (places[0], places[2]) == (0, 0) or (places[1], places[3]) == (len(words[0]), len(words[1]))
        is_same = tag == "equal" and (is_border or stop - start >= _LEAST_EQUAL)
        for found, own, mark, (start, stop) in zip(runs, words, ("new", "gone"), (places[:2], places[2:]), strict=True):
            text, mark = "".join(own[start:stop]), "" if is_same else mark
            if text and found and found[-1][1] == mark:
                found[-1] = (found[-1][0] + text, mark)
            elif text:
                found.append((text, mark))
    return runs


def _shortened(text: str, most: int) -> str:
    """Return the beginning and the end of a long text."""
    return text if len(text) <= most else f"{text[: most // 2]} [...] {text[-(most // 2) :]}"


def _marked(responses: Sequence[Labelled], most: int) -> list[MarkedText]:
    """Return responses with differences marked: of two in both, of more in those after the first."""
    texts = [_shortened(text, most) for _, text in responses]
    runs = [[(text, "")] for text in texts]
    for number in range(1, len(texts)):
        best, runs[number] = differences(texts[0], texts[number])
        if len(texts) == 2:
            runs[0] = best
    return [MarkedText(label, found) for (label, _), found in zip(responses, runs, strict=True)]


def as_example(row: ShownRow, limits: MediaLimits) -> Example:
    """Return a row for a page, its images as thumbnails; an image that cannot be opened is named with the reason."""
    images, notes = [], list(row.notes)
    for ref, description in row.media:
        if not isinstance(ref, ImageRef) or len(images) == _MAX_IMAGES:
            notes.append(description)
            continue
        try:
            images.append((thumbnail(decode_image(ref, limits)), description))
        except RecordError as error:
            notes.append(f"{description}: {error.message} ({error.code})")
    lead = [MarkedText(label, [(_shortened(text, _PAGE_TEXT), "")]) for label, text in row.prompt]
    return Example(row.title, notes, lead, _marked(row.responses, _PAGE_TEXT), images)


def print_row(console: Console, row: ShownRow) -> None:
    """Print a row in the console's width; where it has no colours, differences stand in {+ +} and [- -]."""
    console.print(Text(row.title, style="bold"), soft_wrap=True)
    text = Text("; ".join([*row.notes, *(description for _, description in row.media)]) + "\n", style="dim")
    lead = [MarkedText(label, [(_shortened(said, _TERMINAL_TEXT), "")]) for label, said in row.prompt]
    for part in [*lead, *_marked(row.responses, _TERMINAL_TEXT)]:
        text.append(f"{part.label}\n", style="bold not dim")
        for run, mark in part.runs:
            colour, opening, closing = _STYLES.get(mark, ("", "", ""))
            if console.color_system is None:
                blank = run[: len(run) - len(run.lstrip())]
                run = f"{blank}{opening}{run.lstrip()}{closing}"
            text.append(run, style=f"not dim {colour}".strip())
        text.append("\n")
    text.rstrip()
    for line in text.wrap(console, console.width - 2):
        line.rstrip()
        console.print(Text("  ") + line if line else "")
    console.print()

"""The questions that a judge is asked about rows: what it is shown, and in which order."""

import hashlib
import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from fastrm.data.media.images import open_bytes
from fastrm.data.paradigm import prompt_media, question_text, shown_texts
from fastrm.data.record import ImageRef, Message, Record
from fastrm.errors import DataError, RecordError
from fastrm.json_files import to_json
from fastrm.judge.bracket import Verdicts, play
from fastrm.limits import MediaLimits
from fastrm.model.first_use import weights_of
from fastrm.prompts.spec import GeneratorSection, JudgeSpec
from fastrm.prompts.template import PromptTemplate

# The most bytes of an image that are read for a key: many times what a command's limits let through, and few enough for
# a member of an archive, which is read whole.
_MOST_HASHED = 2**30


@dataclass(frozen=True)
class JudgeQuestion:
    """One text that a judge is to write.

    Attributes:
        id, order: of the row, and of its responses as they are shown.
        images: of the prompt, which come before the text.
        writer: what else the text depends on: the model, its decoding, and the number of the vote.
        origin: `file:row`, for messages.
        contents: what tells images from others, by their keys, as far as it was read for other questions.
    """

    id: str
    order: tuple[int, ...]
    system: str
    text: str
    images: tuple[ImageRef, ...]
    writer: str
    origin: str
    contents: dict[str, list] = field(default_factory=dict, compare=False, repr=False)

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation so far: the system turn, if there is one, and the user's."""
        system = (Message("system", (self.system,)),) if self.system else ()
        return (*system, Message("user", (*self.images, self.text)))

    @cached_property
    def key(self) -> str:
        """The key of all that the answer depends on: equal keys need not be answered twice."""
        for image in self.images:
            if image.key not in self.contents:
                self.contents[image.key] = _content(image)
        images = [self.contents[image.key] for image in self.images]
        shown = [self.system, self.text, images, self.writer]
        return hashlib.sha256(to_json(shown).encode()).hexdigest()


class Written(NamedTuple):
    """A text that a judge wrote.

    Attributes:
        is_cut: it ended at the longest length that was allowed, in the middle.
        size: its tokens and those of its prompt; None from a server that does not say.
    """

    question: JudgeQuestion
    text: str
    is_cut: bool = False
    size: "TextSize | None" = None


class Refusal(NamedTuple):
    """A question that has no text, and is not asked again: a server refuses it, or an image cannot be read.

    Attributes:
        why: and what to do.
    """

    question: JudgeQuestion
    why: str

    @property
    def message(self) -> str:
        """The reason with the row's place and the order that was asked."""
        return f"{self.question.origin}: order {list(self.question.order)}: {self.why}"


class TextSize(NamedTuple):
    """The tokens that were read and written for one text; `image_tokens` of them stand for images."""

    read: int
    written: int
    image_tokens: int = 0


def make_questions(
    spec: JudgeSpec,
    records: Iterable[Record],
    texts: Verdicts | None = None,
    refused: dict[str, str] | None = None,
) -> Iterator[JudgeQuestion]:
    """Yield the questions about all preferences of records that are no ties, each once for each vote.

    A critic is asked about all responses, as a pointwise judge is of a row without such preferences, and a pairwise one
    in a round robin. Of a bracket these are the questions of each row's next round.

    Args:
        texts: what the rounds of a bracket said so far.
        refused: takes the reasons for rows that a judge cannot be shown whole, by their ids: those that training
            refuses too (`shown_texts`), and prompts with a video. None: the first ends all.

    Raises:
        ConfigError: for a template that cannot be filled in.
        DataError: for a row that a judge cannot be shown, without `refused`.
    """
    template = PromptTemplate(spec.prompt, spec.shown)
    model = None if spec.generator is None else _identity(spec.generator)
    # The likeliest token does not depend on the seed, by which a random order may be drawn all the same.
    decoding = spec.decoding.model_dump(exclude=set() if spec.decoding.temperature else {"seed"})
    writers = [to_json([model, decoding, vote]) for vote in range(spec.votes)]
    for record in records:
        contents: dict[str, list] = {}
        try:
            # All are looked at before the first is asked: a row is shown whole or not at all.
            shown = [(order, *_shown(record, order)) for order in _orders(spec, record, texts or {})]
        except RecordError as error:
            reason = f"{record.origin}: {error.message} ({error.code})"
            if refused is None:
                raise DataError(reason) from error
            refused[record.id] = reason
            continue
        for order, said, images in shown:
            question = question_text(record.responses[order[0]])
            text = template.fill(question=question, **dict(zip(spec.shown, said, strict=True)))
            for writer in writers:
                yield JudgeQuestion(record.id, order, spec.system, text, images, writer, record.origin, contents)


def _content(image: ImageRef) -> list:
    """Return what tells an image from others: of a file its bytes, since it may hold another image by now."""
    if image.data is not None or image.digest is not None:
        return [image.key]
    try:
        # Above a command's limits, which say what may be shown, too: `--from` has none.
        with open_bytes(image, MediaLimits(max_image_bytes=_MOST_HASHED)) as file:
            return [image.key, hashlib.file_digest(file, "sha256").hexdigest()]
    except RecordError:  # named when it is read
        return [image.key]


def _identity(generator: GeneratorSection) -> list:
    """Return what tells a model from others; a folder may hold other weights since, as after another training."""
    is_here = generator.url is None and Path(generator.model).is_dir()
    extra = [generator.extra_body] if generator.extra_body else []
    return [generator.model, generator.url, *extra, *(weights_of(generator.model) if is_here else ())]


def _orders(spec: JudgeSpec, record: Record, texts: Verdicts) -> list[tuple[int, ...]]:
    if spec.kind == "critic":
        return [(number,) for number in range(len(record.responses))]
    pairs = [tuple(sorted((one.winner, one.loser))) for one in record.preferences if not one.tie]
    if spec.kind == "pointwise":
        compared = sorted({number for pair in pairs for number in pair})
        return [(number,) for number in compared or range(len(record.responses))]
    if spec.gives_rewards and len(record.responses) < 2:
        raise RecordError("NOT_SHOWN", "the row has one response, and a pairwise judge compares two; leave it out")
    if spec.order == "round_robin":
        return list(itertools.permutations(range(len(record.responses)), 2))
    if spec.order == "bracket":
        shown_texts(record.responses)  # any two may meet in a later round
        return play(record, spec.decoding.seed, texts).next_round
    found: list[tuple[int, ...]] = []
    for pair in dict.fromkeys(pairs):
        turned = pair[::-1]
        if spec.order == "random":
            is_turned = random.Random(f"{spec.decoding.seed} {record.id} {pair}").random() < 0.5
            found.append(turned if is_turned else pair)
        else:
            found += [pair, turned] if spec.order == "both" else [pair]
    return found


def _shown(record: Record, order: tuple[int, ...]) -> tuple[list[str], tuple[ImageRef, ...]]:
    """Return the texts of a record's responses that are shown together, and the images of their prompt.

    Raises:
        RecordError: NOT_SHOWN, as `shown_texts`, and for a video.
    """
    responses = [record.responses[number] for number in order]
    said, media = shown_texts(responses), prompt_media(responses[0])
    if not all(isinstance(one, ImageRef) for one in media):
        raise RecordError(
            "NOT_SHOWN", "the prompt has a video, and a judge is shown texts and images; leave the row out"
        )
    return said, media

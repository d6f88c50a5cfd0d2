"""Questions with true answers, from files or the digits, and as the data set that TRL takes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from fastrm.data.media.images import image_size, read_bytes
from fastrm.data.record import ImageRef, MediaRef, Message
from fastrm.data.sources.conversation import template_arguments
from fastrm.data.sources.digits import PREFIX, digit_records
from fastrm.data.sources.files import data_files, read_rows
from fastrm.data.sources.keys import check_unread, unread_keys
from fastrm.data.sources.layouts.groups import PROMPT_KEYS, row_prompt
from fastrm.data.sources.media import MEDIA_KEYS, path_resolver
from fastrm.errors import DataError, RecordError
from fastrm.grpo.config import QuestionsSection
from fastrm.limits import MediaLimits
from fastrm.rl.answers import read_truth

_KEYS = (PROMPT_KEYS, *MEDIA_KEYS)  # that are read of a row, beside the column of the true answers


@dataclass(frozen=True)
class Question:
    """A prompt with images and its true answer.

    Attributes:
        origin: `file:row`, for messages.
        taught: the text that a supervised start teaches; empty: the true answer.
    """

    messages: tuple[Message, ...]
    truth: str
    origin: str
    taught: str = ""

    @property
    def lesson(self) -> str:
        """The text that a supervised start teaches."""
        return self.taught or self.truth

    @property
    def images(self) -> list[ImageRef]:
        return [part for message in self.messages for part in message.parts if isinstance(part, MediaRef)]

    def encoded_images(self) -> list[bytes | str]:
        """Return the images as bytes; one that is a file of its own as its path, to be read when its turn comes.

        Raises:
            DataError: for an image of an archive that cannot be read.
        """
        try:
            return [ref.path if _is_file(ref) else read_bytes(ref, MediaLimits()) for ref in self.images]
        except RecordError as error:
            raise DataError(f"{self.origin}: {error.message} ({error.code})") from None

    def prompt(self, in_parts: bool) -> list[dict]:
        """Return the messages as chat templates take them: contents in parts, as with images, or as texts."""
        return [
            {"role": message.role, "content": [_part(p) for p in message.parts] if in_parts else message.text}
            for message in self.messages
        ]


def _part(part: str | MediaRef) -> dict:
    return {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}


def _is_file(ref: ImageRef) -> bool:
    return ref.data is None and ref.member is None and ref.span is None


def read_questions(source: QuestionsSection) -> list[Question]:
    """Read all questions of a source; none may be missing, since accuracies are counted on all of them.

    Raises:
        DataError: for a row that is no question, a video, no rows at all, or fewer than `rows` names.
    """
    start, stop = source.rows or (0, None)
    found = list(islice(_read(source), start, stop))
    check_rows(source, len(found))
    return found


def check_rows(source: QuestionsSection, count: int) -> None:
    """Check how many rows were read of a source.

    Raises:
        DataError: for none, or fewer than `rows` names.
    """
    start, stop = source.rows or (0, None)
    if not count:
        raise DataError(f"{source.path}: no questions in rows {start} to {stop or 'the end'}")
    if stop is not None and start + count < stop:
        end = start + count
        text = f"has {end:,} rows, and rows: [{start}, {stop}] names more; write [{start}, {end}]"
        raise DataError(f"{source.path}: {text}")


def _read(source: QuestionsSection) -> Iterator[Question]:
    if source.path.startswith(PREFIX):
        split = source.path.removeprefix(PREFIX)
        if split not in ("train", "eval"):
            raise DataError(f"{source.path} does not exist; wanted {PREFIX}train or {PREFIX}eval")
        for record in digit_records(split):
            right = record.responses[record.preferences[0].winner]
            yield Question(right.messages[:-1], right.text, record.origin)
        return
    for file in data_files(source.path):
        resolve = path_resolver(source.images if source.images is not None else _folder(file))
        for number, row in read_rows(file):
            yield _question(row, resolve, source.truth, f"{file}:{number}")


def _folder(file: str) -> str:
    return file.rpartition("/")[0] or "."


def _question(row: object, resolve, column: str, origin: str) -> Question:
    try:
        if isinstance(row, RecordError):
            raise row
        truths = read_truth(row.get(column)) if isinstance(row, dict) else []
        if len(truths) != 1:
            got = f"holds {len(truths)} true answers, wanted one" if truths else "is missing or empty"
            raise RecordError("NO_TRUTH", f'"{column}" {got}; name the column of the true answers in data.*.truth')
        row = {key: value for key, value in row.items() if value is not None}
        check_unread(row, unread_keys(row, _KEYS, [column]), _KEYS, is_file=False)
        question = Question(row_prompt(row, resolve), truths[0], origin)
        if template_arguments(row) or any(message.fields for message in question.messages):
            raise RecordError("BAD_ROW", "the row has tools, documents or calls, which no policy is shown here")
        check_images(question)
    except RecordError as error:
        raise DataError(f"{origin}: {error.message} ({error.code})") from None
    except DataError as error:
        raise DataError(f"{origin}: {error}") from None
    return question


def check_images(question: Question) -> None:
    """Open the images of a question, now and not in the middle of the run.

    Raises:
        RecordError: for one that cannot be read, or a video.
    """
    if not all(isinstance(ref, ImageRef) for ref in question.images):
        raise RecordError("VIDEO_ROW", "the prompt has a video; only images are supported here")
    for ref in question.images:
        image_size(ref, MediaLimits())


def as_dataset(questions: Sequence[Question]):
    """Return the data set that TRL trains on: prompt, images, solution.

    Image files are read when their turn comes, images of archives now.

    Raises:
        DataError: for an image of an archive that cannot be read.
    """
    from datasets import Dataset, Features, Image, List, Value

    has_images = any(question.images for question in questions)
    prompts = [question.prompt(has_images) for question in questions]
    rows = {"prompt": prompts, "solution": [question.truth for question in questions]}
    if not has_images:
        return Dataset.from_dict(rows)
    part = {"type": Value("string"), "text": Value("string")}
    prompt = List({"role": Value("string"), "content": List(part)})
    images = [[_stored(image) for image in question.encoded_images()] for question in questions]
    features = Features({"prompt": prompt, "solution": Value("string"), "images": List(Image())})
    return Dataset.from_dict(rows | {"images": images}, features=features)


def _stored(image: bytes | str) -> dict:
    return {"bytes": None, "path": image} if isinstance(image, str) else {"bytes": image, "path": None}

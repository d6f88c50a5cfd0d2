"""The quick start data: questions about the 1,797 handwritten digits that ship with scikit-learn.

They need no download and can be learned in minutes on a CPU, but only from the images: over a split every answer to a
question is chosen about as often against another answer as it is rejected for it. Each response has a critique, which
is true: it says which digit the image shows, what the response says, and whether that is right.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from PIL import Image

from fastrm.data.paradigm import TextReading
from fastrm.data.record import ImageRef, Message, Preference, Record, Response
from fastrm.data.sources.key_tally import KeyTally
from fastrm.data.sources.reader import RefusedRow
from fastrm.errors import DataError, RecordError

PREFIX = "digits:"
NUM_TRAIN_IMAGES = 1_437  # the first of 1,797; the others are the eval split
UPSCALE = 7  # 8 x 8 to 56 x 56 pixels: four patches of 14 a side

_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_QUESTIONS = {
    "which": "Which digit is shown?",
    "parity": "Is the digit even or odd?",
    "size": "Is the digit greater than four?",
}


@dataclass(frozen=True)
class DigitsFile:
    """A split of the digits as a data file (like `SourceFile`): its rows are the records of `digit_records`."""

    split: str
    name: str | None = None
    repeat: float = 1.0
    reading: TextReading | None = None

    def __post_init__(self):
        if self.split not in ("train", "eval"):
            raise DataError(f'data source "{self.path}" does not exist; wanted {PREFIX}train or {PREFIX}eval')

    @property
    def path(self) -> str:
        return PREFIX + self.split

    def requiring(self, preferences: bool) -> "DigitsFile":
        """Return the file itself: all of its rows have preferences."""
        return self

    def count_rows(self) -> int:
        return sum(1 for _ in self.read())

    def read(
        self, start: int = 0, stop: int | None = None, keys: KeyTally | None = None
    ) -> Iterator[Record | RefusedRow]:
        """Yield the records from number `start` up to, not including, `stop` (0-based); `keys` counts them.

        One that a critic or a judge cannot be trained on is a refusal.
        """
        for record in islice(digit_records(self.split), start, stop):
            if keys is not None:
                keys.add("digits", (), {})
            record = replace(record, source=self.name) if self.name else record
            try:
                yield record if self.reading is None else self.reading.convert(record)
            except RecordError as error:
                yield RefusedRow(record.source, record.origin, record.id, error.code, error.message)


def digit_records(split: str) -> Iterator[Record]:
    """Yield the records of a split, always the same and in the same order.

    Every image is asked which digit it shows (2 to 4 responses, one of them true). Images in even
    places may also be asked for its parity, those in odd places for its size (2 responses).

    Args:
        split: ``train`` or ``eval``.

    Raises:
        DataError: scikit-learn is not installed.
    """
    pixels, labels = _load(split)
    wins = np.zeros((10, 10), dtype=int)  # wins[a, b]: how often a was chosen over b
    num_asked = {"parity": [0, 0], "size": [0, 0]}
    for place, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        digit = int(label)
        ref = ImageRef(data=_png(image))
        wrong = _wrong_digits(digit, place, wins)
        yield _record(split, place, "which", ref, digit, _NAMES[digit], [_NAMES[other] for other in wrong])
        kind = "size" if place % 2 else "parity"
        truth = digit > 4 if kind == "size" else digit % 2 == 0
        asked = num_asked[kind]
        # The question is asked only if both answers stay equally frequent, to within one.
        if asked[truth] <= asked[not truth]:
            asked[truth] += 1
            answers = ("yes", "no") if kind == "size" else ("even", "odd")
            yield _record(split, place, kind, ref, digit, answers[not truth], [answers[truth]])


def _load(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return pixels (N, 8, 8) from 0 to 16 and labels (N,) of a split."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(f'data source "{PREFIX}{split}" needs scikit-learn; pip install scikit-learn') from error
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    chosen = order[:NUM_TRAIN_IMAGES] if split == "train" else order[NUM_TRAIN_IMAGES:]
    return digits.images[chosen], digits.target[chosen]


def _png(image: np.ndarray) -> bytes:
    scaled = np.round(image * (255 / 16)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(np.kron(scaled, np.ones((UPSCALE, UPSCALE), np.uint8))).save(buffer, "PNG")
    return buffer.getvalue()


def _wrong_digits(digit: int, place: int, wins: np.ndarray) -> list[int]:
    """Choose one to three wrong digits: first those that beat `digit` more often than they lost to it."""
    others = [(digit + 1 + (step + place) % 9) % 10 for step in range(9)]
    others.sort(key=lambda other: wins[digit, other] - wins[other, digit])
    wrong = list(islice(others, 1 + place % 3))
    wins[digit, wrong] += 1
    return wrong


def _critique(digit: int, answer: str, is_true: bool) -> str:
    return f"The image shows a {_NAMES[digit]}. The response says {answer}, which is {'right' if is_true else 'wrong'}."


def _record(split: str, place: int, kind: str, image: ImageRef, digit: int, truth: str, wrong: list[str]) -> Record:
    true_at = (place // 3) % (len(wrong) + 1)
    answers = [*wrong[:true_at], truth, *wrong[true_at:]]
    prompt = Message("user", (image, _QUESTIONS[kind]))
    return Record(
        id=f"digits-{split}-{place}-{kind}",
        responses=tuple(
            Response((prompt, Message("assistant", (answer,))), critique=_critique(digit, answer, answer == truth))
            for answer in answers
        ),
        preferences=tuple(Preference(true_at, i) for i in range(len(answers)) if i != true_at),
        source=f"digits/{kind}",
        origin=f"{PREFIX}{split}:{place + 1}",
    )

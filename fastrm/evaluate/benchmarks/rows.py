"""Rows of a benchmark: the labels for its metrics, what is right, and the record that a model scores.

The two are read apart, so that somebody else's scores can be measured without a single image or text.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastrm.data.record import ImageRef, MediaRef, Message, Preference, Record, Response
from fastrm.data.sources.media import in_folder, media_refs, path_resolver
from fastrm.data.sources.values import bad_row, check_text
from fastrm.errors import DataError, RecordError
from fastrm.evaluate.accuracy import is_right

_PLACEHOLDER = "<image>"


@dataclass(frozen=True)
class Labels:
    """The part of a row that a metric reads.

    Attributes:
        id: as published; not unique in some benchmarks.
        num_rewards: of its responses, in the order of the file.
        category: category, subset or domain; "" without one.
        best: of two responses, the better one.
        num_correct: of a list, how many responses stand first and are correct.
    """

    id: str
    num_rewards: int
    category: str = ""
    best: int = 0
    num_correct: int = 1


def pair_labels(row_id: str, category: str = "", best: int = 0) -> Labels:
    """Return the labels of a pair; `best` is 0 where the file states the chosen response first."""
    return Labels(row_id, 2, category, best)


def right_pairs(rows: list[Labels], rewards: list[list[float]]) -> np.ndarray:
    """Return (N,) bool: True where the better response has the strictly larger reward."""
    right = [is_right(pair[row.best], pair[1 - row.best]) for row, pair in zip(rows, rewards, strict=True)]
    return np.array(right, dtype=bool)


@dataclass(frozen=True)
class Content:
    """The part of a row that a model reads: a prompt, its media in front of it, and the responses."""

    prompt: str
    responses: tuple[str, ...]
    media: tuple[MediaRef, ...] = ()

    def record(self, labels: Labels, source: str, origin: str) -> Record:
        """Return the record with every preference that the labels state."""
        parts = (*self.media, self.prompt) if self.media else (self.prompt,)
        question = Message("user", parts)
        responses = tuple(Response((question, Message("assistant", (text,)))) for text in self.responses)
        return Record(labels.id, responses, _preferences(labels), source, origin)


def _preferences(labels: Labels) -> tuple[Preference, ...]:
    if labels.num_rewards == 2 and labels.num_correct == 1:
        return (Preference(labels.best, 1 - labels.best),)
    correct, wrong = range(labels.num_correct), range(labels.num_correct, labels.num_rewards)
    return tuple(Preference(winner, loser) for winner in correct for loser in wrong)


class Media:
    """A finder of the images and videos that rows name.

    Args:
        images: folder or .tar/.zip archive; None: the folder of the data file, and `images` in it.
        data_file: the file whose rows name them.

    Raises:
        DataError: as `path_resolver`.
    """

    def __init__(self, images: str | None, data_file: str):
        folder = os.path.dirname(os.path.abspath(data_file)) if images is None else images
        if os.path.isdir(folder):
            self._resolvers = [in_folder(folder), in_folder(os.path.join(folder, "images"))]
        else:
            self._resolvers = [path_resolver(folder)]

    def find(self, value: object, name: str, kind: type[MediaRef] = ImageRef) -> tuple[MediaRef, ...]:
        """Find the media of a field: a path, bytes, {"bytes", "path"}, or a list of them.

        A video is a file or a folder of frames.

        Raises:
            RecordError: BAD_ROW without any: the row would be judged blind; as `media_refs`.
        """
        found = tuple(media_refs(value, self._resolve, name, kind))
        if not found:
            raise bad_row(name, value, "its path or bytes")
        return found

    def _resolve(self, path: str, kind: type[MediaRef]) -> MediaRef:
        """Return the file in the first folder that has it; a missing one is named when it is opened."""
        found = [resolve(path, kind) for resolve in self._resolvers]
        return next((ref for ref in found if os.path.exists(ref.path)), found[0])


def prompt_text(value: object, name: str) -> str:
    """Return a prompt without ``<image>``, because the image stands in front of it.

    The facts name ``<image>`` with a line break after it; elsewhere in the text it is taken out too,
    because a placeholder that stays would be read as text (our choice).

    Raises:
        RecordError: as `check_text`.
    """
    text = check_text(value, name)
    for form in (_PLACEHOLDER + "\n", "\n" + _PLACEHOLDER, _PLACEHOLDER):
        text = text.replace(form, "")
    return text


def text_list(value: object, name: str) -> tuple[str, ...]:
    """Check and return a non-empty list of texts.

    Raises:
        RecordError: BAD_ROW, BAD_TEXT.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise bad_row(name, value, "a list of texts, not empty")
    return tuple(check_text(text, f"{name}[{i}]") for i, text in enumerate(value))


def row_id(row: dict, key: str = "id") -> str:
    """Return a row's id as text.

    Raises:
        RecordError: BAD_ROW.
    """
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise bad_row(key, value, "text or a number")
    return str(value)


def named(origin: str, error: RecordError) -> DataError:
    """Return the error of one row as an error of the benchmark, which is only comparable when it is whole."""
    return DataError(f"{origin}: {error.message} ({error.code}); a benchmark is read whole: restore the published file")

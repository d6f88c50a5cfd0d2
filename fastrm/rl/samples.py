"""Rollouts as trainers hand them over, and the groups of equal prompts that are asked about once.

A trainer gives each rollout a prompt of its own, with copies of its images. Here they become groups again: a prompt and
its images once, with all responses, which is what a reward model computes in one pass.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from fastrm.data.record import ImageRef
from fastrm.data.sources.conversation import PLACEHOLDERS, escaped
from fastrm.data.sources.media import any_path, media_ref
from fastrm.errors import DataError, RecordError
from fastrm.rl.chat_text import read_chat

_IMAGE_PARTS = ("image", "image_url")
_PLACES = ("image", "image_url", "path", "url", "bytes")


@dataclass(frozen=True)
class Sample:
    """One rollout.

    Attributes:
        prompt: messages ``{"role", "content": text or parts}``; or text, which `chat_text.read_chat` reads.
        response: the text of the rollout alone.
        images: those of the prompt, one or a list in order: path, bytes, data URI, Pillow image, ``{"bytes", "path"}``
            or URL. They are not needed where the parts of the prompt hold them, as ``{"type": "image", "image": ...}``.
        truth: the true answer, or several; None if there is none.
        has_markers: ``<image>`` in the prompt's texts always is the place of an image, as in rows of ms-swift. Else it
            is text where the prompt has no images.
    """

    prompt: str | Sequence[Mapping]
    response: str
    images: object = None
    truth: object = None
    has_markers: bool = False


@dataclass
class Grouped:
    """Samples as groups of equal prompts.

    Attributes:
        groups: as `fastrm.RewardModel.score` takes them; images are bytes, paths or URLs.
        places: of each sample: the number of its group and of its response there; None where it has an error.
        errors: of each sample that cannot be asked about: the code and the reason.
    """

    groups: list[dict] = field(default_factory=list)
    places: list[tuple[int, int] | None] = field(default_factory=list)
    errors: dict[int, RecordError] = field(default_factory=dict)


class ImageReader:
    """A reader of the images of one call that encodes equal pictures once."""

    def __init__(self):
        self._encoded: dict[tuple, ImageRef] = {}

    def read(self, value: object, name: str) -> tuple[str, object]:
        """Return the key of an image, equal for equal content, and its bytes, path or URL.

        Raises:
            RecordError: as `media_ref`, for what is no image.
        """
        if isinstance(value, Mapping) and isinstance(value.get("url"), str) and set(value) <= {"url", "detail"}:
            value = value["url"]  # {"type": "image_url", "image_url": {"url": ...}}
        if isinstance(value, str) and value[:8].lower().startswith(("http://", "https://")):
            return value, value
        if isinstance(value, Image.Image):
            ref = self._of_picture(value, name)
        else:
            ref = media_ref(dict(value) if isinstance(value, Mapping) else value, any_path, name, ImageRef)
        return ref.key, ref.data if ref.data is not None else ref.path

    def _of_picture(self, picture: Image.Image, name: str) -> ImageRef:
        # Hashing the pixels takes a tenth of the time of encoding them, and all rollouts of a prompt have the same.
        try:
            pixels = hashlib.sha256(picture.tobytes()).digest()
        except Exception as error:  # a lazily read file may raise anything that its decoder raises
            raise RecordError("IMAGE_DAMAGED", f'"{name}" cannot be decoded: {error}; replace the image') from error
        palette = picture.palette.tobytes() if picture.palette is not None else b""
        notes = (picture.info.get("exif"), picture.info.get("transparency"))
        key = (picture.mode, picture.size, pixels, palette, *notes)
        if key not in self._encoded:
            self._encoded[key] = media_ref(picture, any_path, name, ImageRef)
        return self._encoded[key]


def check_samples(samples: Iterable[Sample]) -> list[Sample]:
    """Return the samples as a list.

    Raises:
        DataError: for anything else among them, such as a row of a data set.
    """
    samples = list(samples)
    for number, sample in enumerate(samples):
        if not isinstance(sample, Sample):
            raise DataError(
                f"samples[{number}] is a {type(sample).__name__}, wanted a fastrm.rl.Sample: "
                "Sample(prompt, response, images=..., truth=...)"
            )
    return samples


def group_samples(samples: Iterable[Sample]) -> Grouped:
    """Group samples by prompt and images, in the order in which prompts first appear.

    A sample that cannot be used, such as one with an image that is none, has an error of its own.
    """
    found, reader, numbers = Grouped(), ImageReader(), {}
    for number, sample in enumerate(samples):
        try:
            names, messages, images = read_prompt(sample.prompt, sample.images, reader)
            response = _checked_text(sample.response)
        except RecordError as error:
            found.errors[number] = error
            found.places.append(None)
            continue
        if not images and not sample.has_markers and not any(map(_has_places, messages)):
            messages = escaped(messages)  # without images, <image> is text
        key = json.dumps([messages, names], sort_keys=True, default=str)
        if key not in numbers:
            numbers[key] = len(found.groups)
            found.groups.append({"messages": messages, "responses": []} | ({"images": images} if images else {}))
        responses = found.groups[numbers[key]]["responses"]
        responses.append(response)
        found.places.append((numbers[key], len(responses) - 1))
    return found


def read_prompt(
    prompt: str | Sequence[Mapping], images: object, reader: ImageReader
) -> tuple[list[str], list[dict], list]:
    """Return the keys of a prompt's images, its messages with bare image parts, and its images in order.

    Raises:
        RecordError: for messages or an image that are none, or RENDERED_TEXT as `read_chat`.
    """
    if not isinstance(prompt, str) and (isinstance(prompt, Mapping) or not isinstance(prompt, Iterable)):
        raise RecordError("BAD_ROW", f"the prompt is a {type(prompt).__name__}, wanted text or a list of messages")
    messages = read_chat(prompt) if isinstance(prompt, str) else [_plain(m) for m in prompt]
    inside = [
        value
        for message in messages
        if isinstance(message.get("content"), list)
        for part in message["content"]
        if _is_image(part)
        and (value := next((part[key] for key in _PLACES if part.get(key) is not None), None)) is not None
    ]
    given = _as_list(images)
    if inside and given and len(inside) != len(given):
        raise RecordError(
            "IMAGE_COUNT",
            f"the parts of the prompt hold {len(inside)} images, the row {len(given)}; give the same, or those of one",
        )
    read = [reader.read(value, f"images[{i}]") for i, value in enumerate(inside or given)]
    return [key for key, _ in read], list(map(_without_images, messages)), [image for _, image in read]


def _as_list(images: object) -> list:
    """Return the images of a row: one may stand there without a list, as in data sets with one image a row."""
    is_one = isinstance(images, (str, bytes, Path, Mapping, Image.Image)) or getattr(images, "ndim", 1) > 1
    return [] if images is None else [images] if is_one else list(images)


def _is_image(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") in _IMAGE_PARTS


def _plain(message: object) -> dict:
    """Return a message of lists and dicts: trainers keep them in arrays, with None for keys that others have."""
    if not isinstance(message, Mapping):
        raise RecordError("BAD_ROW", f"a message of the prompt is a {type(message).__name__}, wanted an object")
    content = message.get("content")
    if content is not None and not isinstance(content, str) and isinstance(content, Iterable):
        parts = [dict(part) if isinstance(part, Mapping) else part for part in content]
        return {**message, "content": [_known(part) for part in parts]}
    return _known(message)


def _known(value: object) -> object:
    return {key: one for key, one in value.items() if one is not None} if isinstance(value, Mapping) else value


def _without_images(message: dict) -> dict:
    if not isinstance(message.get("content"), list):
        return message
    return {**message, "content": [{"type": "image"} if _is_image(part) else part for part in message["content"]]}


def _has_places(message: dict) -> bool:
    return isinstance(message.get("content"), list) and any(map(_is_image, message["content"]))


def _checked_text(response: object) -> str:
    """Return a response as the readers take it; a placeholder in it is text.

    Raises:
        RecordError: BAD_ROW or BAD_TEXT. One such response would cost its whole group the rewards.
    """
    if not isinstance(response, str):
        raise RecordError("BAD_ROW", f"a response is a {type(response).__name__}, wanted text")
    if "\0" in response or any("\ud800" <= c <= "\udfff" for c in response):
        raise RecordError("BAD_TEXT", "a response holds a NUL character or a lone surrogate, which no tokenizer reads")
    return escaped(response) if any(p in response for p in PLACEHOLDERS) else response

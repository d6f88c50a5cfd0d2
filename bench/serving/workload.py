"""The requests of the serving benchmark: scanned digits, each with a question and eight answers.

No two groups are equal, and no two images: what the server keeps of an earlier request would answer a later one.
"""

import base64
import io
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from PIL import Image

RESPONSES = 8
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Group:
    """A prompt with one image, and its responses."""

    prompt: str
    image: bytes
    responses: tuple[str, ...]

    def as_dict(self) -> dict:
        """Return the group as `RewardModel.score` takes it."""
        return {"prompt": self.prompt, "images": [self.image], "responses": list(self.responses)}

    def request(self, responses: tuple[str, ...]) -> bytes:
        """Return the body of a request for the rewards of some responses."""
        return json.dumps(
            {"groups": [{"prompt": self.prompt, "images": [self._uri], "responses": list(responses)}]}
        ).encode()

    def classification(self, response: str) -> bytes:
        """Return the body of a request to vLLM's `/classify` for the reward of one response."""
        question = [{"type": "image_url", "image_url": {"url": self._uri}}, {"type": "text", "text": self.prompt}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": response}]
        return json.dumps({"messages": messages, "add_generation_prompt": False, "use_activation": False}).encode()

    @property
    def _uri(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.image).decode()


def make_groups(side: int, start: int = 0) -> Iterator[Group]:
    """Yield groups without end about scikit-learn's scanned digits, drawn with `side` pixels.

    Args:
        start: number of the first group; equal numbers give equal groups.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    for number in itertools.count(start):
        place = number % len(digits.images)
        grey = Image.fromarray((255 - digits.images[place] * 255 / 16).astype("uint8"))
        picture = grey.resize((side, side), Image.Resampling.BICUBIC).convert("RGB")
        picture.putpixel((0, 0), (number >> 16 & 255, number >> 8 & 255, number & 255))
        file = io.BytesIO()
        picture.save(file, "PNG", compress_level=1)
        right = digits.target[place]
        answers = tuple(f"The digit is {_WORDS[(right + n) % 10]}." for n in range(RESPONSES))
        yield Group(f"Which digit is in picture {number}?", file.getvalue(), answers)


def whole(groups: Iterable[Group]) -> Iterator[bytes]:
    """Yield one request for each group, with all its responses."""
    return (group.request(group.responses) for group in groups)


def singles(groups: Iterable[Group]) -> Iterator[bytes]:
    """Yield one request for each response, those of a group one after another, as trainers send rollouts."""
    return (group.request((response,)) for group in groups for response in group.responses)


def classify(groups: Iterable[Group]) -> Iterator[bytes]:
    """Yield one request to vLLM's `/classify` for each response, those of a group one after another."""
    return (group.classification(response) for group in groups for response in group.responses)

"""The fixed set of prompts that a server is checked with: texts, and for a vision model images, made in code."""

import base64
import io
import random
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

from fastrm.data.record import ImageRef
from fastrm.data.template import ConversationEncoder

# Kinds whose conversations differ in one thing each, so that the kinds that disagree tell the cause.
SYSTEM, KEPT, RESIZED = "with a system turn", "images of whole patches", "images to be resized"
LONG = 600  # words of a long prompt, some 800 tokens
_WORDS = (
    "river stone window seven quickly blue market letter under green paper winter carries often small music before "
    "garden silver answer yellow distant summer finds bridge open morning three never bread walks between cloud"
)
_ANSWERS = ("Yes, it is a red bus.", "No.", "I cannot say:\n\n1. too dark\n2. too far")
_ODD = (
    "na\u00efve caf\u00e9 e\u0301\u0301 \u65e5\u672c\u8a9e \U0001f916\U0001f3fd "
    "\u0645\u0631\u062d\u0628\u0627 x\u200by",
    "  def f(x):\n\treturn {'a': [1,  2]}\r\n\n\n\n# 3.14159e-10  <b>&amp;</b> $$\\frac{1}{2}$$",
    "0000000000 9,999,999.99 \u00bd \u2460 \ufb01 \u212b AAAAAAAAAAAAAAAAAAAAAAAA ~~~~~~~~ ||||",
)
_ODD_ANSWERS = ("", " spaces around \n\n", "\u2026\U0001f44d", "<p>not</p> `code`\n```\nx\n```")


@dataclass(frozen=True)
class CheckedPrompt:
    """A prompt of the set with its responses.

    Attributes:
        messages: text contents, or lists of parts with images as data URIs.
    """

    kind: str
    messages: tuple[dict, ...]
    responses: tuple[str, ...]

    @cached_property
    def images(self) -> list[str]:
        """The data URIs of its images, in order."""
        contents = [message["content"] for message in self.messages if isinstance(message["content"], list)]
        return [part["image"] for content in contents for part in content if part["type"] == "image"]

    @property
    def group(self) -> dict:
        """The group that `RewardModel.score` takes."""
        return {"messages": list(self.messages), "responses": list(self.responses)}

    def without_images(self) -> dict:
        """Return the group of its text alone."""
        messages = [
            {**turn, "content": "".join(part.get("text", "") for part in turn["content"])}
            if isinstance(turn["content"], list)
            else turn
            for turn in self.messages
        ]
        return {"messages": messages, "responses": list(self.responses)}


def checked_prompts(encoder: ConversationEncoder) -> list[CheckedPrompt]:
    """Return the set for a model with this encoder; the same for every call."""
    texts = [
        ("questions", (_turn("user", "Is this a bus?"),), _ANSWERS),
        ("questions", (_turn("user", "Write one word about a garden."),), ("green", "Garden gardens garden.", "no")),
        (SYSTEM, (_turn("system", "Answer in one word."), _turn("user", "Is a bus red?")), _ANSWERS),
        (SYSTEM, (_turn("system", "You count."), _turn("user", "2 + 3 = ?")), ("5", "6", "five, I think")),
        ("dialogues", _dialogue(), _ANSWERS),
        ("long texts", (_turn("user", words(LONG)),), ("A river and a bridge.", words(LONG // 20, seed=1))),
        ("long texts", (_turn("user", "Tell a story."),), (words(LONG * 2 // 3, seed=2), words(LONG // 2, seed=3))),
        *(("odd characters", (_turn("user", text),), _ODD_ANSWERS) for text in _ODD),
    ]
    if encoder.vision is not None:
        texts += _image_prompts(encoder)
    return [CheckedPrompt(kind, tuple(messages), tuple(responses)) for kind, messages, responses in texts]


def words(count: int, seed: int = 0) -> str:
    """Return a text of random words, the same for a seed."""
    choose, names = random.Random(seed), _WORDS.split()
    return " ".join(choose.choice(names) for _ in range(count)) + "."


def _turn(role: str, content: str | list[dict]) -> dict:
    return {"role": role, "content": content}


def _dialogue() -> tuple[dict, ...]:
    says = ("Hello.", "Hello! What is it?", "Is the bus red?", "Which bus?", "The one in front.")
    return tuple(_turn(("user", "assistant")[number % 2], text) for number, text in enumerate(says))


def _image_prompts(encoder: ConversationEncoder) -> list[tuple]:
    kept = [_kept_size(encoder, *size) for size in ((56, 56), (112, 84))]
    wide, high = kept[1]
    resized = [(2 * wide + 13, high + 9), (641, 427), (12, 20)]
    found = [(KEPT, (_asks(_picture(*size, seed)),), _ANSWERS) for seed, size in enumerate(kept)]
    found.append((KEPT, (_asks(_picture(*kept[0], 2), _picture(*kept[1], 3)),), _ANSWERS))
    found += [(RESIZED, (_asks(_picture(*size, seed)),), _ANSWERS) for seed, size in enumerate(resized, 4)]
    return found


def _asks(*images: str) -> dict:
    parts = [{"type": "image", "image": image} for image in images]
    return _turn("user", [*parts, {"type": "text", "text": "What is in the picture?"}])


def _kept_size(encoder: ConversationEncoder, width: int, height: int) -> tuple[int, int]:
    """Return the width and height to which an image of this many pixels is resized, and which is kept as it is."""
    form = encoder.vision.patch_format
    size = encoder.measure(ImageRef(data=_png(width, height, 0)))
    return size.width * form.side * form.merge, size.height * form.side * form.merge


def _picture(width: int, height: int, seed: int) -> str:
    return "data:image/png;base64," + base64.b64encode(_png(width, height, seed)).decode()


def _png(width: int, height: int, seed: int) -> bytes:
    """Return a picture of bright discs on a gradient, in which resizing changes every value."""
    chance = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([255 * x / width, 255 * y / height, np.full((height, width), 90.0)], axis=-1)
    for _ in range(6):
        across, down, radius = chance.random(3) * (width, height, max(width, height) / 4)
        pixels[(x - across) ** 2 + (y - down) ** 2 < radius**2] = chance.integers(0, 256, 3)
    buffer = io.BytesIO()
    Image.fromarray((pixels + chance.integers(0, 40, pixels.shape)).clip(0, 255).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()

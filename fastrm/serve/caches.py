"""Bounded memories by content: decoded images, and rewards of responses that were computed before."""

import copy
import functools
import hashlib
import threading
from collections import OrderedDict
from typing import Generic, TypeVar

from fastrm.data.media.format import MediaSize, Patches, VisionFormat
from fastrm.data.record import MediaRef, Record
from fastrm.data.template import ConversationEncoder
from fastrm.limits import MediaLimits

Value = TypeVar("Value")


class BoundedCache(Generic[Value]):
    """The values that were used last, up to a capacity; any number of threads may share it.

    Args:
        capacity: the sum of the sizes that are kept; 0 keeps nothing.

    Attributes:
        size: the sum of the sizes of what is kept.
        hits, misses: of all calls of `get`.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.size = self.hits = self.misses = 0
        self._values: OrderedDict[bytes, tuple[Value, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: bytes) -> Value | None:
        """Return the value of a key; None if it is not kept."""
        with self._lock:
            found = self._values.get(key)
            if found is None:
                self.misses += 1
                return None
            self.hits += 1
            self._values.move_to_end(key)
            return found[0]

    def store(self, key: bytes, value: Value, size: int = 1) -> None:
        """Keep a value, and forget those that were not used for longest; one that is over the capacity is not kept."""
        with self._lock:
            if key in self._values or size > self.capacity:
                return
            self._values[key] = (value, size)
            self.size += size
            while self.size > self.capacity:
                self.size -= self._values.popitem(last=False)[1][1]

    def __len__(self) -> int:
        return len(self._values)


def is_known_by_content(record: Record) -> bool:
    """Return whether equal keys of the record's media mean equal bytes; a path's file may change."""
    return all(ref.data is not None or ref.digest is not None for ref in record.media)


def response_digests(model: str, is_routed: bool, record: Record) -> list[bytes]:
    """Return a digest of each conversation and of who scores it: equal digests mean equal rewards.

    A prompt that responses share is hashed once, however long it is.

    Args:
        model: its name.
        is_routed: the model's route scores the group.
    """
    digests, prompt, of_prompt = [], None, b""
    for response in record.responses:
        before = (response.arguments, response.messages[:-1])
        if before != prompt:  # shared messages are the same objects, which takes no time to see
            prompt, of_prompt = before, _digest((model, is_routed, response.prompt_key))
        digests.append(_digest((of_prompt, response.messages[-1].key)))
    return digests


def _digest(key: tuple) -> bytes:
    return hashlib.sha256(repr(key).encode("utf-8", "surrogatepass")).digest()


def remembering_images(encoder: ConversationEncoder, cache: BoundedCache[Patches]) -> ConversationEncoder:
    """Return an encoder of the same tokens and pixels that keeps decoded images in the cache."""
    if encoder.vision is None:
        return encoder
    remembering = copy.copy(encoder)
    remembering.vision = copy.copy(encoder.vision)
    owner = object()  # another encoder may resize the same image differently
    remembering.vision.cut = functools.partial(_cut, encoder.vision, cache, owner)
    return remembering


def _cut(
    vision: VisionFormat,
    cache: BoundedCache[Patches],
    owner: object,
    ref: MediaRef,
    size: MediaSize,
    limits: MediaLimits,
) -> Patches:
    if ref.data is None and ref.digest is None:
        return vision.cut(ref, size, limits)
    key = repr((id(owner), ref.key, size)).encode()
    patches = cache.get(key)
    if patches is None:
        patches = vision.cut(ref, size, limits)
        cache.store(key, patches, patches.values.nbytes)
    return patches

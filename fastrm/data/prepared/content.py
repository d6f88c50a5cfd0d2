"""Hashes by which prepared data recognises equal content: of media, prompts, responses and records.

A hash has 128 bits where equal hashes are always taken for equal content (groups, duplicates, images), and 64 where a
few million are compared with a few thousand (decontamination). All are BLAKE2b, except for media: those are SHA-256,
for which processors have instructions.
"""

import functools
import hashlib
import os
from dataclasses import replace

import numpy as np
from PIL import Image

from fastrm.data.media.images import decode_image, open_bytes, read_bytes
from fastrm.data.media.videos import frame_refs, naming_frame
from fastrm.data.record import ImageRef, MediaRef, Message, Preference, Record, Response, VideoRef
from fastrm.json_files import to_json
from fastrm.limits import MediaLimits

# The number of digests that a process remembers: rows that share an image are mostly neighbours.
REMEMBERED_MEDIA = 4096
SHORT_WORDS = 8
# Side of the grey picture of a perceptual hash, and of the square of its low frequencies.
_SIDE, _LOW = 32, 8
# The least contrast in grey levels: below it a picture has no frequencies worth comparing.
_LEAST_CONTRAST = 8

HASH = np.dtype([("high", "<u8"), ("low", "<u8")])  # 128 bits


def with_digests(record: Record, limits: MediaLimits) -> Record:
    """Return the record with the digest of every medium, whose bytes are read for it.

    Raises:
        RecordError: the codes of `read_bytes`.
    """
    every = [*record.responses, *(record.original.responses if record.original else ())]
    refs = {ref for response in every for ref in response.media}
    if not refs:
        return record
    known = {ref: replace(ref, digest=_digest(ref, limits)) for ref in refs}

    def message(old: Message) -> Message:
        return replace(old, parts=tuple(part if isinstance(part, str) else known[part] for part in old.parts))

    def digested(old: Record) -> Record:
        responses = tuple(replace(one, messages=tuple(map(message, one.messages))) for one in old.responses)
        return replace(old, responses=responses, original=old.original and digested(old.original))

    return digested(record)


def _digest(ref: MediaRef, limits: MediaLimits) -> str:
    if ref.data is not None:
        return hashlib.sha256(read_bytes(ref, limits)).hexdigest()
    try:
        status = os.stat(ref.path)
    except (OSError, ValueError):
        status = None  # the read below raises the error
    return _stored_digest(ref, limits, status and (status.st_mtime_ns, status.st_size))


@functools.lru_cache(maxsize=REMEMBERED_MEDIA)
def _stored_digest(ref: MediaRef, limits: MediaLimits, status: tuple[int, int] | None) -> str:
    """Return the digest of a stored medium; `status` is a key of the cache, so that a replaced file is read again."""
    if isinstance(ref, VideoRef):
        if (frames := frame_refs(ref)) is not None:
            with naming_frame(ref):
                digests = [hashlib.sha256(read_bytes(frame, limits)).hexdigest() for frame in frames]
            return hashlib.sha256("".join(digests).encode()).hexdigest()
        if ref.member is None and ref.span is None:
            # Read in blocks: a video may be larger than the memory.
            with open_bytes(ref, limits) as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(read_bytes(ref, limits)).hexdigest()


def prompt_hash(record: Record) -> bytes:
    """Hash a prompt to 16 bytes, equal for the same prompt and images, as `Record.prompt_key` says."""
    return _hash(record.prompt_key)


def response_hash(response: Response) -> bytes:
    """Hash a response with its whole conversation to 16 bytes."""
    return _hash(response.key)


def record_hash(responses: list[bytes], preferences: tuple[Preference, ...]) -> bytes:
    """Hash a record to 16 bytes, equal for the same responses and preferences in any order.

    Args:
        responses: `response_hash` of each.
    """
    edges = sorted(
        [sorted([responses[p.winner].hex(), responses[p.loser].hex()]) if p.tie else
         [responses[p.winner].hex(), responses[p.loser].hex()], p.margin, p.weight, p.tie]
        for p in preferences
    )  # fmt: skip
    return _hash([sorted(response.hex() for response in responses), edges])


def ordered_hash(responses: list[bytes], preferences: tuple[Preference, ...]) -> bytes:
    """Hash a record to 8 bytes that also change with the order of responses and preferences, as sums of floats do."""
    edges = [[p.winner, p.loser, p.margin, p.weight, p.tie] for p in preferences]
    return _hash([[response.hex() for response in responses], edges], 8)


def name_hash(name: str) -> bytes:
    """Hash a name as it is to 8 bytes."""
    return hashlib.blake2b(name.encode(), digest_size=8).digest()


def text_hash(text: str) -> bytes:
    """Hash a text to 8 bytes, equal for texts that differ only in case, white space and image placeholders."""
    words = text.replace("<image>", " ").casefold().split()
    return hashlib.blake2b(" ".join(words).encode(), digest_size=8).digest()


def is_short(text: str) -> bool:
    """Return whether a text has too few words to recognise an answer by."""
    return len(text.split()) < SHORT_WORDS


def question_hash(record: Record) -> bytes:
    """Hash the user's text in the prompt to 8 bytes, as `text_hash`."""
    turns = (message for message in record.responses[0].messages[:-1] if message.role == "user")
    return text_hash(" ".join(message.text for message in turns))


def perceptual_hash(ref: ImageRef, limits: MediaLimits) -> int | None:
    """Hash an image to 64 bits that change little when it is scaled, compressed or recoloured (pHash).

    Signs, against their median, of the 8 x 8 lowest frequencies but the mean of a 32 x 32 grey picture
    (Zauner 2010, "Implementation and benchmarking of perceptual image hash functions"). None for a picture
    without contrast.

    Raises:
        RecordError: as `decode_image`.
    """
    grey = decode_image(ref, limits).convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    pixels = np.asarray(grey, dtype=np.float64)
    if np.ptp(pixels) < _LEAST_CONTRAST:
        return None
    basis = _cosines()
    low = (basis @ pixels @ basis.T).ravel()
    bits = low > np.median(low[1:])
    bits[0] = False  # the mean is brightness
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


@functools.cache
def _cosines() -> np.ndarray:
    """Return the lowest rows (8, 32) of the type-II cosine transform."""
    return np.cos(np.pi / _SIDE * np.outer(np.arange(_LOW), np.arange(_SIDE) + 0.5))


def two_words(value: bytes) -> tuple[int, int]:
    """Return 16 bytes as `HASH` holds them."""
    return first_word(value), first_word(value[8:])


def first_word(value: bytes) -> int:
    """Return the first 8 bytes as an integer."""
    return int.from_bytes(value[:8], "little")


def _hash(value: list | tuple, num_bytes: int = 16) -> bytes:
    text = to_json(value, ensure_ascii=False, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=num_bytes).digest()

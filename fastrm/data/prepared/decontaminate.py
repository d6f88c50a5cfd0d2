"""Training records that a benchmark holds too, found by four kinds of match.

    image              an image with the same bytes
    looks              an image that looks the same: perceptual hashes at most a few bits apart
    image_question     the same image with the same question
    response_pair      the same two responses, in either order; without images, to the same question. With images
                       pairs of short ones do not count: "yes" and "no" are answers to many pictures

Texts are compared without case, white space and placeholders. The paper mentions no decontamination, so it is
off unless `data.decontaminate` asks for it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from fastrm.data.batching import mix
from fastrm.data.prepared.content import first_word, is_short, perceptual_hash, question_hash, text_hash, with_digests
from fastrm.data.prepared.units import RecordTable
from fastrm.data.record import ImageRef, Record
from fastrm.data_config import DecontaminateConfig
from fastrm.errors import DataError, RecordError
from fastrm.limits import MediaLimits

KINDS = ("image", "looks", "image_question", "response_pair")
# Differing bits of 64 between hashes of one picture, scaled or compressed again; unrelated ones average 32.
DEFAULT_DISTANCE = 4
_CHUNK = 2**22  # the number of comparisons at a time


@dataclass(frozen=True)
class Benchmarks:
    """Hashes (n,) uint64, sorted and distinct, of the benchmarks' content."""

    images: np.ndarray
    looks: np.ndarray
    image_questions: np.ndarray
    response_pairs: np.ndarray


def collect(records: Iterable[Record], settings: DecontaminateConfig, limits: MediaLimits) -> Benchmarks:
    """Collect the hashes of benchmarks' records.

    Raises:
        DataError: an image cannot be read, and a kind that is switched on compares images.
    """
    compares_looks = settings.perceptual_hash is not False  # a distance of 0 is not False
    reads_images = settings.image_hash or compares_looks or settings.image_question
    images, looks, image_questions, pairs = [], [], [], []
    for record in records:
        question = first_word(question_hash(record))
        texts = [(first_word(text_hash(response.text)), is_short(response.text)) for response in record.responses]
        is_text_only = not any(response.media for response in record.responses)
        pairs += [
            _pair(a, b, question, is_text_only)
            for (a, short), (b, too) in combinations(texts, 2)
            if is_text_only or not (short and too)
        ]
        if is_text_only or not reads_images:
            continue
        try:
            found = with_digests(record, limits).media
            if compares_looks:
                hashes = (perceptual_hash(ref, limits) for ref in found if isinstance(ref, ImageRef))
                looks += [value for value in hashes if value is not None]
        except RecordError as error:
            raise DataError(
                f"{record.origin}: {error.message}; or compare without images: set image_hash, perceptual_hash and "
                "image_question of data.decontaminate to false"
            ) from error
        digests = [first_word(bytes.fromhex(ref.digest)) for ref in found]
        images += digests
        image_questions += [_image_question(np.uint64(digest), np.uint64(question)) for digest in digests]
    return Benchmarks(*(np.unique(np.array(v, dtype=np.uint64)) for v in (images, looks, image_questions, pairs)))


def find_contaminated(
    table: RecordTable, benchmarks: Benchmarks, settings: DecontaminateConfig
) -> dict[str, np.ndarray]:
    """Return for each kind that is switched on (N,) bool: the records that match."""
    owner, digests = table.owner_of_media(), table.media["digest"]["high"]
    found = {}
    if settings.image_hash:
        found["image"] = _of_owners(np.isin(digests, benchmarks.images), owner, len(table))
    if settings.perceptual_hash is not False:
        distance = DEFAULT_DISTANCE if settings.perceptual_hash is True else settings.perceptual_hash
        alike = _near(table.media["looks"], benchmarks.looks, distance) & table.media["is_comparable"]
        found["looks"] = _of_owners(alike, owner, len(table))
    if settings.image_question:
        keys = _image_question(digests, table.columns["question"][owner])
        found["image_question"] = _of_owners(np.isin(keys, benchmarks.image_questions), owner, len(table))
    if settings.response_pair:
        found["response_pair"] = _same_pairs(table, benchmarks.response_pairs)
    return found


def _of_owners(matches: np.ndarray, owner: np.ndarray, num_records: int) -> np.ndarray:
    found = np.zeros(num_records, dtype=bool)
    found[owner[matches]] = True
    return found


def _near(hashes: np.ndarray, wanted: np.ndarray, distance: int) -> np.ndarray:
    """Return which hashes differ from one of `wanted` by at most `distance` bits; every pair is compared."""
    distinct, back = np.unique(hashes, return_inverse=True)
    near = np.zeros(len(distinct), dtype=bool)
    rows = max(1, _CHUNK // max(1, len(wanted)))
    for first in range(0, len(distinct), rows):
        bits = np.bitwise_count(distinct[first : first + rows, None] ^ wanted)
        near[first : first + rows] = (bits <= distance).any(axis=1)
    return near[back]


def _same_pairs(table: RecordTable, wanted: np.ndarray) -> np.ndarray:
    """Return the records with a pair of responses among `wanted`; records of equally many responses together."""
    found = np.zeros(len(table), dtype=bool)
    counts = table.columns["num_texts"]
    for count in np.unique(counts[counts > 1]):
        members = np.flatnonzero(counts == count)
        texts = table.texts[table.first_text[members, None] + np.arange(count)]
        question, is_text_only = table.columns["question"][members], table.is_text_only[members]
        for a, b in combinations(range(count), 2):
            counts_as_pair = is_text_only | ~(texts["is_short"][:, a] & texts["is_short"][:, b])
            pairs = _pair(texts["hash"][:, a], texts["hash"][:, b], question, is_text_only)
            found[members] |= counts_as_pair & np.isin(pairs, wanted)
    return found


def _pair(first, second, question, is_text_only):
    """Return the hash of two responses in either order, with the question if the prompt is text."""
    with np.errstate(over="ignore"):
        both = mix(np.asarray(first, dtype=np.uint64)) + mix(np.asarray(second, dtype=np.uint64))
        return np.where(is_text_only, mix(both ^ np.asarray(question, dtype=np.uint64)), both)


def _image_question(digest, question):
    return mix(digest) ^ question


def kinds_of(found: dict[str, np.ndarray], number: int) -> Sequence[str]:
    """Return the kinds of match of a record."""
    return [kind for kind, matches in found.items() if matches[number]]

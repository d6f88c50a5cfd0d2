"""The groups that the check of exactness.py computes: of the user's own, the shortest of each kind that can be read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastrm.data.group import GroupSize
from fastrm.data.media.format import Patches
from fastrm.data.packing import EncodedGroup
from fastrm.data.record import VideoRef
from fastrm.data.template import ConversationEncoder
from fastrm.errors import RecordError

# The first and the last response of a group: one continues the prompt's own sequence, the other is a branch.
RESPONSES = 2
# The number of groups among which the shortest ones are looked for.
CANDIDATES = 512
TRIES = 8  # the most groups of a kind that are tried until one can be read
KINDS = ("text", "image", "video")


@dataclass(frozen=True)
class Sample:
    """A group to check with: tokenised, its media decoded.

    Attributes:
        pixels: patches of its images and videos by key.
    """

    group: EncodedGroup
    pixels: dict[str, Patches]

    @property
    def chosen(self) -> list[int]:
        """The numbers of the responses that are compared."""
        count = len(self.group.responses)
        return list(range(count)) if count <= RESPONSES else [0, count - 1]


def pick_samples(
    groups: Sequence[GroupSize],
    load: Callable[[int], EncodedGroup],
    encoder: ConversationEncoder,
    kinds: Sequence[str] = KINDS,
) -> dict[str, Sample]:
    """Pick the shortest of the first groups for each kind that occurs, and that stock reads as we do.

    Args:
        load: the tokenised group of a number; where it or decoding raises RecordError, the next longer one is taken.
    """
    first = [groups[number] for number in range(min(len(groups), CANDIDATES))]
    by_kind: dict[str, list[int]] = {}
    for number in sorted(range(len(first)), key=lambda number: first[number].num_tokens):
        by_kind.setdefault(_kind_of(first[number], encoder), []).append(number)
    samples = {
        kind: next(filter(None, (_read(number, load, encoder) for number in numbers[:TRIES])), None)
        for kind, numbers in by_kind.items()
        if kind in kinds and (kind != "video" or encoder.vision.stock_reads_videos_alike)
    }
    return {kind: sample for kind, sample in samples.items() if sample is not None}


def _kind_of(group: GroupSize, encoder: ConversationEncoder) -> str:
    if not group.media:
        return "text"
    # Several planes of a model that reads no videos are tiles of one image; a video of one plane is read like an image.
    has_planes = VideoRef in encoder.vision.placeholders and any(image.frames > 1 for image in group.media)
    return "video" if has_planes else "image"


def _read(number: int, load: Callable[[int], EncodedGroup], encoder: ConversationEncoder) -> Sample | None:
    try:
        group = load(number)
        cut = {key: encoder.vision.cut(ref, encoder.measure(ref), encoder.limits) for key, ref in group.media.items()}
        return Sample(group, cut)
    except RecordError:
        return None  # the error is reported when the group is read in its turn

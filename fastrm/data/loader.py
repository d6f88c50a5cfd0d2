"""Decodes, tokenises and packs ahead of the training step, in worker processes.

Workers get plans (which groups make which pack) and return packs in the order of the plans; what
they return is a pure function of the plan, so the number of workers changes nothing but the speed.
"""

import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image

from fastrm.data.images import decode_image
from fastrm.data.order import StepOrder
from fastrm.data.packing import EncodedGroup, Pack, Pixels, build_pack, plan_packs
from fastrm.data.prepare import PreparedGroup, encode_group
from fastrm.data.record import ImageRef, Record
from fastrm.data.template import ConversationEncoder
from fastrm.errors import RecordError, StorageError

# Packs that each worker prepares ahead.
PREFETCH_PACKS = 4


@dataclass(frozen=True)
class PackPlan:
    """One pack of one step: the groups in it, and where the data stands after the step."""

    groups: tuple[int, ...]
    position: int
    is_last: bool


@dataclass(frozen=True)
class Refusal:
    """A group that could not be used when its turn came."""

    group: int
    code: str
    message: str


@dataclass
class LoadedPack:
    """A plan carried out. `pack` is None if every group of it was refused."""

    plan: PackPlan
    pack: Pack | None
    refused: list[Refusal] = field(default_factory=list)


def plan_steps(groups: Sequence[PreparedGroup], order: StepOrder, position: int, budget: int) -> Iterator[PackPlan]:
    """Endless pack plans from a step's start on; the last pack of each step says so."""
    sizes = [group.num_tokens for group in groups]
    images = [group.first_image for group in groups]
    for after, members in order.steps_from(position):
        packs = plan_packs(members.tolist(), sizes, images, budget)
        for number, pack in enumerate(packs):
            yield PackPlan(tuple(pack), after, number == len(packs) - 1)


def plan_once(groups: Sequence[PreparedGroup], budget: int) -> list[PackPlan]:
    """Plans that hold every group once, for evaluation and scoring.

    Groups are taken in runs of neighbours, so that results come back roughly in reading order.
    """
    plans, run, total = [], [], 0
    sizes = [group.num_tokens for group in groups]
    images = [group.first_image for group in groups]
    for number, size in enumerate(sizes):
        run.append(number)
        total += size
        if total >= 8 * budget or number == len(sizes) - 1:
            plans += [PackPlan(tuple(p), number + 1, False) for p in plan_packs(run, sizes, images, budget)]
            run, total = [], 0
    return plans


class PackBuilder(torch.utils.data.Dataset):
    """Carries out a plan: `builder[plan]` is a LoadedPack. Runs in the workers."""

    def __init__(
        self,
        records: Sequence[Record],
        encoder: ConversationEncoder,
        share: bool,
        encoded: Sequence[EncodedGroup] | None = None,
    ):
        self.records = records
        self.encoder = encoder
        self.share = share
        self.encoded = encoded  # the records' groups, if they are tokenised already

    def __getitem__(self, plan: PackPlan) -> LoadedPack:
        groups, decoded, refused = [], {}, []
        for number in plan.groups:
            record = self.records[number]
            try:
                group = encode_group(record, self.encoder) if self.encoded is None else self.encoded[number]
                for key, ref in group.images.items():
                    if key not in decoded:
                        decoded[key] = self._decode(ref)
                groups.append(group)
            except RecordError as error:
                refused.append(Refusal(number, error.code, error.message))
        if not groups:
            return LoadedPack(plan, None, refused)
        used = {key: decoded[key] for group in groups for key in group.images}
        processor = self.encoder.image_processor
        merge_size = processor.merge_size if processor is not None else 1
        pack = build_pack(groups, self._pixels(used), merge_size=merge_size, share=self.share)
        return LoadedPack(plan, pack, refused)

    def _decode(self, ref: ImageRef) -> Image.Image:
        image = decode_image(ref, self.encoder.limits)
        if self.encoder.merged_grid(*image.size, ref) != self.encoder.grid(ref):
            # The conversation was tokenised for the size that the file had then.
            raise RecordError("IMAGE_CHANGED", f'image "{ref}" has another size than when it was first read')
        return image

    def _pixels(self, decoded: dict[str, Image.Image]) -> Pixels:
        """Stock preprocessing of decoded images."""
        if not decoded:
            return {}
        batch = self.encoder.image_processor(images=list(decoded.values()), return_tensors="pt")
        grids = batch["image_grid_thw"]
        patches = torch.split(batch["pixel_values"], grids.prod(-1).tolist())
        return dict(zip(decoded, zip(patches, grids, strict=True), strict=True))


def load_packs(builder: PackBuilder, plans: Iterable[PackPlan], num_workers: int) -> Iterator[LoadedPack]:
    """Packs in the order of `plans`, built by `num_workers` processes ahead of time (0: here, when asked)."""
    loader = torch.utils.data.DataLoader(
        builder,
        batch_size=None,
        sampler=plans,
        num_workers=num_workers,
        prefetch_factor=PREFETCH_PACKS if num_workers else None,
        multiprocessing_context="fork" if num_workers else None,
        worker_init_fn=_ignore_signals,
    )
    try:
        yield from loader
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise StorageError(
            f"a data worker died ({str(error).splitlines()[0]}); it was killed or ran out of memory: use fewer workers"
        ) from error


def _ignore_signals(worker: int) -> None:
    """Ctrl-C, and a scheduler's SIGTERM, reach the whole process group; the training process decides
    what they mean. Workers whose parent is gone leave by themselves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

"""A gate that both trainers compute the same: no figure is saved if it is red."""

import math
from pathlib import Path

import numpy as np
import torch

import fastrm
from bench.peers.ms_swift_sides import Run
from fastrm.data.quarantine import Quarantine
from fastrm.data.record import ImageRef
from fastrm.data.sources import read_source

LOSS_TOLERANCE = 1e-5
NORM_TOLERANCE = 1e-4
PIXEL_TOLERANCE = 1e-6  # one rounding in float32 of values between -2 and 3


class RedGate(Exception):
    """The trainers were given, or computed, different things."""


def check_runs(ours: Run, theirs: Run) -> dict[str, float]:
    """Compare what both trained and their first steps; return the relative differences.

    Raises:
        RedGate: naming what differs.
    """
    if ours.trained != theirs.trained:
        raise RedGate(f"trained parameters: fastrm {ours.trained:,}, ms-swift {theirs.trained:,}")
    if abs(theirs.losses[0] - math.log(2)) < 0.01:
        raise RedGate(f"loss {theirs.losses[0]:.4f} says nothing: it is that of equal rewards")
    found = {}
    for name, (a, b), limit in (
        ("loss", (ours.losses[0], theirs.losses[0]), LOSS_TOLERANCE),
        ("gradient norm", (ours.grad_norms[0], theirs.grad_norms[0]), NORM_TOLERANCE),
    ):
        found[name] = abs(a - b) / abs(b)
        if not found[name] <= limit:  # also true for NaN
            raise RedGate(f"{name} of the first step: fastrm {a:.8g}, ms-swift {b:.8g}; wanted within {limit:.0e}")
    return found


def check_batch(inputs: Path, rows: Path, batch: dict[str, torch.Tensor]) -> None:
    """Compare the tokens and the pixels of ms-swift's first batch with those of fastrm, for the same rows.

    Args:
        inputs: the folder with `model/`.
        rows: the preferences, of which one batch holds all.
        batch: input_ids and attention_mask (B, L), first all chosen then all rejected responses; pixel_values (N, C)
            and image_grid_thw (B, 3), as ms-swift gave them to the model.

    Raises:
        RedGate: naming what differs.
    """
    encoder = fastrm.RewardModel.from_pretrained(inputs / "model").network.encoder
    pairs = [
        tuple(record.responses[n] for n in (record.preferences[0].winner, record.preferences[0].loser))
        for record in read_source(rows, quarantine=Quarantine(None))
    ]
    ours = [tuple(encoder.encode(response).tokens for response in pair) for pair in pairs]
    found = [ids[mask.bool()].numpy() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    theirs = list(zip(found[: len(found) // 2], found[len(found) // 2 :], strict=True))
    order = _match(ours, theirs)
    refs = [ref for side in (0, 1) for number in order for ref in pairs[number][side].media]
    _check_pixels(encoder, refs, batch)


def _match(ours: list[tuple], theirs: list[tuple]) -> list[int]:
    """Return for each of their pairs the number of ours with the same tokens; ms-swift takes any order."""
    if len(ours) != len(theirs):
        raise RedGate(f"preferences in a step: fastrm has {len(ours)}, ms-swift {len(theirs)}")
    left = dict(enumerate(ours))
    order = []
    for number, pair in enumerate(theirs):
        same = [n for n, other in left.items() if all(map(np.array_equal, pair, other))]
        if not same:
            lengths = [[len(tokens) for tokens in pair] for pair in (pair, *ours)]
            raise RedGate(
                f"tokens of ms-swift's preference {number}: no preference of fastrm has the same; there are "
                f"{lengths[0]}, with fastrm {lengths[1:]}"
            )
        order.append(same[0])
        del left[same[0]]
    return order


def _check_pixels(encoder, refs: list[ImageRef], batch: dict[str, torch.Tensor]) -> None:
    cut = [encoder.vision.cut(ref, encoder.measure(ref), encoder.limits) for ref in refs]
    grids = torch.tensor([patches.grid for patches in cut])
    if not torch.equal(grids, batch["image_grid_thw"]):
        raise RedGate(f"images in patches: fastrm has {grids.tolist()}, ms-swift {batch['image_grid_thw'].tolist()}")
    bytes_ = torch.from_numpy(np.concatenate([patches.values for patches in cut]))
    values = encoder.vision.patch_format.normalize(bytes_)
    difference = float((values - batch["pixel_values"]).abs().max())
    if not difference <= PIXEL_TOLERANCE:
        raise RedGate(f"pixel values: they differ by {difference:.1e}, wanted at most {PIXEL_TOLERANCE:.0e}")

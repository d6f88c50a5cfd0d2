"""The predicted speed-up of a prepared set is never above what sharing explains.

A group has prefix trees of t tokens, p query-key pairs and pictures of cost V, and E preferences. A pairwise trainer
processes t' tokens and p' pairs, and encodes the pictures 2E times. With a FLOPs for a token and b for a pair,

    shared = a t + b p + V        unshared = a t' + b p' + 2 E V

so that the speed-up, unshared / shared, is the mean of t'/t, p'/p and 2E with the weights a t, b p and V. It lies
between the least and the largest of them, whatever a, b and V are. With w = V / shared, the vision tower's share,

    speed-up = (1 - w) text + w 2 E,        text between t'/t (the sharing factor) and p'/p

More is known where all responses are equally long and equally often compared. Number the tree's tokens x; m(x) is
how often the pairwise trainer processes x, and d(x), its depth, how many keys it sees. Then

    t = sum 1,  t' = sum m(x),  p = sum d(x),  p' = sum m(x) d(x)

A prompt's token has m = 2E and a response's less, and is less deep: m falls as d rises, and Chebyshev's sum
inequality gives p'/p <= t'/t. So text <= t'/t, and the speed-up is at most (1 - w) t'/t + w 2 E.

Sums over the groups of an epoch are bounded alike: E is then that of the group with the most preferences.
"""

from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations, product

import numpy as np
import pytest

from fastrm.config import load_config
from fastrm.data.media.format import MediaSize, MediaSpan
from fastrm.data.prepared.count import Counted, GroupCounter
from fastrm.data.prepared.select import Selection
from fastrm.data.record import ImageRef, Message, Preference, Record, Response
from fastrm.data.template import EncodedResponse
from tests.helpers.epochs import Epoch, cost_model
from tests.helpers.runs import tiny_config

MODELS = ["0.1B", "3B", "7B", "72B", "235B", "InternVL3-8B"]
SETTINGS = [{}, {"freeze": ["vision"]}, {"freeze": ["vision", "projector"], "activation_checkpointing": "full"}]
ROUNDING = 1 + 1e-12  # the report's sums are float64


@dataclass(frozen=True)
class Shape:
    """A group: the side of its image in tokens (0: none), its prompt's text, each response, and who beats whom."""

    side: int
    prompt: int
    responses: tuple[int, ...]
    preferences: tuple[tuple[int, int], ...]

    def encoded(self, number: int) -> EncodedResponse:
        """Tokens of which prompts are equal within the group, and responses differ from their first token on."""
        image = self.side**2
        own = np.full(self.responses[number], 1_000 + number)
        tokens = np.concatenate([np.arange(10, 10 + self.prompt + image) % 900, own])
        size = MediaSize(1, self.side, self.side, 0.0)
        media = (MediaSpan(0, size, ImageRef(path="a.png", digest="ab" * 32)),) if image else ()
        return EncodedResponse(tokens, media, 0)


class _Groups:
    """Stands for the records of a prepared set, and for the encoder that tokenises them."""

    def __init__(self, shapes: list[Shape]):
        self.shapes = shapes

    def record(self, number: int) -> Record:
        shape = self.shapes[number]
        responses = tuple(Response((Message("assistant", (f"{number} {n}",)),)) for n in range(len(shape.responses)))
        return Record(f"{number}", responses, tuple(Preference(*pair) for pair in shape.preferences), "", "")

    def encode(self, response: Response) -> EncodedResponse:
        group, number = map(int, response.text.split())
        return self.shapes[group].encoded(number)


def count(shapes: list[Shape], config) -> Counted:
    """The shapes as the preparation's own pass counts them."""
    groups, number = _Groups(shapes), len(shapes)
    every = np.arange(number + 1)
    selection = Selection(every[:-1], every, np.ones(number, dtype=np.int64), np.zeros(number, dtype=bool))
    counted = GroupCounter(groups, selection, groups, config).count(range(number))
    assert len(counted.counts) == number, bytes(counted.refused)
    return counted


@pytest.fixture
def config(tmp_path):
    limits = {"data": {"max_tokens_per_group": 2**20}, "optim": {"tokens_per_pack": 2**20}}
    return load_config(tiny_config(tmp_path, "train.jsonl", **limits))


@dataclass(frozen=True)
class Ratios:
    """What a speed-up is made of, exactly, from the counts of a set."""

    tokens: Fraction
    pairs: Fraction
    pictures: int  # 2E at most
    vision_share: Fraction

    @classmethod
    def of(cls, counted: Counted, cost) -> "Ratios":
        sums = {name: sum(counted.counts[name].tolist()) for name in counted.counts.dtype.names}
        images = sum(Fraction(cost.of_medium(*size)) for size in counted.images[["height", "width", "frames"]].tolist())
        text = cost.per_token * sums["num_tokens"] + cost.per_attention_pair * sums["num_attention_pairs"]
        return cls(
            Fraction(sums["num_unshared_tokens"], sums["num_tokens"]),
            Fraction(sums["num_unshared_pairs"], sums["num_attention_pairs"]),
            2 * max(counted.counts["num_preferences"].tolist()),
            images / (images + text),
        )

    def bound(self, text: Fraction) -> float:
        """The largest speed-up if the text's is at most `text`."""
        return float((1 - self.vision_share) * text + self.vision_share * self.pictures)


def predicted(folder, config, counted: Counted, cost) -> dict:
    return Epoch(folder, counted, np.ones(len(counted.counts), dtype=np.int64)).report(config, cost)["sharing"]


def equal_responses(number: int, length: int, **shape) -> Shape:
    """All preferences between responses of one length: each is in as many of them as every other."""
    return Shape(responses=(length,) * number, preferences=tuple(combinations(range(number), 2)), **shape)


GRID = [
    equal_responses(number, length, side=side, prompt=prompt)
    for side, prompt, length, number in product((0, 8, 36, 128), (20, 700, 6_000), (1, 30, 300, 3_000), (2, 3, 4, 8))
]


def test_the_speedup_of_every_shape_of_the_grid_is_explained_by_sharing(tmp_path, config):
    counted, seen = count(GRID, config), set()
    for name, settings in product(MODELS, SETTINGS):
        cost = cost_model(name, **settings)
        for number, shape in enumerate(GRID):
            images = counted.images[:0]
            if shape.side:
                place = int(counted.counts["num_images"][:number].sum())
                images = counted.images[place : place + 1]
            alone = counted._replace(counts=counted.counts[number : number + 1].copy(), images=images)
            alone.counts["selected"] = 0
            found, ratios = predicted(tmp_path, config, alone, cost), Ratios.of(alone, cost)
            assert ratios.pairs <= ratios.tokens  # Chebyshev
            assert found["sharing_factor"] == float(ratios.tokens)
            assert 1 <= found["predicted_speedup"] <= ratios.bound(ratios.tokens) * ROUNDING, (name, settings, shape)
            seen.add(found["predicted_speedup"] > 1.05 * found["sharing_factor"])
    assert seen == {True, False}  # with and without a vision tower that matters


@pytest.mark.parametrize("name", MODELS)
def test_the_speedup_of_random_groups_together_is_explained_by_sharing(tmp_path, config, name):
    rng = np.random.default_rng(0)
    for trial in range(20):
        shapes = []
        for _ in range(rng.integers(1, 12)):
            lengths = tuple(rng.integers(1, 2_000, rng.integers(2, 7)).tolist())
            pairs = list(combinations(range(len(lengths)), 2))
            chosen = rng.choice(len(pairs), rng.integers(1, len(pairs) + 1), replace=False)
            side, prompt = int(rng.choice([0, 4, 30, 90])), int(rng.integers(20, 3_000))
            shapes.append(Shape(side, prompt, lengths, tuple(pairs[n] for n in chosen)))
        counted, cost = count(shapes, config), cost_model(name)
        found, ratios = predicted(tmp_path, config, counted, cost), Ratios.of(counted, cost)
        text = max(ratios.tokens, ratios.pairs)
        assert found["predicted_speedup"] <= ratios.bound(text) * ROUNDING, (trial, shapes)

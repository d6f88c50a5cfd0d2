"""What the tests of real widths share."""


import torch

from tests.helpers.project import PROJECT
from tests.helpers.support import make_image, make_record

FULL = PROJECT / "configs" / "full.yaml"
# Of rewards in float32, relative to the largest: sums of 18,944 products, in another order.
TOLERANCE = 1e-4
# Rows of an embedding that are soon read; special tokens are as far from the end as in the published ones.
FEW_ROWS = 16_384
# Pixels of a side of InternVL's tiles that are soon read: 64 tokens in place of 256. No width changes with it.
SMALL_TILE = 224
# Of a process's resident memory, with all that it has loaded.
MOST_BYTES = 8 * 10**9
# As a classifier that others trained is given them.
GROUPS = [
    {"prompt": "What is in the picture?", "responses": ["A boat.", "Two dogs on the grass.", "I cannot see that."]},
    {"prompt": "Describe a bus", "responses": ["The bus is red", ""]},
]


def record_of(name):
    """Two responses to a prompt, with an image where the model sees.

    InternVL's is square, one tile: its stock tower holds the scores of all 1,025 x 1,025 pairs of a tile's patches for
    each head, and of an image of 7:5, 13 tiles, they took 17 GB.
    """
    images = [] if name == "Qwen3-8B" else [make_image(84, 84 if name.startswith("InternVL") else 60)]
    return make_record(1, num_responses=2, images=images, prompt_words=3, response_words=(2, 5))


def assert_rewards(found: list[float], wanted: list[float]) -> None:
    """Equal but for rounding in float32."""
    found, wanted = torch.tensor(found), torch.tensor(wanted)
    assert (found - wanted).abs().max() <= TOLERANCE * wanted.abs().max(), (found, wanted)

"""What the tests of real widths share."""

from pathlib import Path

from support import make_image, make_record

FULL = Path(__file__).resolve().parents[1] / "configs" / "full.yaml"
# Of rewards in float32, relative to the largest: sums of 18,944 products, in another order.
TOLERANCE = 1e-4


def record_of(name):
    """Three responses to a prompt, with an image where the model sees."""
    images = [] if name.startswith("Qwen3") else [make_image(84, 60)]
    return make_record(1, num_responses=3, images=images, prompt_words=3, response_words=(2, 5))


def assert_rewards(found, wanted):
    """Equal but for rounding in float32."""
    assert (found - wanted).abs().max() <= TOLERANCE * wanted.abs().max(), (found, wanted)

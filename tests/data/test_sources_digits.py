"""The digits of the quick start."""

from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest

from fastrm.data.media.images import decode_image
from fastrm.errors import DataError
from fastrm.limits import MediaLimits
from tests.helpers.source_rows import read


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("sklearn")
    return {split: read(f"digits:{split}")[0] for split in ("train", "eval")}


def test_digits_are_the_same_every_time(digits):
    assert read("digits:eval", format="digits")[0] == digits["eval"]


def test_digits_have_the_documented_sizes(digits):
    assert {s: sum(r.source == "digits/which" for r in records) for s, records in digits.items()} == {
        "train": 1437,
        "eval": 360,
    }
    assert {r.source for r in digits["train"]} == {"digits/which", "digits/parity", "digits/size"}
    assert len({r.id for r in digits["train"] + digits["eval"]}) == len(digits["train"] + digits["eval"])
    per_image = Counter(r.media[0].key for r in digits["train"])
    assert set(per_image.values()) == {1, 2}


def test_digits_splits_share_no_image(digits):
    keys = {split: {r.media[0].key for r in records} for split, records in digits.items()}
    assert not keys["train"] & keys["eval"]


def test_digits_answers_are_true(digits):
    sklearn_digits = pytest.importorskip("sklearn.datasets").load_digits()
    labels = {im.tobytes(): int(d) for im, d in zip(sklearn_digits.images, sklearn_digits.target, strict=True)}
    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    for record in digits["eval"]:
        image = np.asarray(decode_image(record.media[0], MediaLimits()))
        assert image.shape == (56, 56, 3)
        digit = labels[np.round(image[::7, ::7, 0] / 255 * 16).astype(np.float64).tobytes()]
        truth = {
            "digits/which": names[digit],
            "digits/parity": "odd" if digit % 2 else "even",
            "digits/size": "yes" if digit > 4 else "no",
        }[record.source]
        winners = {record.responses[p.winner].text for p in record.preferences}
        texts = [r.text for r in record.responses]
        assert winners == {truth}
        for response in record.responses:
            verdict = "right" if response.text == truth else "wrong"
            said = f"The image shows a {names[digit]}. The response says {response.text}, which is {verdict}."
            assert response.critique == said
        assert len(set(texts)) == len(texts) == len(record.preferences) + 1


def test_critiques_of_digits_change_nothing_that_a_model_of_rewards_reads(digits):
    for response in digits["eval"][0].responses:
        bare = replace(response, critique="")
        assert response.critique and response.key == bare.key and response.messages == bare.messages


def test_digits_number_and_order_of_responses_vary(digits):
    seen = Counter((len(r.responses), r.preferences[0].winner) for r in digits["train"] if r.source == "digits/which")
    assert set(seen) == {(n, at) for n in (2, 3, 4) for at in range(n)}
    assert min(seen.values()) > 100


@pytest.mark.parametrize("split", ["train", "eval"])
def test_digits_cannot_be_solved_without_the_image(digits, split):
    wins = defaultdict(Counter)
    for record in digits[split]:
        for p in record.preferences:
            pair = record.responses[p.winner].text, record.responses[p.loser].text
            wins[record.source][pair] += 1
    for counts in wins.values():
        # No score of answers alone does better than the better side of each pair of answers.
        best = sum(max(counts[a, b], counts[b, a]) for a, b in counts if a < b or (b, a) not in counts)
        assert best / counts.total() <= 0.56


def test_unknown_digits_split_is_a_data_error():
    with pytest.raises(DataError, match="wanted digits:train or digits:eval"):
        read("digits:test")

"""The real sets of the shared folder, read whole. Skipped, and counted, where it is absent."""

import json
from collections import Counter

import pytest

from fastrm.data.media.images import decode_image
from fastrm.limits import MediaLimits
from tests.helpers.source_rows import SHARED, read

REAL_SETS = {
    "easy_vqa/pairs_train.jsonl": {"images": "easy_vqa/images_train.tar"},
    "easy_vqa/pairs_test.jsonl": {"images": "easy_vqa/images_test.tar"},
    "quickstart_mix/train.jsonl": {"refused": {"EMPTY_RESPONSE": 2}},  # two PandaLM answers are empty
    "quickstart_mix/eval.jsonl": {},
    "mathv_pairs/pairs_even.jsonl": {},
    "caption_contest/pairs_even_contests.jsonl": {},
    "caption_contest/pairs_even_contests_large.jsonl": {},
    "caption_contest/rated_lists.jsonl": {},
    "nlvr/pairs_dev_balanced.jsonl": {},
    "llamafactory_dpo_demo/dpo_en_demo.json": {},
    "reward_benches/mm_reward_bench.jsonl": {"has_images": False},
}


@pytest.mark.parametrize("name", REAL_SETS)
def test_real_set_is_read_whole(name):
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"the data set {name} is not on this machine")
    expected = REAL_SETS[name]
    images = SHARED / expected["images"] if "images" in expected else None
    records, refused = read(path, images=images)
    num_rows = len(json.loads(path.read_text())) if path.suffix == ".json" else len(path.read_text().splitlines())
    assert Counter(code for _, code, _ in refused) == expected.get("refused", {})
    assert len(records) + len(refused) == num_rows
    if expected.get("has_images", True):
        for ref in list({ref.key: ref for r in records for ref in r.media}.values())[:40]:
            assert decode_image(ref, MediaLimits()).mode == "RGB"


def test_rated_lists_have_all_pairs_of_16():
    path = SHARED / "caption_contest" / "rated_lists.jsonl"
    if not path.exists():
        pytest.skip("the data set caption_contest is not on this machine")
    records, _ = read(path)
    assert {len(r.responses) for r in records} == {16}
    assert {len(r.preferences) for r in records} == {120}

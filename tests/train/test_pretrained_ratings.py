"""SmolLM2-135M-Instruct learns ratings that people gave to captions, without their pictures."""

import json

import pytest

from fastrm.train.metrics import read_rows
from tests.helpers.project import PROJECT
from tests.helpers.runs import run
from tests.helpers.smollm2 import needs_smollm2

LISTS = PROJECT.parent / "shared" / "data" / "caption_contest" / "rated_lists.jsonl"
pytestmark = [
    needs_smollm2,
    pytest.mark.skipif(not LISTS.is_file(), reason="needs the folder shared/data beside the project"),
]


def test_ratings_of_captions_are_learned_and_the_scale_is_that_of_the_ratings(smollm2_folder, tmp_path):
    # A list of 16 captions, learned by heart: what is tested is the loss on real weights and rows, not the taste.
    source = {"path": str(LISTS), "ignore": ["image"], "pairs": "ratings", "cap": 16}
    tree = {
        "run": {"dir": str(tmp_path / "run"), "max_steps": 4, "eval_every": 1},
        "data": {"train": [source], "eval": [source], "num_workers": 0},
        "model": {"path": str(smollm2_folder)},
        "loss": {"kind": "mse"},
        "optim": {"lr": 1.0e-5, "lr_parts": {"head": 1.0e-4}, "batch_pairs": 16, "schedule": "constant"},
        "precision": {"dtype": "fp32"},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(tree))
    summary = run(tmp_path / "config.yaml")
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    evaluations = [row for row in rows if "eval/mse" in row]
    first, last = evaluations[0], evaluations[-1]
    print(json.dumps(evaluations))
    assert last["eval/mse"] < first["eval/mse"] < rows[0]["loss"] and summary["eval_mse"] == last["eval/mse"]
    assert first["eval/sources"]["rated_lists"]["ratings"] == summary["preferences"] / 4 == 16

"""Widths of real models, two layers deep: what toy sizes hide.

Hidden sizes, heads and head dimensions are the published ones (bench/models/random_model.py). So are vocabularies and
token ids, of Qwen2.5-VL by default and of all with `pytest -m slow`; else the others have few rows of the embedding,
and InternVL small tiles. Each family loads, takes a step, is exported, and scores as stock transformers scores it, on
one thread in less than 8 GB. Whole runs are in test_real_widths_runs.py.
"""

import pytest
import torch

from bench.models.random_model import SPECIAL_IDS
from tests.helpers.own_process import run_alone
from tests.helpers.real_width_cases import FEW_ROWS, MOST_BYTES, assert_rewards
from tests.helpers.real_width_jobs import (
    classify,
    compare_with_stock,
    compare_writer_with_stock,
    save_stock_classifier,
    score_groups,
    step_and_export,
)

pytestmark = pytest.mark.real_widths


NAMES = ("Qwen2.5-VL-7B-Instruct", "Qwen2-VL-7B-Instruct", "Qwen3-VL-4B-Instruct", "InternVL3-8B-hf", "Qwen3-8B")
CASES = [
    (NAMES[0], None), *((name, FEW_ROWS) for name in NAMES[1:]),
    *(pytest.param(name, None, marks=pytest.mark.slow) for name in NAMES[1:]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "num_rows"), CASES)
def test_real_widths_load_step_export_and_score_exactly(name, num_rows, tmp_path):
    step = run_alone(step_and_export, name, num_rows, tmp_path)
    assert SPECIAL_IDS["<|im_end|>"] == 151_645
    assert num_rows is not None or step.value["im_end"] == SPECIAL_IDS["<|im_end|>"]
    assert step.value["finite"] and step.value["grad_norm"] > 0 and step.value["head_moved"]

    comparison = run_alone(compare_with_stock, name, tmp_path / "export")
    found = comparison.value
    assert_rewards(found["found"], found["wanted"])
    assert_rewards(found["scores"], found["wanted"])
    assert len(found["norms"]) >= (5 if name == "Qwen3-8B" else 6)  # which has no biases and no tower
    if name.startswith("Qwen3-VL"):
        assert any("deepstack" in key for key in found["norms"])
    for key, norm in found["norms"].items():
        assert norm > 0, f"{key}: the oracle's gradient is zero"
        assert found["errors"][key] <= 1e-4 * norm, key
    print(f"{name}, {num_rows} rows: step and export {step}; comparison {comparison}")
    assert max(step.peak_bytes, comparison.peak_bytes) < MOST_BYTES


@pytest.mark.parametrize("paradigm", ["critic", pytest.param("judge", marks=pytest.mark.slow)])
def test_what_is_written_at_the_widths_of_the_7b_is_learnt_exactly(paradigm, tmp_path):
    comparison = run_alone(compare_writer_with_stock, paradigm, tmp_path / "model")
    found = comparison.value
    ours, wanted = found["losses"]
    assert ours == pytest.approx(wanted, rel=1e-6)
    assert_rewards(found["found"], found["wanted"])
    assert any(key == "lm_head.weight" for key in found["norms"])
    for key, norm in found["norms"].items():
        assert norm > 0, f"{key}: the oracle's gradient is zero"
        assert found["errors"][key] <= 1e-4 * norm, key
    print(f"{paradigm}: {comparison}")
    assert comparison.peak_bytes < MOST_BYTES


@pytest.fixture(
    params=[torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=["float32", "bf16"]
)
def classifier(request, tmp_path):
    """The dtype of a stock Qwen3ForSequenceClassification of Qwen3-8B's widths, and its folder as stock saves it."""
    saved = run_alone(save_stock_classifier, tmp_path / "classifier", request.param).value
    assert saved["kind"] == "Qwen3ForSequenceClassification"
    shapes = saved["shapes"]
    assert shapes["score.weight"] == (1, 4096) and shapes["model.layers.1.mlp.down_proj.weight"] == (4096, 12_288)
    assert shapes["model.layers.0.self_attn.q_proj.weight"] == (32 * 128, 4096)
    assert shapes["model.layers.0.self_attn.k_proj.weight"] == (8 * 128, 4096)
    return request.param, tmp_path / "classifier"


def test_an_untouched_classifier_is_scored_as_its_own_class_scores_it(classifier, tmp_path):
    """Not a line of configuration: in float32 to 1e-5, in bf16 no farther from float32 than twice what stock is."""
    dtype, folder = classifier
    jobs = [run_alone(classify, folder, torch.float32), run_alone(score_groups, folder, tmp_path)]
    wanted, found = (torch.tensor([reward for group in job.value for reward in group]) for job in jobs)
    assert wanted.std() > 0.1, "rewards that are all alike prove nothing"
    error, bound = (found - wanted).abs().max(), 1e-5
    if dtype == torch.bfloat16:
        jobs.append(run_alone(classify, folder, dtype))
        bound = 2 * (torch.tensor([reward for group in jobs[-1].value for reward in group]) - wanted).abs().max()
    print(f"{dtype}: rewards {wanted.tolist()}, error {error:.1e}, bound {bound:.1e}; {', '.join(map(str, jobs))}")
    assert error <= bound
    assert max(job.peak_bytes for job in jobs) < 4 * 10**9

"""Training with emulated FP8: it follows bf16, and at the end of a run the two judge alike."""

from unittest.mock import Mock

import pytest
import torch

from fastrm.config import load_config
from fastrm.data.batching import PackPlan, plan_once
from fastrm.data.group import GroupSize, encode_group
from fastrm.data.loader import PackBuilder
from fastrm.evaluate.flips import compare_fp8
from fastrm.model.precision import RECIPES, convert_to_fp8, fp8_disabled
from fastrm.train.loop import train
from fastrm.ui import Display
from fastrm_kernels import preference_loss
from tests.helpers.project import PROJECT
from tests.helpers.runs import text_rows, tiny_config, write_rows
from tests.helpers.support import make_image, make_model, make_record

QUICKSTART = PROJECT / "configs" / "quickstart.yaml"


class Lines(Display):
    """Keeps what a run says."""

    def __init__(self):
        super().__init__()
        self.said = []

    def say(self, line):
        self.said.append(line)


def losses_of(recipe, steps=30):
    """Loss of each step on one pack of six groups, with the same random weights at the start."""
    network = make_model("qwen2_5_vl")
    network.fuse_projections()
    if recipe != "off":
        convert_to_fp8(network, recipe)
    records = [
        make_record(n, num_responses=3, images=[make_image(60, 50, n)], prompt_words=8, response_words=(1, 8))
        for n in range(6)
    ]
    pack = PackBuilder(records, network.encoder, True, multiple=16)[PackPlan(tuple(range(6)), 0, True)].pack
    optimizer, losses = torch.optim.AdamW(network.parameters(), lr=3e-4), []
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16):
            rewards = network(pack)
        loss = preference_loss(rewards, pack.edges, margin=pack.margin, weight=pack.weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return torch.tensor(losses)


@pytest.mark.parametrize("recipe", RECIPES)
def test_losses_follow_those_of_bf16(recipe, bf16_losses):
    losses = losses_of(recipe)
    assert bf16_losses[0] > 0.65 and bf16_losses[-5:].mean() < 0.3
    assert not torch.equal(losses, bf16_losses)
    difference = losses - bf16_losses
    assert difference[:10].abs().max() < 0.03 and difference[-5:].mean().abs() < 0.05, difference


@pytest.fixture(scope="module")
def bf16_losses():
    return losses_of("off")


def run(tmp_path, fp8, **sections):
    rows = write_rows(tmp_path / "rows.jsonl", text_rows(24))
    model = {"fuse_projections": True}
    path = tiny_config(tmp_path, rows, rows, precision={"dtype": "bf16", "fp8": fp8}, model=model, **sections)
    shown = Lines()
    return train(load_config(path), display=shown), shown.said


def test_a_run_says_what_is_in_fp8_and_how_often_it_flips_a_preference(tmp_path):
    summary, said = run(tmp_path, "rowwise", run={"max_steps": 3, "eval_every": 2})
    fp8 = [line for line in said if line.startswith("FP8")]
    assert fp8[0].startswith("FP8: rowwise, emulated") and "4 of 19 linear layers" in fp8[0]
    assert fp8[1].startswith("FP8: not in ") and said.index(fp8[1]) < said.index(fp8[-1])
    # Once, after the evaluations of steps 2 and 3, with the accuracy of the last of them.
    assert [line for line in said if "flipped" in line] == fp8[-1:]
    assert f"of 24 held-out preferences flipped ({summary['fp8_flip_rate']:.2%})" in fp8[-1]
    assert f"accuracy {summary['eval_accuracy']:.4f} against " in fp8[-1]


def test_a_run_in_bf16_says_nothing_of_fp8(tmp_path):
    summary, said = run(tmp_path, "off", run={"max_steps": 1})
    assert summary["fp8_flip_rate"] is None and not [line for line in said if "FP8" in line]


def test_comparison_equals_counting_by_hand():
    network = make_model("qwen2_5_vl")
    convert_to_fp8(network, "tensorwise")
    records = [make_record(n, num_responses=4, prompt_words=4) for n in range(20)]
    groups = [GroupSize.of(encode_group(record, network.encoder)) for record in records]
    builder, budget = PackBuilder(records, network.encoder, True, multiple=16), 400
    polled = []
    flips = compare_fp8(network, network, builder, groups, budget, poll=lambda: polled.append(1))
    changed = right = total = 0
    for plan in plan_once(groups, budget):
        pack = builder[plan].pack
        with torch.no_grad():
            fp8 = network(pack)
            with fp8_disabled(network):
                reference = network(pack)
        for winner, loser in pack.edges.tolist():
            total += 1
            right += bool(fp8[winner] > fp8[loser])
            changed += bool(fp8[winner] > fp8[loser]) != bool(reference[winner] > reference[loser])
    assert (flips.num_preferences, flips.num_right, flips.lost + flips.gained) == (total, right, changed)
    assert total == 20 * 6 and changed and len(polled) == len(plan_once(groups, budget)) > 1
    assert network.training


def test_a_comparison_that_is_stopped_leaves_training_in_fp8():
    network = make_model("qwen2_5_vl")
    convert_to_fp8(network, "rowwise")
    record = make_record(1)
    group = GroupSize.of(encode_group(record, network.encoder))
    builder = PackBuilder([record], network.encoder, True, multiple=16)
    stop = Mock(side_effect=KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        compare_fp8(network, network, builder, [group], 1000, poll=stop)
    assert network.training and stop.call_count == 1


@pytest.fixture(scope="module")
def bf16_accuracy(tmp_path_factory):
    return quickstart(tmp_path_factory.mktemp("bf16"), "off")["eval_accuracy"]


def quickstart(folder, fp8):
    overrides = ("run.eval_every=0", "precision.dtype=bf16", f"precision.fp8={fp8}", "model.fuse_projections=true")
    return train(load_config(QUICKSTART, [f"run.dir={folder / 'run'}", *overrides]))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_quick_start_ends_at_the_accuracy_of_bf16(recipe, bf16_accuracy, tmp_path):
    summary = quickstart(tmp_path, recipe)
    print(f"{recipe}: accuracy {summary['eval_accuracy']:.4f}, bf16 {bf16_accuracy:.4f}, "
          f"flip rate {summary['fp8_flip_rate']:.2%}")  # fmt: skip
    assert abs(summary["eval_accuracy"] - bf16_accuracy) <= 0.01
    assert summary["fp8_flip_rate"] <= 0.01

"""The comparison with ms-swift: its inputs, its gate, what it reads, its tables; whole, where ms-swift is installed."""

import json
import math
import random
import statistics
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml

from bench.harness.results import file_stem
from bench.peers import ms_swift
from bench.peers.ms_swift_gate import RedGate, check_batch, check_runs
from bench.peers.ms_swift_inputs import SIZES, WORKLOADS, Sizes, make_inputs, step_flops
from bench.peers.ms_swift_results import (
    FASTRM,
    PART,
    SUFFIX,
    SWIFT,
    load_all,
    page_lines,
    ratio,
    report_lines,
    save,
)
from bench.peers.ms_swift_sides import (
    Run,
    RunFailed,
    fastrm_config,
    read_fastrm,
    read_swift,
    run_fastrm,
    swift_arguments,
)
from fastrm.config import load_config
from fastrm.data.quarantine import Quarantine
from fastrm.data.record import ImageRef, Message, Response
from fastrm.data.sources import read_source
from fastrm.evaluate.reward_model import RewardModel
from fastrm.train.loop import train
from tests.helpers import stock

TINY = Sizes(
    text={
        **SIZES.text, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
    vision={
        **SIZES.vision, "depth": 2, "hidden_size": 48, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 128,
        "fullatt_block_indexes": [1],
    },
    vocabulary=600, image_side=112, prompt_tokens=120, response_tokens=20,
)  # fmt: skip
RUN = Run([0.9, 0.8], [5.0, 4.0], [9.0, 2.0, 3.0, 1.0], 1000 * 2**20, 33, 1900)
FACTS = {
    "device": "Some CPU, 2 cores", "date": "2026-11-29 16:00 UTC", "threads": 2,
    "versions": {FASTRM: {"torch": "2.13.0"}, SWIFT: {"ms-swift": "4.6.0", "trl": None}},
}  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder, TINY)
    return folder


def batch_of(inputs, workload):
    """What ms-swift gives its model, made by the stock processors: chosen, then rejected, in another order."""
    network = RewardModel.from_pretrained(inputs / "model").network
    records = list(read_source(inputs / f"{workload}.jsonl", quarantine=Quarantine(None)))
    random.Random(0).shuffle(records)
    pairs = [(r.responses[r.preferences[0].winner], r.responses[r.preferences[0].loser]) for r in records]
    found = [stock.stock_inputs(network.encoder, _with_bytes(pair[side])) for side in (0, 1) for pair in pairs]
    batch = {name: torch.cat([row[name] for row in found]) for name in ("pixel_values", "image_grid_thw")}
    rows = [row["input_ids"][0] for row in found]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=network.encoder.tokenizer.pad_token_id)
    real = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    return batch | {"input_ids": ids, "attention_mask": real.long()}


def _with_bytes(response):
    """The response with its image files read, as the oracle wants them."""

    def part(found):
        return ImageRef(data=Path(found.path).read_bytes()) if isinstance(found, ImageRef) else found

    return Response(tuple(Message(turn.role, tuple(map(part, turn.parts))) for turn in response.messages))


@pytest.mark.parametrize("name", WORKLOADS)
def test_inputs_have_exactly_the_tokens_asked_for(inputs, name):
    encoder = RewardModel.from_pretrained(inputs / "model").network.encoder
    workload, records = WORKLOADS[name], list(read_source(inputs / f"{name}.jsonl", quarantine=Quarantine(None)))
    assert len(records) == workload.pairs
    prompt_end = encoder.tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)
    found = set()
    for response in (response for record in records for response in record.responses):
        tokens = encoder.encode(response).tokens.tolist()
        assert tokens.count(encoder.tokenizer.convert_tokens_to_ids("<|image_pad|>")) == (TINY.image_side // 28) ** 2
        start = next(n for n in range(len(tokens), 0, -1) if tokens[n - len(prompt_end) : n] == prompt_end)
        found.add((start, len(tokens) - start))
    assert found == {(prompt, n) for prompt, responses in workload.lengths(TINY) for n in responses}
    assert len(found) == (8 if workload.mixed else 1)


def test_mixed_lengths_have_the_mean_and_the_spread_of_real_ones():
    lengths = WORKLOADS["pairs-mixed"].lengths(SIZES)
    responses = sorted(n for _, found in lengths for n in found)
    assert sum(prompt for prompt, _ in lengths) == pytest.approx(4 * 1300, abs=4)
    assert sum(responses) == pytest.approx(8 * 300, abs=8)
    assert responses[6] / statistics.median(responses) == pytest.approx(math.exp(0.52 * 0.887), rel=0.02)  # 13/16


@pytest.mark.parametrize("name", WORKLOADS)
def test_same_batch_passes_in_any_order(inputs, name):
    check_batch(inputs, inputs / f"{name}.jsonl", batch_of(inputs, name))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda b: b["input_ids"][5].__setitem__(60, 300), "no preference of fastrm has the same"),
        (lambda b: b["attention_mask"][2].__setitem__(-1, 0), "139"),
        (lambda b: b["image_grid_thw"][1].__setitem__(1, 4), "images in patches"),
        (lambda b: b["pixel_values"][70].__setitem__(5, b["pixel_values"][70, 5] + 0.01), "pixel values"),
        (lambda b: b.update({k: v[:6] for k, v in b.items() if k != "pixel_values"}), "fastrm has 4, ms-swift 3"),
    ],
    ids=["token", "shorter", "grid", "pixel", "fewer rows"],
)
def test_other_batch_is_refused(inputs, change, message):
    batch = batch_of(inputs, "pairs")
    change(batch)
    with pytest.raises(RedGate, match=message):
        check_batch(inputs, inputs / "pairs.jsonl", batch)


def test_runs_must_agree_in_the_first_step():
    found = check_runs(RUN, replace(RUN, losses=[0.9 * (1 + 5e-6), 7.0]))
    assert found == pytest.approx({"loss": 5e-6, "gradient norm": 0}, rel=1e-4)
    for change, message in (
        ({"losses": [0.9001, 0.8]}, "loss of the first step"), ({"losses": [float("nan"), 0.8]}, "loss of the first"),
        ({"grad_norms": [5.01, 4.0]}, "gradient norm of the first step"), ({"trained": 32}, "trained parameters"),
        ({"losses": [0.6931, 0.8]}, "equal rewards"),
    ):  # fmt: skip
        with pytest.raises(RedGate, match=message):
            check_runs(RUN, replace(RUN, **change))


def test_arithmetic_counts_shared_work_once(inputs):
    """Without attention and the pruned last layer the ratio is that of tokens; in test_plan_flops.py the rest."""
    model = inputs / "model"
    ours, theirs = step_flops(model, WORKLOADS["pairs"], TINY, "none")
    assert 2 * 140 / 160 < theirs / ours < 2 * 140 / 160 * 2, "two layers, of which one is pruned"
    four_ours, four_theirs = step_flops(model, WORKLOADS["groups-of-4"], TINY, "none")
    assert four_theirs == pytest.approx(theirs * 12 / 8)
    assert four_ours / ours == pytest.approx(200 / 160 / 4, rel=0.1)
    assert step_flops(model, WORKLOADS["pairs"], TINY, "full")[1] > theirs


def test_fastrm_reads_its_own_run(inputs, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(fastrm_config(inputs, WORKLOADS["groups-of-4"], 2, "full", tmp_path / "run")))
    train(load_config(config))
    said = capsys.readouterr()
    (tmp_path / "log.txt").write_text(said.out + said.err)
    run = read_fastrm(tmp_path / "run", 7)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert run.losses == [row["loss"] for row in rows] and len(run.seconds) == 2
    assert run.seconds[0] == pytest.approx(6 / rows[0]["preferences_per_second"])
    assert run.tokens == TINY.prompt_tokens + 4 * TINY.response_tokens, "the six rows are not one group"
    network = RewardModel.from_pretrained(inputs / "model").network
    assert run.trained == sum(p.numel() for p in network.parameters())


def test_swift_is_asked_for_the_same_and_read(inputs, tmp_path):
    arguments = swift_arguments(inputs, WORKLOADS["pairs"], 3, "none", tmp_path)
    options = dict(zip(arguments[::2], arguments[1::2], strict=True))
    ours = fastrm_config(inputs, WORKLOADS["pairs"], 3, "none", tmp_path)
    assert float(options["--learning_rate"]) == ours["optim"]["lr"]
    assert options["--dataset"] == ours["data"]["train"][0]["path"] and options["--model"] == ours["model"]["path"]
    assert int(options["--per_device_train_batch_size"]) == ours["optim"]["batch_pairs"] == 4
    assert options["--gradient_checkpointing"] == "false"
    rows = [{"loss": 0.9, "grad_norm": 5.0, "seconds": 9.0}, {"loss": 0.8, "grad_norm": 4.0, "seconds": 2.0}]
    (tmp_path / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "facts.json").write_text('{"trained": 33, "tokens": 1120}')
    assert read_swift(tmp_path, 7) == Run([0.9, 0.8], [5.0, 4.0], [9.0, 2.0], 7, 33, 1120)


def test_a_failed_trainer_shows_its_last_words(tmp_path):
    with pytest.raises(RunFailed, match=r"fastrm\.cli train (?s:.*)exit status 64(?s:.*)model: no such folder"):
        run_fastrm(tmp_path, WORKLOADS["pairs"], 2, "none", tmp_path / "run")


def entry(workload="pairs", checkpointing="none", speed=3.0, memory=0.5):
    seconds = [50.0, *(speed * second for second in RUN.seconds[1:])]
    theirs = replace(RUN, seconds=seconds, peak_bytes=int(RUN.peak_bytes / memory))
    runs = {FASTRM: [asdict(RUN), asdict(RUN)], SWIFT: [asdict(theirs)]}
    return {
        "workload": workload, "checkpointing": checkpointing, "pairs": 4, "gate": {"loss": 2e-7}, "runs": runs,
        "flops": {FASTRM: 2 * 10**12, SWIFT: 4 * 10**12},
    }  # fmt: skip


def test_first_steps_are_not_timed():
    assert ratio(entry(speed=2.5), "speed") == pytest.approx(2.5)
    assert ratio(entry(memory=0.25), "memory") == pytest.approx(0.25)


def test_saving_replaces_one_workload(tmp_path):
    for found in (entry(), entry("groups-of-4", speed=9.0), entry(checkpointing="full"), entry(speed=4.0)):
        file = save(found, FACTS, tmp_path)
    assert file.name == file_stem(FACTS["device"]) + SUFFIX
    [report] = load_all(tmp_path)
    assert {(e["workload"], e["checkpointing"]): round(ratio(e, "speed"), 6) for e in report["entries"]} == {
        ("pairs", "none"): 4, ("pairs", "full"): 3, ("groups-of-4", "none"): 9,
    }  # fmt: skip
    lines = report_lines(report)
    ours = "| pairs | none | fastrm | 1,900 | 2.00 | 1.00 - 3.00 | 2.00 | 1,000 | 1,000 | 4.00x | 2.00x | 0.50x |"
    assert ours in lines
    assert "| pairs | none | ms-swift | 1,900 | 8.00 | 4.00 - 12.00 | 0.50 | 500 | 2,000 | 1 | 1 | 1 |" in lines
    assert "| speed, groups-of-4 | at least 10x | 9.00x | missed |" in lines
    assert "| memory, pairs | at most 0.5x | 0.50x | reached |" in lines
    assert "- ms-swift: ms-swift 4.6.0" in lines


def test_page_keeps_what_is_around_the_tables():
    lines = page_lines([{"device": "A CPU", "entries": [entry() | FACTS]}])
    page = PART.replaced(f"before\n{PART.begin}\nold\n{PART.end}\nafter", lines)
    assert page.startswith("before\n") and page.endswith(f"{PART.end}\nafter") and "old" not in page
    assert "not measured" in page, "a goal without a figure"


def test_page_shows_the_results_that_are_committed():
    text = PART.page.read_text()
    assert PART.replaced(text, page_lines(load_all())) == text, "run: python bench/peers/ms_swift.py --docs"


@pytest.mark.skipif(not ms_swift.PYTHON.exists(), reason="ms-swift is not installed here: make ms-swift")
def test_ms_swift_computes_the_same(inputs):
    found = ms_swift.measure(ms_swift.PYTHON, inputs, WORKLOADS["groups-of-4"], "none", 1, 2, TINY)
    assert found["runs"][SWIFT][0]["tokens"] == 12 * (TINY.prompt_tokens + TINY.response_tokens)
    assert len(found["runs"][FASTRM][0]["seconds"]) == len(found["runs"][SWIFT][0]["seconds"]) == 2

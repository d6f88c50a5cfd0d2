"""`fastrm eval --costs`: what is counted, what is timed, and what is refused."""

import itertools
import json
import shutil
import sys
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import GPT2Config, GPT2LMHeadModel

from fastrm.data.group import GroupSize, encode_group
from fastrm.data.record import Message
from fastrm.errors import ConfigError, DataError
from fastrm.evaluate.options import JudgeTexts, RowOptions, ScoringOptions
from fastrm.evaluate.reading import read_in_order
from fastrm.forecast.flops import generation_flops, pass_flops
from fastrm.grpo.config import PolicySection
from fastrm.grpo.policy import load_policy, save_policy
from fastrm.grpo.questions import Question
from fastrm.judge import costs
from fastrm.judge.command import JudgeOptions
from fastrm.judge.costs import CostRows, measure, measure_costs
from fastrm.judge.judging import BRACKET, OF_GROUP, PAIR, CriticJudging, JudgeJudging, Judging, RewardModelJudging, Work
from fastrm.judge.local import LocalModel
from fastrm.model.architectures import meta_network
from fastrm.model.export import load_model, save_model
from fastrm.prompts.spec import load_spec
from tests.helpers import documents, support
from tests.helpers.benchmark_files import small
from tests.helpers.chat_server import chat_server, text_of, write_spec
from tests.helpers.project import PROJECT
from tests.helpers.runs import TEXT_MODEL, TINY, fastrm_here, write_rows
from tests.helpers.smollm2 import needs_smollm2
from tests.judge.test_critics import make_critic

OPTIONS = JudgeOptions(RowOptions(), JudgeTexts(), scoring=ScoringOptions(check_exactness=False))
KEYS = {"tokens_generated", "tokens_read", "flops", "seconds", "memory_bytes"}
EIGHT = {"id": "8", "prompt": "Is this the cat? " * 8, "responses": [f"yes {'no ' * n}" for n in range(8)]}
PAIRS = [{"id": f"r{n}", "prompt": f"{n}?", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(2)]
PROMPT = "{{ question }} 1: {{ first }} 2: {{ second }}"


def run(folder, model, rows, **texts):
    options = replace(OPTIONS, texts=JudgeTexts(**texts), json_out=folder / "costs.json")
    if str(model).startswith("judge:"):  # which has no exactness that could be checked
        options = replace(options, scoring=ScoringOptions())
    measure_costs([str(model)], str(write_rows(folder / "rows.jsonl", rows)), options)
    return json.loads(options.json_out.read_text())


def records_of(folder, rows):
    return list(read_in_order(str(write_rows(folder / "r.jsonl", rows)), None, "auto", require_preferences=False))


def pair_of(folder, row):
    return CostRows.read(str(write_rows(folder / "r.jsonl", [row])), OPTIONS).pairs[0]


def save_judge(folder, init):
    settings = PolicySection(init=init, tokenizer={"train_vocab_size": 300}, min_pixels=28 * 28, max_pixels=4 * 28 * 28)
    policy = load_policy(settings, [Question((Message("user", ("Is this the cat?",)),), "yes", "x:1")], 0)
    save_policy(*policy, folder)
    return folder


def local_spec(folder, model, **others):
    spec = {"extends": "r1_reward", "prompt": PROMPT, "generator": {"model": str(model)}, "decoding": {"max_tokens": 5}}
    (folder / "spec.yaml").write_text(json.dumps(spec | others))
    return f"judge:{folder / 'spec.yaml'}"


@pytest.fixture(scope="module")
def text_judge(tmp_path_factory):
    return save_judge(tmp_path_factory.mktemp("judge"), TEXT_MODEL)


@pytest.mark.parametrize("family", ["llama", "qwen2_5_vl"])
def test_a_reward_model_reads_the_tree_of_a_group_once(tmp_path, family, capsys):
    network = support.make_model(family)
    save_model(network, tmp_path / "model")
    row = EIGHT
    if network.is_vision:
        Image.new("RGB", (112, 84), "red").save(tmp_path / "a.png")
        row = EIGHT | {"images": ["a.png"]}
    found = run(tmp_path, tmp_path / "model", [row])
    assert not found["responses_repeated"] and found["costs"].keys() == {PAIR, OF_GROUP}
    (record,) = records_of(tmp_path, [row])
    for way, count in ((PAIR, 2), (OF_GROUP, 8)):
        cost = found["costs"][way]
        assert cost.keys() == KEYS and cost["tokens_generated"] == 0
        assert cost["seconds"] > 0 and isinstance(cost["memory_bytes"], int)
        group = encode_group(costs._of(record, record.responses[:count]), network.encoder)
        size = GroupSize.of(group)
        images = [medium.num_tokens for medium in size.media]
        assert len(images) == network.is_vision and cost["tokens_read"] == size.num_tokens
        paths = [len(response.tokens) for response in group.responses]
        flops = pass_flops(network, size.num_tokens, size.num_attention_pairs, paths, images, pruned=True)
        assert cost["flops"] == flops > 0
    printed = capsys.readouterr().out
    assert f"{found['costs'][OF_GROUP]['flops'] / 1e9:,.3f}" in printed and "repeated" not in printed


def test_the_work_of_an_ensemble_is_that_of_all_members_or_of_the_model_of_its_route(tmp_path):
    save_model(support.make_model("llama"), tmp_path / "model")
    save_model(support.make_model("qwen2_5_vl"), tmp_path / "other")
    alone = [run(tmp_path, tmp_path / name, [EIGHT])["costs"][PAIR] for name in ("model", "other")]
    for route, count in (("", 2), ("route: {text: model}", 1)):
        (tmp_path / "both.yaml").write_text(f"members: [other, model]\n{route}\n")
        found = run(tmp_path, tmp_path / "both.yaml", [EIGHT])["costs"][PAIR]
        for name in ("flops", "tokens_read"):
            assert found[name] == sum(cost[name] for cost in alone[:count]) > 0
    # The scorer of a critic: what is written costs the same, the pass twice.
    totals = []
    critic = make_critic(tmp_path / "critic")
    (tmp_path / "twice.yaml").write_text("members: [critic, critic]\n")
    for scorer in (critic, tmp_path / "twice.yaml"):
        spec = load_spec(
            local_spec(tmp_path, critic, extends="mm_rlhf_reward", prompt="{{ response }}", scorer=str(scorer))[6:]
        )
        judging = CriticJudging(spec, OPTIONS.scoring, SimpleNamespace(say=print))
        record = pair_of(tmp_path, EIGHT)
        judged = judging.judge(PAIR, record)
        written = JudgeJudging.work_of(judging, record, judged[0])
        totals.append(
            [of_all - of_texts for of_all, of_texts in zip(judging.work_of(record, judged), written, strict=True)]
        )
    assert totals[1] == [2 * one for one in totals[0]] and totals[0][2] > 0


def test_a_judge_writes_two_texts_for_a_pair_and_56_or_14_for_a_group(tmp_path, text_judge, monkeypatch):
    asked, write = [], LocalModel.write

    def watched(self, questions):
        for written in write(self, questions):
            asked.append(written)
            yield written

    monkeypatch.setattr(LocalModel, "write", watched)
    found = run(tmp_path, local_spec(tmp_path, text_judge), [EIGHT])["costs"]
    # A pair is judged before, for warmth; then each way in each of three rounds.
    texts = {PAIR: asked[2:4], OF_GROUP: asked[4:60], BRACKET: asked[60:74]}
    assert len(asked) == 2 + 3 * (2 + 56 + 14)
    model = LocalModel(load_spec(str(tmp_path / "spec.yaml")).generator, None)
    network = meta_network(
        model.config,
        SimpleNamespace(head=support.HeadConfig(), pooling="anchor", freeze=(), lora=None, init=None, path="x"),
    )
    for way, written in texts.items():
        pairs = Counter(one.question.order for one in written)
        assert set(pairs.values()) == {1} and all(order[::-1] in pairs for order in pairs)
        assert found[way]["tokens_generated"] == sum(one.size.written for one in written)
        assert found[way]["tokens_read"] == sum(one.size.read for one in written)
        flops = sum(generation_flops(network, one.size.read, one.size.written) for one in written)
        assert found[way]["flops"] == flops
    assert set(Counter(one.question.order for one in texts[OF_GROUP])) == set(itertools.permutations(range(8), 2))
    for one in asked:
        ids = model._tokenizer.apply_chat_template(
            [{"role": "user", "content": one.question.text}], add_generation_prompt=True
        )["input_ids"]
        assert one.size.read == len(ids) and 1 <= one.size.written <= 5 and one.is_cut <= (one.size.written == 5)


def test_tokens_end_with_the_first_that_ends_a_text(text_judge, monkeypatch, tmp_path):
    judging = JudgeJudging(load_spec(local_spec(tmp_path, text_judge).removeprefix("judge:")), OPTIONS.scoring)
    model = judging._writer
    end, other = int(model._ends[0]), int(model._ends[-1]) + 1
    assert other not in model._ends

    def generate(input_ids, **_):
        rows = [[other, end, end], [other, other, other]]
        return torch.cat([input_ids, torch.tensor(rows)[: len(input_ids)]], dim=1)

    monkeypatch.setattr(model._model, "generate", generate)
    record = pair_of(tmp_path, PAIRS[0])
    assert [(one.size.written, one.is_cut) for one in judging.judge(PAIR, record)] == [(2, False), (3, True)]


def test_images_of_a_judge_are_counted(tmp_path):
    folder = save_judge(tmp_path / "judge", TINY["model"]["init"])
    judging = JudgeJudging(
        load_spec(local_spec(tmp_path, folder, order="as_given").removeprefix("judge:")), OPTIONS.scoring
    )
    Image.new("RGB", (56, 56), "red").save(tmp_path / "a.png")
    record = pair_of(tmp_path, PAIRS[0] | {"images": ["a.png"]})
    (written,) = judging.judge(PAIR, record)
    assert written.size.image_tokens == 4
    flops = generation_flops(judging._network, written.size.read, written.size.written, [4])
    assert judging.work_of(record, [written]).flops == flops
    assert flops > generation_flops(judging._network, written.size.read, written.size.written)


def test_the_operations_of_an_architecture_that_is_not_known_are_null(tmp_path, text_judge, capsys):
    folder = shutil.copytree(text_judge, tmp_path / "gpt2")
    config = GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=2048)
    GPT2LMHeadModel(config).save_pretrained(folder)
    found = run(tmp_path, local_spec(tmp_path, folder), PAIRS)["costs"]
    for cost in found.values():
        assert cost["flops"] is None and cost["tokens_read"] > 0 < cost["tokens_generated"]
    assert "unknown" in capsys.readouterr().out


@pytest.mark.parametrize("usage", [{"prompt_tokens": 70, "completion_tokens": 9}, None, {"prompt_tokens": 70}])
def test_of_a_server_seconds_and_usage_are_known(tmp_path, usage, capsys):
    with chat_server(lambda _: "<answer>1</answer>", usage=usage) as (url, bodies):
        found = run(tmp_path, write_spec(tmp_path, url), PAIRS)
    assert len(bodies) == 2 + 3 * (2 + 56 + 14) and found["device"] == "by URL"
    for way, count in ((PAIR, 2), (OF_GROUP, 56), (BRACKET, 14)):
        cost = found["costs"][way]
        assert cost["seconds"] > 0 and cost["flops"] is cost["memory_bytes"] is None
        tokens = (9 * count, 70 * count) if usage and len(usage) == 2 else (None, None)
        assert (cost["tokens_generated"], cost["tokens_read"]) == tokens
    assert "unknown" in capsys.readouterr().out and not (tmp_path / "texts.jsonl").exists()


def test_costs_of_a_judge_whose_server_refuses_a_text_are_none(tmp_path):
    with chat_server(lambda _: 400) as (url, _), pytest.raises(DataError, match=r"rows.jsonl:1: order .*HTTP 400"):
        run(tmp_path, write_spec(tmp_path, url), PAIRS)


def test_a_pointwise_judge_sees_each_response_once(tmp_path):
    def score(body):
        return f"Score: {len(text_of(body))}"

    with chat_server(score) as (url, bodies):
        run(tmp_path, write_spec(tmp_path, url, extends="llava_critic_pointwise"), [EIGHT])
    assert len(bodies) == 2 + 3 * (2 + 8) and len({text_of(body) for body in bodies}) == 8


def test_a_critic_writes_about_each_response_and_reads_all_behind_them(tmp_path, monkeypatch):
    packs, judge = [], RewardModelJudging.judge
    texts, write = [], LocalModel.write

    def watched(self, questions):
        for written in write(self, questions):
            texts.append(written)
            yield written

    def scored(self, way, record):
        packs.append(record)
        return judge(self, way, record)

    monkeypatch.setattr(LocalModel, "write", watched)
    monkeypatch.setattr(RewardModelJudging, "judge", scored)
    model = make_critic(tmp_path / "model")
    found = run(tmp_path, model, [EIGHT], max_tokens=4)["costs"]
    assert found.keys() == {PAIR, OF_GROUP} and len(texts) == 2 + 3 * (2 + 8) and len(packs) == 1 + 3 * 2
    network = load_model(model, behind_critique=True)
    for way, written, pack in ((PAIR, texts[2:4], packs[1]), (OF_GROUP, texts[4:12], packs[2])):
        assert [response.text for response in pack.responses] == [one.text for one in written]
        assert all(1 <= one.size.written <= 4 for one in written)
        group = encode_group(pack, network.encoder)
        size, paths = GroupSize.of(group), [len(response.tokens) for response in group.responses]
        flops = pass_flops(network, size.num_tokens, size.num_attention_pairs, paths, pruned=True)
        flops += sum(generation_flops(network, one.size.read, one.size.written) for one in written)
        assert found[way]["flops"] == flops
        assert found[way]["tokens_generated"] == sum(one.size.written for one in written)
        assert found[way]["tokens_read"] == size.num_tokens + sum(one.size.read for one in written)


def test_rows_are_the_first_that_have_what_is_needed(tmp_path, capsys):
    data = str(write_rows(tmp_path / "r.jsonl", [{"prompt": "?", "responses": ["one"]}, *PAIRS, EIGHT]))
    rows = CostRows.read(data, OPTIONS)
    assert [record.id for record in rows.pairs] == ["r0", "r1", "8"] and not rows.repeated
    assert [record.id for record in rows.groups] == ["8"] and len(rows.groups[0].responses) == 8
    rows = CostRows.read(str(write_rows(tmp_path / "r.jsonl", PAIRS)), OPTIONS)
    assert rows.repeated and [record.id for record in rows.groups] == ["r0", "r1"]
    texts = [response.text for response in rows.groups[0].responses]
    assert texts[:3] == ["1. good 0", "2. bad 0", "3. good 0"] and len(set(texts)) == 8
    network = support.make_model("llama")
    save_model(network, tmp_path / "model")
    assert run(tmp_path, tmp_path / "model", PAIRS)["responses_repeated"]
    assert "No row has 8 responses: those of a row were repeated" in capsys.readouterr().out


def test_rows_of_a_benchmark_are_measured_too(tmp_path):
    benchmark, _ = small("rewardbench2", tmp_path / "bench")
    rows = CostRows.read("bench:rewardbench2", replace(OPTIONS, bench_data=str(tmp_path / "bench")))
    assert rows.pairs[0].responses == benchmark.records[0].responses[:2]
    assert len(rows.pairs) == 3 and all(len(record.responses) == 8 for record in rows.groups)


@pytest.mark.parametrize("times", [{"a": 5.0, "b": 1.0, "c": 3.0}, {"a": 3.0, "b": 5.0, "c": 1.0}])
def test_the_time_is_the_median_and_the_work_the_mean_of_the_rows_whichever_was_fastest(tmp_path, monkeypatch, times):
    seen, clock = [], [0.0]

    class Scripted(Judging):
        warm_up, device = (PAIR,), torch.device("cpu")

        def judge(self, way, record):
            seen.append((way, record.id))
            clock[0] += times[record.id] * (10 if way == OF_GROUP else 1)
            return record.id

        def work_of(self, record, judged):
            return Work({"a": 10, "b": 20, "c": 60}[judged], 0, None)

    monkeypatch.setattr(costs.time, "perf_counter", lambda: clock[0])
    records = records_of(tmp_path, [row | {"id": name} for row, name in zip([*PAIRS, EIGHT], "abc", strict=True)])
    rows = CostRows(records, records[:2], False)
    memory = SimpleNamespace(reset=lambda: None, peak=iter([7, 1, 7, 1, 3, 2]).__next__)
    display = SimpleNamespace(task=lambda _: lambda *_: None)
    found = measure(Scripted(), rows, memory, display)
    assert seen == [
        (PAIR, "a"),
        (PAIR, "a"),
        (OF_GROUP, "a"),
        (PAIR, "b"),
        (OF_GROUP, "b"),
        (PAIR, "c"),
        (OF_GROUP, "a"),
    ]
    work = {"tokens_read": 0, "flops": None}
    assert found[PAIR] == work | {"seconds": 3.0, "tokens_generated": 30, "memory_bytes": 7}
    group = {"seconds": times["a"] * 10, "tokens_generated": pytest.approx(40 / 3), "memory_bytes": 2}
    assert found[OF_GROUP] == work | group


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_the_peak_above_what_was_in_use_before():
    size = 2**26
    before = bytearray(size)
    memory = costs._Memory(torch.device("cpu"))
    model = bytearray(size)
    memory.reset()
    work = bytearray(size)
    del work
    assert 1.9 * size < memory.peak() < 2.5 * size
    memory.reset()
    assert 0.9 * size < memory.peak() < 1.5 * size
    assert len(before) == len(model)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"prompt": "?", "responses": ["one"]}], r"none of its first 1 rows has two responses"),
        ([], r"none of its first 0 rows has two responses"),
        ([{"prompt": "?", "chosen": 3}], r"none of its first 1 rows has two responses, .*rows.jsonl:1"),
    ],
)
def test_rows_that_cannot_be_judged_are_named(tmp_path, rows, said):
    with pytest.raises(DataError, match=said):
        run(tmp_path, write_spec(tmp_path, "http://127.0.0.1:1/v1"), rows)


def test_models_that_cannot_be_measured_are_named(tmp_path):
    data = str(write_rows(tmp_path / "rows.jsonl", PAIRS))
    with pytest.raises(ConfigError, match="--costs is for one model; got 2"):
        measure_costs(["a", "b"], data, OPTIONS)
    with pytest.raises(ConfigError, match="r1_reward: it names no generator"):
        measure_costs(["judge:r1_reward"], data, OPTIONS)


def test_the_command(tmp_path, capfd):
    save_model(support.make_model("llama"), tmp_path / "model")
    data, out = write_rows(tmp_path / "rows.jsonl", PAIRS), tmp_path / "out.json"
    wanted = ["eval", tmp_path / "model", data, "--costs"]
    code, _ = fastrm_here(capfd, *wanted, "--json", out)
    assert code == 0 and json.loads(out.read_text())["costs"].keys() == {PAIR, OF_GROUP}
    code, said = fastrm_here(capfd, *wanted, "--from", tmp_path / "texts.jsonl")
    assert code == 64 and "--costs measures how texts are written, and keeps none" in said
    code, said = fastrm_here(capfd, *wanted, "--max-tokens", 3)
    assert code == 64 and "a reward model writes no texts" in said
    code, said = fastrm_here(capfd, *wanted, "--report", tmp_path / "page.html")
    assert code == 64 and "--costs measures one model as it works now" in said


@needs_smollm2
def test_smollm2_as_a_judge(tmp_path, smollm2_folder):
    judging = JudgeJudging(load_spec(local_spec(tmp_path, smollm2_folder).removeprefix("judge:")), OPTIONS.scoring)
    record = pair_of(tmp_path, PAIRS[0])
    judged = judging.judge(PAIR, record)
    work = judging.work_of(record, judged)
    assert len(judged) == 2 and 2 <= work.tokens_generated <= 10
    # 134.5 million weights with the embeddings, which are the LM head: multiplied for each token that is written.
    embeddings = 49_152 * 576
    matrices = 134_515_008 - embeddings
    expected = 2 * (matrices * (work.tokens_read + work.tokens_generated - 2) + embeddings * work.tokens_generated)
    assert work.flops == pytest.approx(expected, rel=0.01)


def test_the_page_has_the_figures_that_were_measured():
    page = documents.text_of("docs/judges.md")
    for name in ("reward-model", "critic", "judge"):
        found = json.loads((PROJECT / "bench/results" / f"amd-epyc-2-cores-costs-{name}.json").read_text())
        assert found["responses_repeated"]
        for cost in found["costs"].values():
            figures = f"{cost['tokens_read']:,.0f} | {cost['tokens_generated']:,.0f} | {cost['flops'] / 1e9:,.1f}"
            assert f"| {figures} | {cost['seconds']:.2f} | {cost['memory_bytes'] / 2**20:,.0f} |" in page

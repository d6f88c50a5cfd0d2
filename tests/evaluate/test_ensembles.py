"""Ensembles, routes, and models on benchmarks: the members' own rewards, combined; nothing computed twice."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import fastrm as package
from fastrm.cli import app
from fastrm.config import load_config
from fastrm.data.loader import PackBuilder
from fastrm.data.record import Record
from fastrm.data.template import ConversationEncoder
from fastrm.errors import ConfigError, DataError, RecordError
from fastrm.evaluate import ensemble as ensembles
from fastrm.evaluate.command import evaluate_benchmark
from fastrm.evaluate.ensemble import Ensemble, Rewards, validation_weights
from fastrm.evaluate.files import evaluate_file, score_file
from fastrm.evaluate.merging import merge_prompts, score_merged
from fastrm.evaluate.options import ModelChoice, Outputs, ScoringOptions
from fastrm.evaluate.reading import read_in_order
from fastrm.limits import MediaLimits
from fastrm.train.loop import train
from tests.helpers import benchmark_files as published
from tests.helpers.runs import colour_rows, fastrm, text_rows, tiny_config, write_rows
from tests.helpers.support import make_model, make_record

OPTIONS = ScoringOptions(
    tokens_per_pack=2048, num_workers=0, device="cpu", dtype="fp32",
    limits=MediaLimits(10**6, 10**6),
)  # fmt: skip
TEXT_INIT = {
    "model_type": "qwen2", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 4096,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models a and b, which share a tokenizer; text, a text model with another; colours.jsonl and text.jsonl."""
    folder = tmp_path_factory.mktemp("ensembles")
    train(load_config(tiny_config(folder, colour_rows(folder), run={"max_steps": 3})))
    (folder / "run" / "model").rename(folder / "a")
    (folder / "b").mkdir()
    for file in (folder / "a").iterdir():
        (folder / "b" / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "a" / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name in sorted(weights, key=lambda name: (name.startswith("score."), name)):
        weights[name] = weights[name] + 0.05 * torch.randn(weights[name].shape, generator=generator)
    save_file(weights, folder / "b" / "model.safetensors", {"format": "pt"})
    (folder / "other").mkdir()
    texts = write_rows(folder / "text.jsonl", text_rows(30))
    config = tiny_config(folder / "other", texts, run={"max_steps": 2}, model={"init": TEXT_INIT})
    train(load_config(config))
    (folder / "other" / "run" / "model").rename(folder / "text")
    return folder


@pytest.fixture(scope="module")
def models(folder):
    return [package.RewardModel.from_pretrained(folder / name) for name in "ab"]


def records_of(path, *, require_preferences=False):
    return list(read_in_order(str(path), None, "auto", require_preferences=require_preferences))


def rewards_of(results):
    return [result.combined for result in results]


@pytest.mark.parametrize("weights", [None, [0.25, 0.75]], ids=["mean", "weighted"])
def test_rewards_are_the_combination_of_the_members_scored_alone_bitwise(folder, models, weights):
    records = records_of(folder / "colours.jsonl")
    together = Ensemble(models, combine="mean" if weights is None else "accuracy", weights=weights)
    alone = [rewards_of(Ensemble([model]).score_records(records, 2048)) for model in models]
    results = together.score_records(records, 2048)
    assert alone[0] != alone[1]
    for a, b, result in zip(*alone, results, strict=True):
        assert result.members == [a, b]
        first, second = weights or (0.5, 0.5)
        assert result.combined == [first * x + second * y for x, y in zip(a, b, strict=True)]


def test_one_member_is_the_model_itself(folder, models):
    groups = [{"prompt": "Which?", "images": [str(folder / "images" / "0.png")], "responses": ["red", "blue"]}]
    assert Ensemble(models[:1]).score(groups) == models[0].score(groups)
    assert package.Ensemble is Ensemble


def count_calls(monkeypatch, owner, name):
    calls, original = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda self, *given: calls.append(0) or original(self, *given))
    return calls


def test_members_that_share_a_tokenizer_encode_and_pack_once(folder, models, monkeypatch):
    records = records_of(folder / "colours.jsonl")
    encoded = count_calls(monkeypatch, ConversationEncoder, "encode")
    packed = count_calls(monkeypatch, PackBuilder, "__getitem__")
    Ensemble(models[:1]).score_records(records, 2048)
    once = len(encoded), len(packed)
    assert once[0] == sum(len(record.responses) for record in records)
    Ensemble(models).score_records(records, 2048)
    assert (len(encoded), len(packed)) == (2 * once[0], 2 * once[1])


def test_members_with_other_limits_encode_for_themselves(folder, models, monkeypatch):
    other = package.RewardModel.from_pretrained(folder / "b", max_pixels=28 * 28)
    records = records_of(folder / "colours.jsonl")[:4]
    encoded = count_calls(monkeypatch, ConversationEncoder, "encode")
    results = Ensemble([models[0], other]).score_records(records, 2048)
    assert len(encoded) == 2 * sum(len(record.responses) for record in records)
    assert [r.members[1] for r in results] == rewards_of(Ensemble([other]).score_records(records, 2048))


def test_qwen2_vl_and_qwen2_5_vl_share_packs_but_not_layouts(folder, monkeypatch):
    """The paper's ensemble: one tokenizer and one image processor, but other vision towers."""
    pair = [package.RewardModel(make_model(family)) for family in ("qwen2_vl", "qwen2_5_vl")]
    records = records_of(folder / "colours.jsonl")[:8]
    alone = [rewards_of(Ensemble([model]).score_records(records, 2048)) for model in pair]
    encoded = count_calls(monkeypatch, ConversationEncoder, "encode")
    results = Ensemble(pair).score_records(records, 2048)
    assert len(encoded) == sum(len(record.responses) for record in records)
    assert [[result.members[place] for result in results] for place in (0, 1)] == alone
    # Of videos the two have other positions.
    assert ensembles.sharing(pair, has_videos=False) == [[0, 1]]
    assert ensembles.sharing(pair, has_videos=True) == [[0], [1]]


def test_a_record_that_a_member_cannot_read_is_refused(folder, models):
    text = package.RewardModel.from_pretrained(folder / "text")
    pictures, texts = records_of(folder / "colours.jsonl")[:2], records_of(folder / "text.jsonl")[:2]
    results = Ensemble([models[0], text]).score_records([pictures[0], texts[0]], 2048)
    assert isinstance(results[0], RecordError) and "reads text only" in results[0].message
    assert isinstance(results[1], Rewards)


def test_a_route_takes_the_inputs_without_images(folder, models):
    text = package.RewardModel.from_pretrained(folder / "text")
    pictures, texts = records_of(folder / "colours.jsonl")[:6], records_of(folder / "text.jsonl")[:6]
    mixed = [record for both in zip(pictures, texts, strict=True) for record in both]
    results = Ensemble(models, text=text, text_name="text").score_records(mixed, 2048)
    assert rewards_of(results[::2]) == rewards_of(Ensemble(models).score_records(pictures, 2048))
    assert rewards_of(results[1::2]) == rewards_of(Ensemble([text]).score_records(texts, 2048))
    assert all(result.members == [result.combined] * 2 for result in results[1::2])


def test_the_route_of_the_command_is_the_text_models(folder, tmp_path):
    mixed = [*text_rows(3), {"id": "seen", "prompt": "?", "images": ["images/0.png"], "responses": ["red", "no"]}]
    data = write_rows(folder / "mixed.jsonl", mixed)
    for name, chosen in (("routed", choice(folder, "a", route=f"text={folder / 'text'}")), ("a", choice(folder, "a"))):
        score_file(chosen, str(data), tmp_path / name, OPTIONS)
    routed, a = ([json.loads(line)["rewards"] for line in (tmp_path / name).open()] for name in ("routed", "a"))
    text = package.RewardModel.from_pretrained(folder / "text")
    assert routed[:3] == rewards_of(Ensemble([text]).score_records(records_of(data)[:3], 2048))
    assert routed[:3] != a[:3] and routed[3] == pytest.approx(a[3], abs=1e-5)


def test_weights_by_hand():
    margins = np.array([[1.0, 2.0, -1.0, 2.0], [4.0, -1.0, -2.0, 3.0]])
    assert validation_weights("accuracy", margins, "ab") == [0.75 / 1.25, 0.5 / 1.25]
    assert validation_weights("margin", margins, "ab") == [0.5, 0.5]
    assert validation_weights("accuracy", np.array([[0.0, 1.0], [1.0, 1.0]]), "ab") == pytest.approx([1 / 3, 2 / 3])


@pytest.mark.parametrize(
    ("how", "margins", "message"),
    [
        (
            "margin",
            [[1.0, 1.0], [-3.0, 1.0]],
            "b has a mean margin of -1 on the validation preferences.*leave it out, or use",
        ),
        ("margin", [[0.0, 0.0], [1.0, -1.0]], "every member's margin is 0 .*use mean"),
        ("accuracy", [[-1.0], [0.0]], "every member's accuracy is 0"),
        ("accuracy", [[], []], "has no preference that every member could score"),
    ],
)
def test_validation_that_gives_no_weights_is_refused(how, margins, message):
    with pytest.raises(DataError, match=message):
        validation_weights(how, np.array(margins), ["a", "b"])


def choice(folder, *names, **settings):
    return ModelChoice(tuple(folder / name for name in names), **settings)


def agreed_pairs(folder, models):
    """The rows of colours.jsonl whose pairs are as both models have them: neither's mean margin is negative."""
    rows = [json.loads(line) for line in (folder / "colours.jsonl").read_text().splitlines()]
    results = Ensemble(models).score_records(records_of(folder / "colours.jsonl"), 2048)
    for row, result in zip(rows, results, strict=True):
        pairs = [(x, y) for x in range(len(row["responses"])) for y in range(len(row["responses"]))]
        row["preferences"] = [(x, y) for x, y in pairs if all(member[x] > member[y] for member in result.members)]
    return write_rows(folder / "agreed.jsonl", [row for row in rows if row["preferences"]])


@pytest.mark.parametrize("how", ["accuracy", "margin"])
def test_evaluation_shows_members_and_weights_from_validation_pairs(folder, models, tmp_path, monkeypatch, capsys, how):
    monkeypatch.setattr("fastrm.evaluate.models.VALIDATION_PAIRS", 20)
    data = agreed_pairs(folder, models) if how == "margin" else folder / "colours.jsonl"
    records, pairs = records_of(data, require_preferences=True), []
    for record, result in zip(records, Ensemble(models).score_records(records, 2048), strict=True):
        pairs += [[m[p.winner] - m[p.loser] for m in result.members] for p in record.preferences]
    first = np.array(pairs[:20]).T
    values = first.mean(axis=1) if how == "margin" else (first > 0).mean(axis=1)
    assert len(pairs) > 20 and values[0] != values[1]
    chosen = choice(folder, "a", "b", combine=how, validation=str(data), save=tmp_path / "both.yaml")
    evaluate_file(chosen, str(data), Outputs(tmp_path / "out.json"), OPTIONS)
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["weights"] == pytest.approx((values / values.sum()).tolist(), rel=1e-4)
    right = np.array(pairs) > 0
    assert [member["accuracy"] for member in report["members"]] == right.mean(axis=0).tolist()
    combined = np.array(pairs) @ np.array(report["weights"])
    assert report["accuracy"] == pytest.approx((combined > 0).mean())
    shown = capsys.readouterr()
    assert "on 20 validation preferences" in shown.err and "ensemble" in shown.out
    again = Ensemble.from_pretrained(tmp_path / "both.yaml", device="cpu")
    assert (again.combine, again.weights) == (how, report["weights"])


@pytest.mark.parametrize("command", ["eval", "score"])
def test_the_commands_save_what_an_ensemble_is_weighted_by(folder, tmp_path, command):
    data, saved = folder / "colours.jsonl", tmp_path / "both.yaml"
    arguments = [folder / "a", folder / "b", data, "--ensemble", "accuracy", "--validation", data, "--device", "cpu"]
    arguments += ["--save-ensemble", saved, *(["--out", tmp_path / "out.jsonl"] if command == "score" else [])]
    result = CliRunner().invoke(app, [command, *map(str, arguments)])
    assert result.exception is None, result.output
    again = Ensemble.from_pretrained(saved, device="cpu")
    assert again.combine == "accuracy" and sum(again.weights) == pytest.approx(1.0)


def test_a_saved_ensemble_is_a_model(folder, models, tmp_path):
    text = package.RewardModel.from_pretrained(folder / "text")
    names = [str(folder / name) for name in "ab"]
    saved = Ensemble(models, names, combine="accuracy", weights=[0.25, 0.75], text=text, text_name=str(folder / "text"))
    (folder / "saved").mkdir()
    saved.save(folder / "saved" / "both.yaml")
    assert "../a" in (folder / "saved" / "both.yaml").read_text()  # found wherever the folder is moved to
    score_file(choice(folder, "saved/both.yaml"), str(folder / "colours.jsonl"), tmp_path / "out.jsonl", OPTIONS)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    wanted = saved.score_records(records_of(folder / "colours.jsonl"), 2048)
    assert [row["rewards"] for row in rows] == rewards_of(wanted)
    assert [row["members"] for row in rows] == [result.members for result in wanted]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("members: [a]\ncombin: mean\n", r"e.yaml:2: unknown key combin; did you mean combine\?"),
        ("members: []\n", "members is empty"),
        ("combine: mean\n", "members is missing"),
        ("members: [a, b]\ncombine: margin\n", "combine: margin needs 2 weights, got none"),
        ("members: [a, b]\ncombine: margin\nweights: [1.0]\n", "combine: margin needs 2 weights, got 1"),
        ("members: [a, b]\ncombine: margin\nweights: [1.5, -0.5]\n", "wanted numbers from 0 that sum to 1"),
        ("members: [a, b]\nweights: [0.5, 0.5]\n", "combine: mean takes no weights"),
        ("members: [other.yaml]\n", "an ensemble cannot be a member of another"),
        ("members: [a]\nroute: {image: b}\n", "unknown key route.image"),
    ],
)
def test_an_ensemble_file_that_cannot_be_is_refused(tmp_path, text, message):
    (tmp_path / "e.yaml").write_text(text)
    (tmp_path / "other.yaml").write_text("members: [a]\n")
    with pytest.raises(ConfigError, match=message):
        Ensemble.from_pretrained([tmp_path / "e.yaml", tmp_path] if "other" in text else tmp_path / "e.yaml")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"combine": "margin"}, "takes its weights from --validation FILE"),
        ({"validation": "v"}, "--validation is for the weights of --ensemble accuracy or margin"),
        ({"route": "video=x"}, "got 'video=x', wanted text=MODEL"),
    ],
)
def test_choices_that_cannot_work_are_refused_before_anything_is_loaded(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        score_file(choice(tmp_path, "a", "b", **settings), "none.jsonl", tmp_path / "out", OPTIONS)


def vl_folder(folder, missing=()):
    """VL-RewardBench rows about three images: a prompt that stands twice, and responses that do."""
    (folder / "images").mkdir()
    rows = []
    for n in range(9):
        if n // 3 not in missing:
            Image.new("RGB", (56, 28 * (1 + n // 3)), "red").save(folder / "images" / f"{n // 3}.png")
        rows.append(
            {"id": f"wildvision-{n}", "query": "Which colour?" if n % 3 < 2 else "And now?",
             "response": ["red", f"blue {n}"], "human_ranking": [0, 1], "image_path": f"images/{n // 3}.png"}
        )  # fmt: skip
    published.write_jsonl(folder / "data.jsonl", rows)
    return rows


def test_rows_of_one_prompt_are_scored_once_and_equal_rows_scored_alone(folder, models, tmp_path, monkeypatch, capsys):
    vl_folder(tmp_path)
    encoded = count_calls(monkeypatch, ConversationEncoder, "encode")
    evaluate_benchmark(
        choice(folder, "a"), "vl_rewardbench", str(tmp_path), OPTIONS, Outputs(tmp_path / "o.json", tmp_path / "o.png")
    )
    # Of each image: one prompt with "red" and two more, one with "red" and one more.
    assert len(encoded) == 3 * (3 + 2)
    report = json.loads((tmp_path / "o.json").read_text())
    groups = [
        {"prompt": "Which colour?" if n % 3 < 2 else "And now?", "images": [str(tmp_path / "images" / f"{n // 3}.png")],
         "responses": ["red", f"blue {n}"]}
        for n in range(9)
    ]  # fmt: skip
    for row, group in zip(report["scores"], groups, strict=True):
        assert row["rewards"] == pytest.approx(models[0].score([group])[0], abs=1e-5)
    wanted = np.mean([row["rewards"][0] > row["rewards"][1] for row in report["scores"]])
    assert report["metrics"]["overall"] == wanted and not report["partial"]
    assert "9 rows" in capsys.readouterr().out


def test_rows_that_cannot_be_scored_are_named_and_the_result_says_partial(folder, tmp_path, capsys):
    vl_folder(tmp_path, missing=[1])
    with pytest.raises(DataError, match="partial result over 6 of 9 rows; 3 could not be scored"):
        evaluate_benchmark(
            choice(folder, "a", "b"), "vl_rewardbench", str(tmp_path), OPTIONS, Outputs(tmp_path / "o.json")
        )
    report = json.loads((tmp_path / "o.json").read_text())
    assert (report["partial"], report["rows"], report["scored"]) == (True, 9, 6)
    assert [row["row"] for row in report["refused"]] == [3, 4, 5]
    assert all("IMAGE_MISSING" in row["message"] and "data.jsonl:" in row["message"] for row in report["refused"])
    assert [row["rewards"] is None for row in report["scores"]] == [False] * 3 + [True] * 3 + [False] * 3
    assert report["metrics"]["official/reasoning"] is None and len(report["members"]) == 2
    shown = capsys.readouterr()
    assert "PARTIAL: 6 of 9 rows" in shown.out and "data.jsonl:4" in shown.err


def test_a_benchmark_of_which_nothing_can_be_scored_is_an_error(folder, tmp_path):
    vl_folder(tmp_path, missing=[0, 1, 2])
    with pytest.raises(DataError, match=r"none of its 9 rows could be scored; .*data.jsonl:1: .*IMAGE_MISSING"):
        evaluate_benchmark(choice(folder, "a"), "vl_rewardbench", str(tmp_path), OPTIONS, Outputs())


def test_the_command_ends_a_partial_result_with_its_exit_code(folder, tmp_path):
    vl_folder(tmp_path, missing=[2])
    result = fastrm(
        "eval", folder / "a", folder / "b", "bench:vl_rewardbench", "--data", tmp_path, "--ensemble", "mean"
    )
    assert result.returncode == 65, result.stderr
    assert "PARTIAL" in result.stdout
    assert "partial result over 6 of 9 rows" in json.loads(result.stderr.splitlines()[-1])["message"]


def test_merged_groups_that_are_too_long_are_scored_row_by_row():
    records = [make_record(n, prompt="the cat", id=str(n)) for n in range(4)]
    assert [len(group.responses) for group in merge_prompts(records)] == [8]
    sizes = []

    def score(groups: list[Record]):
        sizes.append([len(group.responses) for group in groups])
        return [
            RecordError("TOO_LONG", "") if len(group.responses) > 2 else Rewards([float(group.id), 0.5], [])
            for group in groups
        ]

    results = score_merged(score, Rewards.take, records)
    assert sizes == [[8], [2, 2, 2, 2]] and rewards_of(results) == [[float(n), 0.5] for n in range(4)]


def test_merging_gives_every_row_its_own_responses_rewards():
    base = [make_record(n, num_responses=3, prompt="a" if n % 2 else "b", id=str(n)) for n in range(4)]
    records = [*base, base[1]]  # a whole row twice
    texts = [[response.text for response in record.responses] for record in records]

    def score(groups: list[Record]):
        return [Rewards([response.text for response in group.responses], []) for group in groups]

    assert rewards_of(score_merged(score, Rewards.take, records)) == texts
    assert sum(len(group.responses) for group in merge_prompts(records)) == 12

"""Critics: rewards behind critiques, against each conversation alone through the stock class."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from bench.pretrained.preferences import DATA
from fastrm.data.paradigm import TextReading
from fastrm.data.record import ImageRef, Message, Record, Response
from fastrm.errors import ConfigError, DataError
from fastrm.evaluate.options import JudgeTexts, RowOptions, ScoringOptions
from fastrm.evaluate.reading import read_in_order
from fastrm.judge import critics
from fastrm.judge.command import JudgeOptions, evaluate_judge
from fastrm.judge.questions import make_questions
from fastrm.model.export import load_model, save_model
from fastrm.prompts.spec import load_spec
from tests.helpers.benchmark_files import small
from tests.helpers.chat_server import chat_server, text_of
from tests.helpers.foreign_models import add_weights, save_backbone, set_config
from tests.helpers.runs import fastrm_here, write_rows
from tests.helpers.smollm2 import needs_smollm2
from tests.helpers.stock import stock_rewards
from tests.helpers.support import make_image, make_model

PROMPT = "Criticise.\n[Question]: {{ question }}\n[Response]: {{ response }}"
ROWS = [
    {"id": "a", "prompt": "Which bird is this?", "chosen": "a red robin", "rejected": "no idea", "source": "birds"},
    {"id": "b", "prompt": "Why?", "responses": ["because", "it is green", "red"], "preferences": [[2, 0], [0, 1]],
     "source": "whys"},
]  # fmt: skip
SECTION = {"head": {"layers": 1, "activation": "none", "bias": False}, "anchor": "last_token", "pooling": "anchor"}


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    """A tiny random reward model that reads images."""
    folder = tmp_path_factory.mktemp("scorer") / "model"
    save_model(make_model("qwen2_5_vl"), folder)
    return folder


def write_spec(folder, scorer=None, **others):
    spec = folder / "critic.yaml"
    tree = {"kind": "critic", "prompt": PROMPT, **others} | ({} if scorer is None else {"scorer": str(scorer)})
    spec.write_text(json.dumps(tree))
    return f"judge:{spec}"


def run(folder, judge, rows=ROWS, scoring=None, **texts):
    data, out = str(write_rows(folder / "rows.jsonl", rows)), folder / "out.json"
    texts = JudgeTexts(**(texts or {"generations": folder / "texts.jsonl"}))
    evaluate_judge([judge], data, JudgeOptions(RowOptions(), texts, None, out, scoring or ScoringOptions()))
    return json.loads(out.read_text())


def write_critiques(folder, critiques):
    """A file of critiques, given by (row's id, response)."""
    lines = [{"id": name, "order": [n], "text": text} for (name, n), texts in critiques.items() for text in texts]
    return write_rows(folder / "critiques.jsonl", lines)


def critique_of(response, vote):
    return f"The response {response!r} is " + "quite " * (3 * vote + len(response) % 3) + "good."


def texts_about(rows, votes):
    responses = {row["id"]: row.get("responses") or [row["chosen"], row["rejected"]] for row in rows}
    return {
        (name, n): [critique_of(text, vote) for vote in range(votes)]
        for name, given in responses.items()
        for n, text in enumerate(given)
    }


def conversation(question, response, critique, images=()):
    text = PROMPT.replace("{{ question }}", question).replace("{{ response }}", response)
    return Response((Message("user", (*images, text)), Message("assistant", (critique,))))


def alone(scorer, conversations):
    """The rewards of conversations, each alone through the stock classes."""
    with torch.no_grad():
        return stock_rewards(load_model(scorer), [Record("", tuple(conversations), (), "", "")]).tolist()


def expected(scorer, rows, critiques, images):
    """By (row's id, response) the mean reward over its critiques."""
    found = {}
    for row in rows:
        responses = row.get("responses") or [row["chosen"], row["rejected"]]
        for n, response in enumerate(responses):
            texts = critiques[row["id"], n]
            about = [conversation(row["prompt"], response, text, images.get(row["id"], ())) for text in texts]
            found[row["id"], n] = sum(alone(scorer, about)) / len(texts)
    return found


def test_rewards_are_means_over_critiques_of_each_conversation_alone(tmp_path, scorer):
    image = make_image(60, 45)
    (tmp_path / "a.png").write_bytes(image.data)
    rows = [{**ROWS[0], "images": ["a.png"]}, ROWS[1]]
    critiques = texts_about(rows, votes=2)
    figures = run(tmp_path, write_spec(tmp_path, scorer), rows, written=write_critiques(tmp_path, critiques))
    wanted = expected(scorer, rows, critiques, {"a": (ImageRef(data=image.data),)})
    got = {(row["id"], n): reward for row in figures["rewards"] for n, reward in enumerate(row["rewards"])}
    assert got == pytest.approx(wanted, abs=1e-5) and len(set(got.values())) == 5
    right = [wanted["a", 0] > wanted["a", 1], wanted["b", 2] > wanted["b", 0], wanted["b", 0] > wanted["b", 1]]
    assert figures["accuracy"] == pytest.approx(sum(right) / 3)
    assert figures["sources"]["birds"]["accuracy"] == right[0]
    assert (figures["num_generations"], figures["num_parse_failures"], figures["preferences"]) == (10, 0, 3)
    assert figures["accuracy_as_released"] is figures["position_flip_rate"] is figures["first_place_rate"] is None
    assert (figures["critiques_cut"], figures["critiques_empty"], figures["failures"]) == (0, 0, [])


def test_what_is_too_long_together_is_scored_in_parts(tmp_path, scorer):
    critiques = texts_about(ROWS, votes=3)
    critiques["b", 1][0] = "long " * 300
    written, spec = write_critiques(tmp_path, critiques), write_spec(tmp_path, scorer)
    whole = run(tmp_path, spec, written=written)
    with pytest.raises(DataError, match="partial result over 3 preferences: 1 lines or rows could not be used"):
        run(tmp_path, spec, written=written, scoring=ScoringOptions(tokens_per_pack=400, num_workers=0))
    parts = json.loads((tmp_path / "out.json").read_text())
    (refused,) = parts["refused"]
    assert "rows.jsonl:2: the critique of response 1: the group has more than 400 tokens" in refused
    rewards = {row["id"]: row["rewards"] for row in parts["rewards"]}
    together = {row["id"]: row["rewards"] for row in whole["rewards"]}
    assert rewards["a"] == pytest.approx(together["a"], abs=1e-5)
    assert [rewards["b"][n] for n in (0, 2)] == pytest.approx([together["b"][n] for n in (0, 2)], abs=1e-5)
    rest = alone(scorer, [conversation("Why?", "it is green", text) for text in critiques["b", 1][1:]])
    assert rewards["b"][1] == pytest.approx(sum(rest) / 2, abs=1e-5)


PAIR = {"id": "p", "prompt": "Why?", "chosen": "because", "rejected": "no idea"}
GIVEN = [
    {**PAIR, "chosen_reason": "It says why.", "rejected_reason": "It says nothing."},
    {"id": "l", "prompt": "Who?", "responses": ["a bird", "red"], "preferences": [[0, 1]],
     "critiques": ["Right.", "Wrong, that is a colour."]},
]  # fmt: skip


def test_rewards_behind_the_critiques_that_rows_hold(tmp_path, scorer, capfd):
    figures = run(tmp_path, write_spec(tmp_path, scorer), GIVEN, given=True)
    wanted = {
        "p": [("Why?", "because", "It says why."), ("Why?", "no idea", "It says nothing.")],
        "l": [("Who?", "a bird", "Right."), ("Who?", "red", "Wrong, that is a colour.")],
    }
    for row in figures["rewards"]:
        about = [conversation(*one) for one in wanted[row["id"]]]
        assert row["rewards"] == pytest.approx(alone(scorer, about), abs=1e-5)
    assert (figures["num_generations"], figures["preferences"]) == (4, 2)
    # A row without one is named, and the others are evaluated.
    without = {**PAIR, "id": "w", "chosen_reason": "It says why."}
    with pytest.raises(DataError, match="1 preferences have a response without a scored critique: w"):
        run(tmp_path, write_spec(tmp_path, scorer), [*GIVEN, without], given=True)
    partial = json.loads((tmp_path / "out.json").read_text())
    assert (partial["accuracy"], partial["missing"]) == (figures["accuracy"], ["w"])
    assert partial["rewards"][-1] == {"id": "w", "rewards": [pytest.approx(figures["rewards"][0]["rewards"][0]), None]}
    data = write_rows(tmp_path / "rows.jsonl", [PAIR])
    code, error = fastrm_here(capfd, "eval", write_spec(tmp_path, scorer), data, "--given-critiques")
    assert code == 65 and "no preference was judged" in error
    code, error = fastrm_here(capfd, "eval", "judge:r1_reward", data, "--given-critiques")
    assert code == 64 and "--given-critiques is for a critic; judge:r1_reward is a pairwise judge" in error


def test_conversations_are_those_that_training_reads(tmp_path):
    (tmp_path / "a.png").write_bytes(make_image(60, 45).data)
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is it?"},
             {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Is it, <image>?"}]  # fmt: skip
    seen = {**GIVEN[0], "id": "i", "images": ["a.png"]}
    rows = [*GIVEN, seen, {**seen, "id": "t", "prompt": turns}]
    data = str(write_rows(tmp_path / "rows.jsonl", rows))
    spec = load_spec("mm_rlhf_reward")
    reading = TextReading("critic", spec.prompt, spec.system)
    trained = list(read_in_order(data, None, "auto", require_preferences=True, reading=reading))
    asked = {(one.id, one.order): one.messages for one in make_questions(spec, [one.original for one in trained])}
    assert len(trained) == 4 and len(asked) == 8
    for record in trained:
        for number, response in enumerate(record.responses):
            assert response.messages[:-1] == asked[record.id, (number,)]


def response_of(body):
    return text_of(body).split("[Response]: ")[1]


@pytest.fixture
def critic_server(monkeypatch):
    monkeypatch.setattr("fastrm.judge.endpoint.MAX_WAIT", 0.01)
    with chat_server(lambda body: critique_of(response_of(body), body.get("seed", 0) % 5), cut={1, 2}) as served:
        yield served


def generating(url, **others):
    return {"generator": {"model": "critic", "url": url, "batch": 1, "tries": 2}, **others}


def test_critiques_are_generated_for_every_response_and_vote_and_nothing_twice(
    tmp_path, scorer, critic_server, monkeypatch, capsys
):
    url, bodies = critic_server
    spec = write_spec(tmp_path, scorer, votes=2, **generating(url, decoding={"temperature": 1.0}))

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(critics, "open_models", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, spec)
    assert len(bodies) == 2 * 5 and not (tmp_path / "out.json").exists()
    monkeypatch.undo()
    figures = run(tmp_path, spec)
    assert len(bodies) == 10 and figures["num_generations"] == 10
    lines = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    critiques = {}
    for line in lines:
        critiques.setdefault((line["id"], *line["order"]), []).append(line["text"])
    wanted = expected(scorer, ROWS, critiques, {})
    got = {(row["id"], n): reward for row in figures["rewards"] for n, reward in enumerate(row["rewards"])}
    assert got == pytest.approx(wanted, abs=1e-5)
    assert figures["critiques_cut"] == 2 and [one["reason"] for one in figures["failures"]] == ["cut", "cut"]
    assert "critiques: 2 cut at their longest length, 0 empty" in capsys.readouterr().err
    # What was kept is measured by --from too, with that.
    again = run(tmp_path, spec, written=tmp_path / "texts.jsonl")
    assert again == figures


def test_kept_texts_are_scored_in_the_order_of_the_questions_whatever_the_order_of_their_lines_and_keys(
    tmp_path, scorer, monkeypatch
):
    # Another order is another pack, whose rewards differ in last bits from those of the run that wrote the texts.
    spec = write_spec(tmp_path, scorer, votes=6, **generating("http://127.0.0.1:9/v1", decoding={"temperature": 1.0}))
    data = str(write_rows(tmp_path / "rows.jsonl", ROWS))
    records = list(read_in_order(data, None, "auto", require_preferences=True))
    asked = [(one.id, one.order, one.key) for one in make_questions(load_spec(spec.removeprefix("judge:")), records)]
    assert asked != sorted(asked), "keys in another order than votes"
    lines = [{"id": name, "order": list(order), "text": "fine", "key": key} for name, order, key in reversed(asked)]
    scored = []

    def read(spec, records, critiques, *others):
        scored.extend((one.id, one.order, one.key) for one in critiques)
        return critics.read_rewards(spec, records, critiques, *others)

    monkeypatch.setattr("fastrm.judge.command.read_rewards", read)
    figures = run(tmp_path, spec, written=write_rows(tmp_path / "kept.jsonl", lines))
    assert scored == asked and figures["refused"] == []


def test_groups_without_preferences_have_rewards_and_no_accuracy(tmp_path, scorer):
    bare = {key: value for key, value in ROWS[1].items() if key != "preferences"}
    rows = [{**bare, "responses": [*bare["responses"], ""]}, {"id": "c", "prompt": "Who?", "responses": ["he"]}]
    critiques = texts_about(rows, votes=2)
    figures = run(tmp_path, write_spec(tmp_path, scorer), rows, written=write_critiques(tmp_path, critiques))
    got = {(row["id"], n): reward for row in figures["rewards"] for n, reward in enumerate(row["rewards"])}
    assert got == pytest.approx(expected(scorer, rows, critiques, {}), abs=1e-5) and len(got) == 5
    assert figures["accuracy"] is figures["interval"] is None and figures["rewards_missing"] == []
    del critiques["b", 2]
    with pytest.raises(DataError, match="1 rows have no reward, or not all, since texts about them are missing: b"):
        run(tmp_path, write_spec(tmp_path, scorer), rows, written=write_critiques(tmp_path, critiques))


def test_empty_critiques_are_counted_and_named(tmp_path, scorer, capsys):
    critiques = texts_about(ROWS, votes=1) | {("b", 1): ["  \n"]}
    figures = run(tmp_path, write_spec(tmp_path, scorer), written=write_critiques(tmp_path, critiques))
    assert figures["critiques_empty"] == 1 and figures["preferences"] == 3
    assert figures["failures"] == [{"id": "b", "order": [1], "reason": "empty"}]
    assert "critiques: 0 cut at their longest length, 1 empty" in capsys.readouterr().err


def test_a_server_that_is_down_ends_with_its_exit_code_and_keeps_critiques(tmp_path, scorer, monkeypatch, capfd):
    monkeypatch.setattr("fastrm.judge.endpoint.MAX_WAIT", 0.01)

    def answer(body):
        if "because" in response_of(body):
            raise BrokenPipeError  # the connection is closed without an answer
        return "fine"

    with chat_server(answer) as (url, _):
        spec, data = write_spec(tmp_path, scorer, **generating(url)), write_rows(tmp_path / "rows.jsonl", ROWS)
        code, error = fastrm_here(capfd, "eval", spec, data, "--generations", tmp_path / "texts.jsonl")
    assert code == 69 and "Run the command again to go on where it ended" in error
    assert len((tmp_path / "texts.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    "others, said",
    [
        ({"scorer": "nowhere/at/all"}, "nowhere/at/all"),
        ({}, "scorer: a critic needs the reward model that reads its critiques"),
        ({"parser": "score"}, "a critic writes no verdict: leave it out"),
        ({"order": "random"}, "order: "),
        ({"kind": "pointwise", "parser": "score", "scorer": "x"}, "scorer: reads what a critic writes"),
    ],
)
def test_specs_that_cannot_be_are_named(tmp_path, others, said):
    spec = write_spec(tmp_path, **generating("http://127.0.0.1:1/v1") | others)
    with pytest.raises(ConfigError, match=said):
        run(tmp_path, spec)


def test_a_scorer_without_a_head_is_named_before_anything_is_written(tmp_path):
    save_backbone(tmp_path / "lm")
    with pytest.raises(ConfigError, match=r"scorer: .*lm: a backbone has no reward head yet"):
        run(tmp_path, write_spec(tmp_path, tmp_path / "lm", **generating("http://127.0.0.1:1/v1")))


def make_critic(folder, kind="critic"):
    """A folder as training leaves it: a language model with a reward head, and the SPEC in config.json."""
    full = save_backbone(folder)
    weight = torch.randn(1, full.config.hidden_size, generator=torch.Generator().manual_seed(0))
    add_weights(folder, **{"score.weight": weight})
    spec = {"kind": "critic", "prompt": PROMPT, "system": "", "parser": ""}
    set_config(folder, fastrm={**SECTION, "paradigm": {"kind": kind, "spec": spec}})
    return folder


def test_the_folder_of_a_critic_writes_and_scores(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = make_critic(tmp_path / "run" / "model")
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    asked = ["eval", model, data, "--max-tokens", 6, "--no-check-exactness", "--json", "out.json"]
    code, error = fastrm_here(capfd, *asked, "--votes", 2, "--temperature", 1)
    assert code == 0, error
    figures = json.loads((tmp_path / "out.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "runs/judges/run.jsonl").read_text().splitlines()]
    assert figures["num_generations"] == len(lines) == 10 and figures["scorer"] == str(model)
    # The model's own classes, each conversation by itself.
    tokenizer = AutoTokenizer.from_pretrained(model)
    stock = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32).eval()
    found = {}
    for line in lines:
        row = next(row for row in ROWS if row["id"] == line["id"])
        response = (row.get("responses") or [row["chosen"], row["rejected"]])[line["order"][0]]
        user = PROMPT.replace("{{ question }}", row["prompt"]).replace("{{ response }}", response)
        turns = [{"role": "user", "content": user}, {"role": "assistant", "content": line["text"]}]
        tokens = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)["input_ids"]
        with torch.no_grad():
            hidden = stock.model(tokens).last_hidden_state[0, -1]
            found.setdefault((line["id"], *line["order"]), []).append(float(stock.score(hidden)))
    got = {(row["id"], n): reward for row in figures["rewards"] for n, reward in enumerate(row["rewards"])}
    assert got == pytest.approx({place: sum(rewards) / 2 for place, rewards in found.items()}, abs=1e-5)
    code, error = fastrm_here(capfd, *asked, "--votes", 2)
    assert code == 64 and "votes: more than one at temperature 0" in error


def test_each_preference_of_a_benchmark_with_several_responses_counts(tmp_path, scorer):
    benchmark, _ = small("rewardbench2", tmp_path / "bench")
    critiques = {
        (record.id, n): [critique_of(response.text, 0)]
        for record in benchmark.records
        for n, response in enumerate(record.responses)
    }
    assert max(len(record.responses) for record in benchmark.records) > 3
    texts, out = JudgeTexts(write_critiques(tmp_path, critiques)), tmp_path / "out.json"
    options = JudgeOptions(RowOptions(), texts, str(tmp_path / "bench"), out)
    evaluate_judge([write_spec(tmp_path, scorer)], "bench:rewardbench2", options)
    figures = json.loads(out.read_text())
    rewards = {row["id"]: row["rewards"] for row in figures["rewards"]}
    right = [
        rewards[record.id][one.winner] > rewards[record.id][one.loser]
        for record in benchmark.records
        for one in record.preferences
        if not one.tie
    ]
    assert figures["preferences"] == len(right) > len(benchmark.records)
    assert figures["accuracy"] == pytest.approx(sum(right) / len(right)) and 0 < figures["accuracy"] < 1


def mm_rlhf_rows():
    """Rows of MM-RLHF's benchmark with the reasons that people gave, without images, which are not here."""
    lines = (DATA / "reward_benches" / "mm_reward_bench.jsonl").read_text().splitlines()[:4]
    for number, row in enumerate(map(json.loads, lines)):
        texts = {key: row[key] for key in ("prompt", "chosen", "rejected")}
        yield {"id": str(number), **texts}, [row["chosen_reason"], row["rejected_reason"]]


def pandalm_rows():
    """Rows of PandaLM's test set, whose critique is PandaLM's own reason about both responses."""
    folder = DATA / "pandalm"
    reasons = json.loads((folder / "pandalm-7b-testset-v1.json").read_text())
    for row, reason in zip(json.loads((folder / "testset-v1.json").read_text())[:4], reasons, strict=False):
        texts = {"prompt": row["instruction"], "chosen": row["response1"], "rejected": row["response2"]}
        yield {"id": str(row["idx"]), **texts}, [reason["pandalm_reason"]] * 2


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the folder shared/data beside the project")
@pytest.mark.parametrize("given", [mm_rlhf_rows, pandalm_rows])
def test_rows_and_critiques_of_others(tmp_path, scorer, given):
    found = list(given())
    rows, critiques = [row for row, _ in found], {(row["id"], n): [texts[n]] for row, texts in found for n in range(2)}
    figures = run(tmp_path, write_spec(tmp_path, scorer), rows, written=write_critiques(tmp_path, critiques))
    wanted = expected(scorer, rows, critiques, {})
    got = {(row["id"], n): reward for row in figures["rewards"] for n, reward in enumerate(row["rewards"])}
    assert got == pytest.approx(wanted, abs=1e-5) and len(got) == 8


@needs_smollm2
def test_smollm2_writes_critiques_which_a_head_on_it_scores(tmp_path, smollm2_folder):
    """The real weights write; with a head of random weights on them they score."""
    scorer = shutil.copytree(smollm2_folder, tmp_path / "scorer")
    add_weights(scorer, **{"score.weight": torch.randn(1, 576, generator=torch.Generator().manual_seed(0)) / 24})
    set_config(scorer, fastrm=SECTION)
    rows = [{"id": "1", "prompt": "What is 2 + 2?", "chosen": "It is 4.", "rejected": "It is 5."}]
    spec = write_spec(tmp_path, scorer, generator={"model": str(smollm2_folder)}, decoding={"max_tokens": 12})
    figures = run(tmp_path, spec, rows)
    lines = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    critiques = {("1", line["order"][0]): [line["text"]] for line in lines}
    assert figures["num_generations"] == figures["critiques_cut"] == 2
    assert all(text.strip() for (text,) in critiques.values())
    wanted = list(expected(scorer, rows, critiques, {}).values())
    assert figures["rewards"][0]["rewards"] == pytest.approx(wanted, abs=1e-4)

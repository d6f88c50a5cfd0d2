"""Critics and judges that were trained here, by the command that evaluates them: from rows to figures."""

import json

import pytest
import torch
from jinja2 import Template
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastrm.evaluate.options import JudgeTexts, RowOptions
from fastrm.judge.command import JudgeOptions, evaluate_judge
from fastrm.prompts.spec import load_spec
from fastrm.share.card import make_card
from tests.helpers.runs import TEXT_MODEL, fastrm_here, run, tiny_config, write_rows


def row(number):
    """A row whose critiques tell which response is the better one."""
    good, bad = ("yes it is", "no")[:: 1 if number % 2 == 0 else -1]
    reasons = {"chosen_reason": "Right.", "rejected_reason": "Wrong."}
    return {"id": f"t{number}", "prompt": f"Is {number} even?", "chosen": good, "rejected": bad, **reasons}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """By paradigm the folder of a run of 100 steps, and its summary."""
    found = {}
    for paradigm in ("critic", "judge"):
        folder = tmp_path_factory.mktemp(paradigm)
        rows = [write_rows(folder / f"{n}.jsonl", [row(k) for k in part])
                for n, part in enumerate((range(120), range(200, 216)))]  # fmt: skip
        config = tiny_config(
            folder, *rows, run={"max_steps": 100}, model={"init": TEXT_MODEL}, optim={"lr": 3e-3, "batch_pairs": 16}
        )
        config.write_text(f"paradigm: {paradigm}\n{config.read_text()}")
        found[paradigm] = (folder / "run", run(config))
    return found


def evaluate(folder, capfd, tmp_path, *options):
    code, error = fastrm_here(
        capfd, "eval", folder / "model", folder.parent / "1.jsonl", "--json", tmp_path / "out.json", *options
    )
    assert code == 0, error
    return json.loads((tmp_path / "out.json").read_text())


def test_a_critic_behind_given_critiques_is_as_good_as_at_the_end_of_its_training(trained, tmp_path, capfd):
    folder, summary = trained["critic"]
    figures = evaluate(folder, capfd, tmp_path, "--given-critiques")
    assert figures["accuracy"] == summary["eval_accuracy"] > 0.9
    assert (figures["num_generations"], figures["preferences"]) == (32, 16)


def test_a_critic_writes_its_critiques_and_ends_them(trained, tmp_path, capfd):
    folder, _ = trained["critic"]
    store = tmp_path / "texts.jsonl"
    figures = evaluate(folder, capfd, tmp_path, "--max-tokens", 12, "--generations", store)
    texts = {(line["id"], *line["order"]): line["text"] for line in map(json.loads, store.read_text().splitlines())}
    assert len(texts) == figures["num_generations"] == 32 and figures["critiques_cut"] == 0
    assert set(texts.values()) <= {"Right.", "Wrong."}
    # One of them by transformers alone, from the exported folder.
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    given = row(200)
    user = Template(load_spec("mm_rlhf_reward").prompt).render(question=given["prompt"], response=given["chosen"])
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": user}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**prompt, do_sample=False, max_new_tokens=12, eos_token_id=tokenizer.eos_token_id)
    written = tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert written == texts["t200", 0]


def test_a_judge_gives_verdicts_in_its_form(trained, tmp_path, capfd):
    folder, _ = trained["judge"]
    figures = evaluate(folder, capfd, tmp_path, "--max-tokens", 40, "--generations", tmp_path / "texts.jsonl")
    assert (figures["num_generations"], figures["num_parse_failures"], figures["preferences"]) == (32, 0, 16)
    assert figures["position_flip_rate"] is not None and "scorer" not in figures


def test_a_trained_critic_scores_what_another_model_writes(trained, tmp_path):
    """By a SPEC: its critiques are given, its scorer is the critic."""
    folder, _ = trained["critic"]
    spec, out = tmp_path / "critic.yaml", tmp_path / "out.json"
    spec.write_text(json.dumps({"extends": "mm_rlhf_reward", "scorer": str(folder / "model")}))
    lines = [
        {"id": f"t{n}", "order": [k], "text": text}
        for n in range(200, 216)
        for k, text in enumerate(("Right.", "Wrong."))
    ]
    written = write_rows(tmp_path / "texts.jsonl", lines)
    options = JudgeOptions(RowOptions(), JudgeTexts(written), None, out)
    evaluate_judge([f"judge:{spec}"], str(folder.parent / "1.jsonl"), options)
    right = json.loads(out.read_text())
    for line in lines:
        line["text"] = {"Right.": "Wrong.", "Wrong.": "Right."}[line["text"]]
    write_rows(written, lines)
    evaluate_judge([f"judge:{spec}"], str(folder.parent / "1.jsonl"), options)
    # The critique alone decides: turned critiques turn every preference.
    assert right["accuracy"] > 0.9 and json.loads(out.read_text())["accuracy"] == pytest.approx(1 - right["accuracy"])


@pytest.mark.parametrize("paradigm, named", [("critic", "A critic: it"), ("judge", "A generative judge: it")])
def test_their_cards_say_what_they_are_and_how_they_are_asked(trained, paradigm, named):
    folder, _ = trained[paradigm]
    card = make_card(f"me/{paradigm}", folder / "model", folder, None)
    spec = {"critic": "mm_rlhf_reward", "judge": "r1_reward"}[paradigm]
    assert f"{named} writes" in card and load_spec(spec).prompt in card and f"fastrm eval {paradigm} eval.jsonl" in card
    assert "RewardModel.from_pretrained" not in card and "AutoModelForSequenceClassification" not in card
    assert ("behind the critiques of the data" in card, "| head |" in card) == ((paradigm == "critic",) * 2)

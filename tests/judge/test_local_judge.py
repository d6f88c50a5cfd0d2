"""A judge that transformers loads here: a tiny one that reads images, and SmolLM2's real weights."""

import json
import os
import re
import shutil

import pytest
import torch
from PIL import Image

from fastrm.data.record import Message
from fastrm.errors import ConfigError, DataError
from fastrm.evaluate.options import JudgeTexts, RowOptions, ScoringOptions
from fastrm.grpo.config import PolicySection
from fastrm.grpo.policy import answer, load_policy, save_policy
from fastrm.grpo.questions import Question
from fastrm.judge.command import JudgeOptions, evaluate_judge, make_writer
from fastrm.judge.judging import JudgeJudging
from fastrm.prompts.spec import load_spec
from tests.helpers.runs import TINY, fastrm_here, write_rows
from tests.helpers.smollm2 import needs_smollm2


def judge(folder, model, rows, **others):
    spec = {"extends": "r1_reward", "generator": {"model": str(model), "batch": 4}, "decoding": {"max_tokens": 4}}
    (folder / "spec.yaml").write_text(json.dumps(spec | others))
    options = JudgeOptions(RowOptions(), JudgeTexts(generations=folder / "texts.jsonl"), json_out=folder / "out.json")
    evaluate_judge([f"judge:{folder / 'spec.yaml'}"], str(write_rows(folder / "pairs.jsonl", rows)), options)
    return json.loads((folder / "out.json").read_text())


def image_rows(folder):
    rows = []
    for number, colour in enumerate(("red", "blue", "green")):
        Image.new("RGB", (56, 56), colour).save(folder / f"{number}.png")
        rows.append({"id": str(number), "prompt": "Which colour?", "images": [f"{number}.png"], "chosen": colour,
                     "rejected": "grey"})  # fmt: skip
    return rows


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random Qwen2.5-VL as a policy, in a folder."""
    folder = tmp_path_factory.mktemp("tiny")
    settings = PolicySection(
        init=TINY["model"]["init"], tokenizer={"train_vocab_size": 300}, min_pixels=784, max_pixels=3136
    )
    save_policy(*load_policy(settings, [Question((Message("user", ("Which?",)),), "red", "x:1")], 0), folder)
    return folder


def test_a_model_that_reads_images_is_shown_them(tmp_path, tiny):
    figures = judge(tmp_path, tiny, image_rows(tmp_path))
    assert (figures["num_generations"], figures["preferences"]) == (6, 3)
    lines = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert len({line["key"] for line in lines}) == 6 and all(isinstance(line["text"], str) for line in lines)


@pytest.mark.parametrize(("asked", "found"), [("auto", torch.float32), ("bf16", torch.bfloat16)])
def test_the_device_and_the_dtype_of_the_command_are_those_of_the_model_that_writes(tmp_path, tiny, asked, found):
    (tmp_path / "spec.yaml").write_text(json.dumps({"extends": "r1_reward", "generator": {"model": str(tiny)}}))
    spec = load_spec(str(tmp_path / "spec.yaml"))
    writers = [
        make_writer(spec, ScoringOptions(device="cpu", dtype=asked)),
        JudgeJudging(spec, ScoringOptions(device="cpu", dtype=asked))._writer,
    ]
    assert [(writer.device.type, writer._model.dtype) for writer in writers] == [("cpu", found)] * 2
    with pytest.raises(ConfigError, match="cuda:99"):
        make_writer(spec, ScoringOptions(device="cuda:99"))
    with pytest.raises(ConfigError, match="cuda:99"):
        JudgeJudging(spec, ScoringOptions(device="cuda:99"))


def test_the_command_hands_its_dtype_to_the_model_that_writes_and_refuses_what_only_scores(tmp_path, tiny, capfd):
    spec = {"extends": "r1_reward", "generator": {"model": str(tiny)}, "decoding": {"max_tokens": 2}}
    (tmp_path / "spec.yaml").write_text(json.dumps(spec))
    data, texts = write_rows(tmp_path / "pairs.jsonl", image_rows(tmp_path)), tmp_path / "texts.jsonl"
    asked = ["eval", f"judge:{tmp_path / 'spec.yaml'}", data]
    for others in (["--generations", texts], ["--costs"]):
        code, said = fastrm_here(capfd, *asked, *others, "--device", "cuda:99")
        assert code == 64 and "cuda:99" in said
        code, said = fastrm_here(capfd, *asked, *others, "--normalize", "--tokens-per-pack", 9, "--no-check-exactness")
        wanted = "--tokens-per-pack, --check-exactness, --normalize: of no use for a judge that writes here"
        assert code == 64 and wanted in said
        code, said = fastrm_here(capfd, *asked, *others, "--max-image-pixels", 9)
        assert code == 65 and "pairs.jsonl:1: " in said and "IMAGE_TOO_LARGE" in said
    code, said = fastrm_here(capfd, *asked, "--from", texts, "--dtype", "bf16", "--max-image-pixels", 9)
    assert code == 64 and "--dtype, --max-image-pixels: of no use for texts that are written elsewhere" in said


def test_an_image_that_cannot_be_read_is_named_with_its_row_and_the_others_go_on(tmp_path, tiny):
    rows = image_rows(tmp_path)
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:60])
    with pytest.raises(DataError, match=r"over 2 preferences: 1 preferences were not judged: 1; 2 lines or rows"):
        judge(tmp_path, tiny, rows)
    figures = json.loads((tmp_path / "out.json").read_text())
    assert (figures["num_generations"], figures["missing"]) == (4, ["1"])
    wanted = r".*pairs\.jsonl:2: order \[., .\]: .*1\.png.*\(IMAGE_DAMAGED\)"
    assert len(figures["refused"]) == 2 and all(re.fullmatch(wanted, one) for one in figures["refused"])


def test_an_image_that_the_model_does_not_take_is_named_with_its_row_and_the_others_go_on(tmp_path, tiny):
    rows = image_rows(tmp_path)
    Image.new("RGB", (900, 4), "red").save(tmp_path / "1.png")
    with pytest.raises(DataError, match=r"over 2 preferences: 1 preferences were not judged: 1; 2 lines or rows"):
        judge(tmp_path, tiny, rows)
    refused = json.loads((tmp_path / "out.json").read_text())["refused"]
    wanted = r'.*pairs\.jsonl:2: order \[., .\]: image ".*1\.png" is none for this model: .*aspect ratio.*the row out'
    assert len(refused) == 2 and all(re.fullmatch(wanted, one) for one in refused)


def test_a_folder_with_other_weights_is_asked_again(tmp_path, tiny):
    model = shutil.copytree(tiny, tmp_path / "model")
    for number, texts in enumerate((6, 6, 12)):
        if number == 2:
            os.utime(model / "model.safetensors", ns=(0, 0))
        judge(tmp_path, model, image_rows(tmp_path))
        assert len((tmp_path / "texts.jsonl").read_text().splitlines()) == texts


def test_only_what_decoding_says_counts(tmp_path, tiny):
    """A model's generation_config.json may say what makes all votes the same, or none the likeliest."""
    model = shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((model / "generation_config.json").read_text())
    said = {"do_sample": True, "top_k": 1, "repetition_penalty": 50.0, "suppress_tokens": list(range(100))}
    (model / "generation_config.json").write_text(json.dumps(config | said))
    votes = {"votes": 8, "decoding": {"max_tokens": 4, "temperature": 1.0}, "order": "as_given"}
    judge(tmp_path, model, image_rows(tmp_path)[:1], **votes)
    texts = [json.loads(line)["text"] for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert len(texts) == 8 and len(set(texts)) > 1
    greedy = []
    for number, folder in enumerate((tiny, model)):
        work = tmp_path / str(number)
        work.mkdir()
        judge(work, folder, image_rows(work), decoding={"max_tokens": 16})
        greedy.append([json.loads(line)["text"] for line in (work / "texts.jsonl").read_text().splitlines()])
    assert greedy[0] == greedy[1]


def test_a_policy_answers_with_its_likeliest_tokens(tiny):
    policy, processor = load_policy(PolicySection(path=str(tiny)), [], 0)
    questions = [Question((Message("user", (f"Which {number}?",)),), "", f"x:{number}") for number in range(3)]
    likeliest = answer(policy, processor, questions, 16)
    policy.generation_config.repetition_penalty = 50.0
    assert answer(policy, processor, questions, 16) == likeliest
    assert policy.generation_config.repetition_penalty == 50.0  # it is saved with the policy


@needs_smollm2
def test_texts_that_end_by_themselves_are_told_from_those_that_are_cut(tmp_path, smollm2_folder):
    rows = [{"id": "1", "prompt": "Say yes.", "chosen": "Yes.", "rejected": "No."}]
    prompt = "Answer with the word Yes and nothing else."
    for most in (64, 1):
        judge(tmp_path, smollm2_folder, rows, prompt=prompt, decoding={"max_tokens": most}, order="as_given")
    short, cut = map(json.loads, (tmp_path / "texts.jsonl").read_text().splitlines())
    assert "cut" not in short and cut["cut"] is True and short["text"].startswith(cut["text"])


@needs_smollm2
def test_smollm2_writes_texts(tmp_path, smollm2_folder):
    rows = [{"id": "1", "prompt": "What is 2 + 2?", "chosen": "It is 4.", "rejected": "It is 5."}]
    figures = judge(tmp_path, smollm2_folder, rows, decoding={"max_tokens": 8})
    assert figures["num_generations"] == 2
    texts = [json.loads(line)["text"] for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert all(text.strip() and text.isprintable() for text in map(str.strip, texts))


@needs_smollm2
def test_a_text_model_is_not_asked_about_images(tmp_path, smollm2_folder):
    with pytest.raises(ConfigError, match=r"generator.model: a text model, but .*pairs.jsonl:1 has an image"):
        judge(tmp_path, smollm2_folder, image_rows(tmp_path))

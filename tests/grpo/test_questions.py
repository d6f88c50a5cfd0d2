"""Questions with true answers for `fastrm grpo`: read from files, refused by name, and handed to TRL."""

import tarfile
from itertools import islice

import pytest
from PIL import Image

from bench.pretrained.preferences import DATA, answer_pairs
from fastrm.errors import DataError
from fastrm.grpo.config import QuestionsSection
from fastrm.grpo.evaluation import as_samples
from fastrm.grpo.questions import as_dataset, read_questions
from tests.helpers.runs import write_rows

pytest.importorskip("trl")


def test_questions_keep_their_images_on_the_way_to_trl(tmp_path):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.png")
    rows = [
        {"prompt": "So <image> or so?", "images": ["a.png"], "solution": "yes"},
        {"messages": [{"role": "system", "content": "Short."}, {"role": "user", "content": "So?"}], "solution": "no"},
    ]
    questions = read_questions(QuestionsSection(path=str(write_rows(tmp_path / "questions.jsonl", rows))))
    first, second = as_dataset(questions)
    parts = [{k: v for k, v in part.items() if v is not None} for part in first["prompt"][0]["content"]]
    assert parts == [{"type": "text", "text": "So "}, {"type": "image"}, {"type": "text", "text": " or so?"}]
    assert [image.size for image in first["images"]] == [(30, 20)] and second["images"] == []
    assert [message["role"] for message in second["prompt"]] == ["system", "user"] and second["solution"] == "no"


def test_images_of_an_archive_reach_the_policy_and_the_judge(tmp_path):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.png")
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        archive.add(tmp_path / "a.png", "a.png")
    rows = write_rows(tmp_path / "questions.jsonl", [{"prompt": "So?", "images": ["a.png"], "solution": "yes"}])
    questions = read_questions(QuestionsSection(path=str(rows), images=str(tmp_path / "images.tar")))
    (asked,) = as_dataset(questions)
    assert [image.size for image in asked["images"]] == [(30, 20)]
    assert as_samples(questions, ["yes"])[0].images == [(tmp_path / "a.png").read_bytes()]
    (tmp_path / "images.tar").unlink()
    with pytest.raises(DataError, match=r"questions.jsonl:1: .*IMAGE_MISSING"):
        as_dataset(questions)


@pytest.mark.parametrize(
    "row, said",
    [
        ({"prompt": "So?"}, r'questions.jsonl:1: "solution" is missing'),
        ({"solution": "yes"}, r'questions.jsonl:1: "prompt" is missing'),
        ("{", r"questions.jsonl:1: .*BAD_JSON"),
        ({"prompt": "So?", "videos": ["a.mp4"], "solution": "yes"}, "the prompt has a video"),
        ({"prompt": "So?", "solution": {"target": "4"}}, r"jsonl:1: true answer: got dict \{'target': '4'\}, wanted"),
        ({"prompt": "So?", "solution": ["4", "four"]}, '"solution" holds 2 true answers, wanted one'),
        ({"prompt": "So?", "solution": float("nan")}, r'jsonl:1: "solution" is missing or empty; name the column'),
        ({"prompt": "So?", "solution": "  "}, r'jsonl:1: "solution" is missing or empty; name the column'),
        ({"prompt": "So?", "imags": ["a.png"], "solution": "4"}, r'"imags" holds an image.*the key is "images"'),
        ({"prompt": "So?", "images": ["a.png"], "solution": "4"}, r"jsonl:1: image .*a\.png.*IMAGE_MISSING"),
        ({"prompt": "So?", "tools": [{"name": "f"}], "solution": "4"}, "tools, documents or calls, which no policy is"),
    ],
)
def test_rows_that_are_no_questions_are_named(tmp_path, row, said):
    source = QuestionsSection(path=str(write_rows(tmp_path / "questions.jsonl", [row])))
    with pytest.raises(DataError, match=said):
        read_questions(source)


def test_rows_beyond_the_file_are_named(tmp_path):
    path = str(write_rows(tmp_path / "questions.jsonl", [{"prompt": f"{n}?", "solution": "4"} for n in range(3)]))
    assert len(read_questions(QuestionsSection(path=path, rows=[1, 3]))) == 2
    with pytest.raises(DataError, match=r"has 3 rows, and rows: \[1, 5000\] names more; write \[1, 3\]"):
        read_questions(QuestionsSection(path=path, rows=[1, 5000]))


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the folder shared/data beside the project")
def test_preferences_of_people_are_questions_whose_true_answer_is_the_preferred_one(tmp_path):
    rows = list(islice(answer_pairs(), 3))
    path = str(write_rows(tmp_path / "answers.jsonl", rows))
    found = read_questions(QuestionsSection(path=path, truth="chosen"))
    assert [(question.messages[0].text, question.truth) for question in found] == [
        (row["prompt"], row["chosen"].strip()) for row in rows
    ]

"""Rows that a judge or critic cannot be shown are named and counted, and the others are judged."""

import json

import pytest

from fastrm.data.paradigm import TextReading
from fastrm.data.record import Message, Preference, Record, Response
from fastrm.errors import DataError, RecordError
from fastrm.evaluate.options import JudgeTexts, RowOptions, ScoringOptions
from fastrm.judge.command import JudgeOptions, evaluate_judge
from fastrm.judge.questions import make_questions
from fastrm.prompts.spec import load_spec
from tests.helpers.benchmark_files import SMALL, write_jsonl
from tests.helpers.chat_server import ROWS, chat_server, prefers_good, text_of, write_spec
from tests.helpers.runs import fastrm_here, write_rows
from tests.helpers.support import make_image

USER = [{"role": "user", "content": "What is the weather?"}]
CALL = [{"type": "function", "function": {"name": "weather", "arguments": {}}}]
TOOLS = {"id": "tools", "prompt": USER, "tools": [{"name": "weather"}],
         "chosen": [{"role": "assistant", "content": "Looking now.", "tool_calls": CALL}],
         "rejected": [{"role": "assistant", "content": "I cannot know the weather."}]}  # fmt: skip
CALLS = {key: value for key, value in TOOLS.items() if key != "tools"} | {"id": "calls"}


def talk(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


TWO_PROMPTS = {"id": "two", "chosen": talk("Question ONE?", "a"), "rejected": talk("Question TWO?", "b")}
VIDEO = {"id": "video", "prompt": "What moves?", "videos": ["a.mp4"], "chosen": "a cat", "rejected": "a dog"}


def evaluate(folder, judge, rows, **texts):
    """Return the figures and the error; the data has two good rows around those that are tried."""
    (folder / "a.png").write_bytes(make_image(60, 45).data)
    (folder / "a.mp4").write_bytes(b"not opened here")
    data, out = str(write_rows(folder / "pairs.jsonl", [ROWS[0], *rows, ROWS[1]])), folder / "out.json"
    texts = JudgeTexts(**(texts or {"generations": folder / "texts.jsonl"}))
    with pytest.raises(DataError) as error:
        evaluate_judge([judge], data, JudgeOptions(RowOptions(), texts, None, out, ScoringOptions()))
    return json.loads(out.read_text()), str(error.value)


@pytest.mark.parametrize("order", ["both", "round_robin", "bracket"])
@pytest.mark.parametrize(
    "row, said",
    [
        (TOOLS, "the row has tools or documents, and only texts and media are shown"),
        (CALLS, "the row has tool calls or the like, and only texts and media are shown"),
        (TWO_PROMPTS, "the responses have different prompts, and a judge is shown one"),
        (VIDEO, "the prompt has a video, and a judge is shown texts and images"),
    ],
    ids=["tools", "tool_calls", "two_prompts", "video"],
)
def test_a_row_that_a_judge_cannot_be_shown_is_named_and_the_others_are_judged(tmp_path, row, said, order):
    with chat_server(prefers_good) as (url, bodies):
        figures, error = evaluate(tmp_path, write_spec(tmp_path, url, order=order), [row])
    assert len(bodies) == 4 and all("good" in text_of(body) for body in bodies)
    assert (figures["accuracy"], figures["preferences"], figures["missing"]) == (1, 2, [row["id"]])
    (refused,) = figures["refused"]
    assert f"pairs.jsonl:2: {said}" in refused and refused.endswith("(NOT_SHOWN)")
    assert error.startswith(f"partial result over 2 preferences: 1 preferences were not judged: {row['id']}; 1 lines")


@pytest.mark.parametrize("place", [0, 1])
def test_an_image_in_either_response_is_shown_neither_in_training_nor_in_evaluation(place):
    user, spec = Message("user", ("Draw.",)), load_spec("r1_reward")
    said = [("no",), ("done",)]
    said[place] = (make_image(60, 45), *said[place])
    responses = tuple(Response((user, Message("assistant", parts))) for parts in said)
    record = Record("1", responses, (Preference(0, 1),), "drawings", "a.jsonl:1")
    refused = {}
    assert list(make_questions(spec, [record], refused=refused)) == []
    assert "a.jsonl:1: a response holds an image or a video" in refused["1"]
    with pytest.raises(DataError, match=r"a.jsonl:1: .*NOT_SHOWN"):
        list(make_questions(spec, [record]))
    with pytest.raises(RecordError, match="a response holds an image or a video"):
        TextReading("judge", spec.prompt, spec.system, spec.parser).convert(record)


@pytest.mark.parametrize(("row", "said"), [(TOOLS, "tools or documents"), (CALLS, "tool calls"), (VIDEO, "a video")])
def test_a_pointwise_judge_is_shown_no_part_of_a_row(tmp_path, row, said):
    with chat_server(lambda body: f"Score: {9 if 'good' in text_of(body) else 3}") as (url, bodies):
        judge = write_spec(tmp_path, url, extends="llava_critic_pointwise")
        figures, _ = evaluate(tmp_path, judge, [row])
    assert len(bodies) == 4 and figures["accuracy"] == 1 and figures["missing"] == [row["id"]]
    assert said in figures["refused"][0]


def test_texts_of_another_program_count_for_rows_that_cannot_be_shown_here(tmp_path):
    rows = [ROWS[0], VIDEO, TOOLS]
    lines = [
        {"id": row["id"], "order": order, "text": f"<answer>{order.index(0) + 1}</answer>"}
        for row in rows
        for order in ([0, 1], [1, 0])
    ]
    (tmp_path / "a.mp4").write_bytes(b"not opened here")
    data, out = write_rows(tmp_path / "pairs.jsonl", rows), tmp_path / "out.json"
    written = write_rows(tmp_path / "written.jsonl", lines)
    for judge in ("judge:r1_reward", write_spec(tmp_path, "http://127.0.0.1:1/v1")):
        evaluate_judge([judge], str(data), JudgeOptions(RowOptions(), JudgeTexts(written), json_out=out))
        figures = json.loads(out.read_text())
        assert (figures["accuracy"], figures["preferences"], figures["refused"]) == (1, 3, [])


def test_kept_texts_of_a_run_with_such_rows_are_read_again(tmp_path):
    with chat_server(prefers_good) as (url, _):
        judge = write_spec(tmp_path, url)
        figures, error = evaluate(tmp_path, judge, [VIDEO, TOOLS])
        again = evaluate(tmp_path, judge, [VIDEO, TOOLS], written=tmp_path / "texts.jsonl")
    assert again == (figures, error) and len(figures["refused"]) == 2


def test_a_benchmark_with_videos_is_judged_but_for_them(tmp_path, capfd):
    file, _, make_rows, _ = SMALL["mm_rlhf_rewardbench"]
    rows = make_rows()
    write_jsonl(tmp_path / "bench" / file, rows)
    for name in {row["image"] for row in rows if "image" in row}:
        (tmp_path / "bench" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "bench" / name).write_bytes(make_image(60, 45).data)
    with chat_server(prefers_good) as (url, bodies):
        code, error = fastrm_here(
            capfd, "eval", write_spec(tmp_path, url), "bench:mm_rlhf_rewardbench", "--data", tmp_path / "bench",
            "--generations", tmp_path / "texts.jsonl", "--json", tmp_path / "out.json",
        )  # fmt: skip
    assert code == 65 and (tmp_path / "out.json").exists(), error
    figures = json.loads((tmp_path / "out.json").read_text())
    assert len(bodies) == 2 * 6 and figures["preferences"] == 6
    assert figures["missing"] == ["video/e_x", "video/e_x#2"] and len(figures["refused"]) == 2
    assert "2 preferences were not judged" in error

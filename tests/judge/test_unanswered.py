"""A judge that writes: questions without an answer, equal questions, and settings that contradict each other."""

import json

import pytest

from fastrm.data.media.images import open_bytes
from fastrm.errors import ConfigError, DataError, ServerError
from fastrm.evaluate.options import JudgeTexts, RowOptions
from fastrm.evaluate.reading import read_in_order
from fastrm.judge import questions
from fastrm.judge.command import JudgeOptions, evaluate_judge
from fastrm.prompts.spec import load_spec
from tests.helpers.runs import write_rows
from tests.helpers.support import make_image
from tests.judge.test_generating import ROWS, chat_server, prefers_good, run, text_of, waits, write_spec

pytest.importorskip("httpx")
__all__ = ["waits"]  # a fixture: nothing waits


@pytest.mark.parametrize("batch", [1, 4])
def test_a_question_at_which_the_server_fails_each_time_does_not_end_the_others(tmp_path, batch):
    with chat_server(lambda body: 500 if "good 1" in text_of(body) else prefers_good(body)) as (url, bodies):
        with pytest.raises(DataError, match=r"not judged: r1"):
            # One at a time, the second order of r1 fails behind the first, with nothing answered between.
            run(tmp_path, write_spec(tmp_path, url, batch=batch, order="as_given" if batch == 1 else "both"))
        assert len([body for body in bodies if "good 1" in text_of(body)]) == (3 if batch == 1 else 6)
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["missing"] == ["r1"]
    assert all("no answer in 3 tries, at last HTTP 500" in one for one in figures["refused"])
    assert figures["num_generations"] == (2 if batch == 1 else 4)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_server_that_fails_from_some_time_on_ends_the_command(tmp_path, batch):
    answered = []

    def answer(body):
        answered.append(body)
        return prefers_good(body) if len(answered) == 1 else 503

    with chat_server(answer) as (url, bodies):
        with pytest.raises(ServerError, match=r"no answer in 3 tries, at last HTTP 503.*Run the command again"):
            run(tmp_path, write_spec(tmp_path, url, batch=batch))
        assert len(bodies) <= 1 + 3 * 2 * batch, "the rest is not asked"
    assert len((tmp_path / "texts.jsonl").read_text().splitlines()) == 1


def test_rows_with_an_equal_question_share_a_kept_text(tmp_path):
    rows = [{**ROWS[0], "id": name} for name in "ab"]
    with chat_server(prefers_good) as (url, _):
        judge = write_spec(tmp_path, url)
        assert run(tmp_path, judge, rows)["num_generations"] == 4
    lines = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert {line["id"] for line in lines} == {"a"}
    options = JudgeOptions(RowOptions(), JudgeTexts(tmp_path / "texts.jsonl"), json_out=tmp_path / "again.json")
    evaluate_judge([judge], str(write_rows(tmp_path / "pairs.jsonl", rows[1:])), options)
    again = json.loads((tmp_path / "again.json").read_text())
    assert (again["accuracy"], again["num_generations"], again["refused"]) == (1, 2, [])


def test_options_that_the_fields_of_the_spec_stand_above_are_refused(tmp_path):
    judge = write_spec(tmp_path, "http://127.0.0.1:9/v1", extra_body={"max_tokens": None, "max_completion_tokens": 9})
    data = str(write_rows(tmp_path / "pairs.jsonl", ROWS))
    with pytest.raises(ConfigError, match=r"--max-tokens: of no use, since .*extra_body says max_tokens"):
        evaluate_judge([judge], data, JudgeOptions(RowOptions(), JudgeTexts(max_tokens=7)))


def test_a_key_that_no_header_can_hold_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "schlüssel")
    with pytest.raises(ConfigError, match="OPENAI_API_KEY: the key has signs that are not ASCII"):
        run(tmp_path, write_spec(tmp_path, "http://127.0.0.1:9/v1"))


def test_an_image_is_read_once_for_the_keys_of_a_row(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(make_image(60, 45).data)
    row = {"id": "1", "prompt": "?", "images": ["a.png"], "responses": ["a", "b", "c"], "preferences": [[0, 1]]}
    data = str(write_rows(tmp_path / "pairs.jsonl", [row]))
    records = list(read_in_order(data, None, "auto", require_preferences=True))
    opened = []
    monkeypatch.setattr(questions, "open_bytes", lambda *asked: opened.append(asked) or open_bytes(*asked))
    spec = load_spec(write_spec(tmp_path, "http://127.0.0.1:9/v1", order="round_robin").removeprefix("judge:"))
    keys = {one.key for one in questions.make_questions(spec, records)}
    assert len(keys) == 6 and len(opened) == 1

"""A judge that writes: what is asked, and what is kept."""

import base64
import json
import shutil
import threading
from functools import partialmethod

import pytest
from PIL import Image

from fastrm.data.media.images import open_bytes
from fastrm.data.record import ImageRef
from fastrm.errors import ConfigError, DataError, InterruptedRun, StorageError
from fastrm.evaluate.options import JudgeTexts, RowOptions
from fastrm.evaluate.reading import read_in_order
from fastrm.judge import questions
from fastrm.judge.command import JudgeOptions, evaluate_judge
from fastrm.judge.endpoint import Endpoint
from fastrm.judge.generations import read_generations
from fastrm.judge.questions import JudgeQuestion, make_questions
from fastrm.limits import MediaLimits
from fastrm.prompts.spec import load_spec
from tests.helpers.chat_server import ROWS, chat_server, prefers_good, run, text_of, write_spec
from tests.helpers.runs import fastrm_here, write_rows
from tests.helpers.support import make_image
from tests.helpers.waiting import PATIENCE

pytestmark = pytest.mark.usefixtures("waits")


def test_both_orders_are_asked_and_nothing_is_asked_twice(tmp_path):
    with chat_server(prefers_good) as (url, bodies):
        judge = write_spec(tmp_path, url)
        figures = run(tmp_path, judge)
        assert figures["accuracy"] == pytest.approx(5 / 6) and figures["accuracy_as_released"] == 1
        assert figures["position_flip_rate"] == pytest.approx(1 / 3)
        assert len(bodies) == 6 and {body["path"] for body in bodies} == {"/v1/chat/completions"}
        assert all((body["model"], body["temperature"]) == ("judge", 0) for body in bodies)
        again = run(tmp_path, judge)
        assert len(bodies) == 6 and again == figures
        changed = [*ROWS[:2], {**ROWS[2], "rejected": "bad 2, and long"}]
        run(tmp_path, judge, changed)
        assert len(bodies) == 8
    # What was kept is measured by --from too.
    options = JudgeOptions(RowOptions(), JudgeTexts(tmp_path / "texts.jsonl"), json_out=tmp_path / "again.json")
    (tmp_path / "texts.jsonl").write_text("".join((tmp_path / "texts.jsonl").read_text().splitlines(True)[:6]))
    evaluate_judge(["judge:r1_reward"], str(write_rows(tmp_path / "pairs.jsonl", ROWS)), options)
    assert json.loads((tmp_path / "again.json").read_text())["accuracy"] == figures["accuracy"]


def test_kept_texts_of_another_spec_or_row_are_left_out_and_named(tmp_path):
    changed = [ROWS[0], {**ROWS[1], "rejected": "bad 1, and long"}]
    with chat_server(prefers_good) as (url, _):
        judge = write_spec(tmp_path, url, batch=1)
        for rows in (changed, ROWS[:2]):
            figures = run(tmp_path, judge, rows)
        assert figures["accuracy"] == 1
        shutil.copy(tmp_path / "texts.jsonl", tmp_path / "kept.jsonl")
        texts = JudgeTexts(tmp_path / "kept.jsonl")
        data, out = str(write_rows(tmp_path / "pairs.jsonl", ROWS[:2])), tmp_path / "again.json"
        with pytest.raises(DataError, match=r"partial result over 2 preferences: 2 lines or rows could not be used"):
            evaluate_judge([judge], data, JudgeOptions(RowOptions(), texts, json_out=out))
        again = json.loads(out.read_text())
        assert again["num_generations"] == 4 and again["accuracy"] == 1
        assert [line.split(": ")[0][-1] for line in again["refused"]] == ["3", "4"]
        assert all("another SPEC, model, option or row" in line for line in again["refused"])
        # Another SPEC wrote none of them; without a generator nobody can say which ones are of these rows.
        other = write_spec(tmp_path, url, batch=1, decoding={"max_tokens": 7})
        with pytest.raises(DataError, match=r"no preference was judged; .*kept.jsonl:1: .*another SPEC"):
            evaluate_judge([other], data, JudgeOptions(RowOptions(), texts))
        with pytest.raises(DataError, match=r"kept.jsonl:\d: .*'r1' has 2 texts .*in the order \[., .\].* 1 vote"):
            evaluate_judge(["judge:r1_reward"], data, JudgeOptions(RowOptions(), texts))


def test_a_bracket_is_read_with_the_spec_that_made_it(tmp_path):
    row = {"id": "1", "prompt": "?", "responses": ["good", "bad", "worse", "bad too"], "preferences": [[0, 1]]}
    with chat_server(lambda body: "<answer>1</answer>") as (url, _):
        judge = write_spec(tmp_path, url, order="bracket")
        figures = run(tmp_path, judge, [row])
        lines = (tmp_path / "texts.jsonl").read_text().splitlines(True)
        options = JudgeOptions(RowOptions(), JudgeTexts(tmp_path / "kept.jsonl"), json_out=tmp_path / "again.json")
        (tmp_path / "kept.jsonl").write_text("".join(lines))
        evaluate_judge([judge], str(tmp_path / "pairs.jsonl"), options)
        assert json.loads((tmp_path / "again.json").read_text()) == figures
        (tmp_path / "kept.jsonl").write_text("".join(lines[1:]))  # who met in the second round cannot be known
        with pytest.raises(DataError, match=r"no preference was judged; .*kept.jsonl:4: left out: not asked by"):
            evaluate_judge([judge], str(tmp_path / "pairs.jsonl"), options)


def test_a_text_that_was_cut_is_kept_with_that(tmp_path):
    with chat_server(prefers_good, cut={1}) as (url, _):
        run(tmp_path, write_spec(tmp_path, url, batch=1))
    assert ["cut" in json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()].count(True) == 1
    records = list(read_in_order(str(tmp_path / "pairs.jsonl"), None, "auto", require_preferences=True))
    found = read_generations(tmp_path / "texts.jsonl", records, 2, [])
    assert [one.is_cut for one in found] == [False, True, *[False] * 4]


def test_votes_have_texts_of_their_own(tmp_path):
    with chat_server(prefers_good) as (url, bodies):
        judge = write_spec(tmp_path, url, votes=3, decoding={"temperature": 1.0})
        assert run(tmp_path, judge, ROWS[:1])["num_generations"] == 6
        assert len({body["seed"] for body in bodies}) == 6


def test_fields_of_the_spec_are_sent_above_the_usual_ones_and_are_part_of_the_key(tmp_path):
    extra = {"max_tokens": None, "seed": None, "max_completion_tokens": 9, "chat_template_kwargs": {"thinking": None}}
    with chat_server(prefers_good) as (url, bodies):
        others = {"order": "as_given", "decoding": {"temperature": 0.5}}
        run(tmp_path, write_spec(tmp_path, url, extra_body=extra, **others), ROWS[:1])
        assert bodies[0].keys().isdisjoint({"max_tokens", "seed"})
        sent = {name: bodies[0][name] for name in ("temperature", "max_completion_tokens", "chat_template_kwargs")}
        assert sent == {"temperature": 0.5, "max_completion_tokens": 9, "chat_template_kwargs": {"thinking": None}}
        for more, asked in ((extra, 1), ({}, 2), ({"temperature": 0.7}, 3)):
            run(tmp_path, write_spec(tmp_path, url, extra_body=more, **others), ROWS[:1])
            assert len(bodies) == asked
        assert bodies[1]["max_tokens"] == 1024 and "seed" in bodies[1] and bodies[2]["temperature"] == 0.7


def test_images_of_the_prompt_are_sent_before_the_text(tmp_path):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.png")
    row = {"id": "1", "prompt": "Which colour?", "images": ["a.png"], "chosen": "good", "rejected": "bad"}
    with chat_server(prefers_good) as (url, bodies):
        run(tmp_path, write_spec(tmp_path, url), [row])
    image, text = bodies[0]["messages"][-1]["content"]
    kind, data = image["image_url"]["url"].split(";base64,")
    assert kind == "data:image/png" and base64.b64decode(data) == (tmp_path / "a.png").read_bytes()
    assert "Which colour?" in text["text"]


def test_images_that_cannot_be_read_or_are_too_large_are_named_and_the_others_go_on(tmp_path, capfd):
    for name, side in (("small.png", 20), ("large.png", 60)):
        Image.new("RGB", (side, side), "red").save(tmp_path / name)
    (tmp_path / "text.png").write_text("no image")
    rows = [{**ROWS[0], "id": name, "images": [name]} for name in ("none.png", "large.png", "text.png", "small.png")]
    data, texts, out = write_rows(tmp_path / "pairs.jsonl", rows), tmp_path / "texts.jsonl", tmp_path / "out.json"
    with chat_server(prefers_good) as (url, bodies):
        code, _ = fastrm_here(
            capfd, "eval", write_spec(tmp_path, url), data, "--generations", texts, "--json", out,
            "--max-image-pixels", 1000,
        )  # fmt: skip
        assert code == 65 and len(bodies) == 2
    figures = json.loads(out.read_text())
    assert (figures["preferences"], figures["missing"]) == (1, ["none.png", "large.png", "text.png"])
    assert sorted((line.split("pairs.jsonl:")[1][:15], line.split("(")[-1]) for line in figures["refused"]) == [
        (f"{number}: order [{order}]", f"{code})")
        for number, code in ((1, "IMAGE_MISSING"), (2, "IMAGE_TOO_LARGE"), (3, "IMAGE_FORMAT"))
        for order in ("0, 1", "1, 0")
    ]


def test_an_image_that_changed_is_asked_again(tmp_path):
    row = {"id": "1", "prompt": "Which colour?", "images": ["a.png"], "chosen": "good", "rejected": "bad"}
    with chat_server(prefers_good) as (url, bodies):
        for colour, asked in (("red", 2), (None, 2), ("blue", 4)):
            if colour is not None:
                Image.new("RGB", (30, 20), colour).save(tmp_path / "a.png")
            run(tmp_path, write_spec(tmp_path, url), [row])
            assert len(bodies) == asked


def test_a_question_that_rows_share_is_asked_once(tmp_path):
    rows = [{**ROWS[0], "id": name} for name in "abc"]
    with chat_server(prefers_good) as (url, bodies):
        figures = run(tmp_path, write_spec(tmp_path, url), rows)
    assert len(bodies) == 2 and figures["num_generations"] == 6 and figures["accuracy"] == 1


def test_texts_in_parts_are_joined_and_other_content_is_asked_again(tmp_path):
    parts = [{"type": "text", "text": "<answer>"}, {"type": "text", "text": "1</answer>"}]
    contents = [[{"type": "image_url"}], {"text": "1"}, [1], parts]
    with chat_server(lambda body: contents.pop(0)) as (url, bodies):
        run(tmp_path, write_spec(tmp_path, url, tries=4, order="as_given"), ROWS[:1])
    assert len(bodies) == 4
    assert json.loads((tmp_path / "texts.jsonl").read_text())["text"] == "<answer>1</answer>"


def test_a_writer_that_is_closed_waits_for_no_answer(tmp_path):
    asked, late, free = threading.Semaphore(0), threading.Event(), threading.Event()

    def answer(body):
        asked.release()
        if "good 0" not in text_of(body) and not free.wait(PATIENCE):
            late.set()
        return prefers_good(body)

    with chat_server(answer) as (url, _):
        spec = load_spec(write_spec(tmp_path, url, order="as_given").removeprefix("judge:"))
        data = str(write_rows(tmp_path / "a.jsonl", ROWS))
        records = list(read_in_order(data, None, "auto", require_preferences=True))
        writing = Endpoint(spec.generator, spec.decoding).write(list(make_questions(spec, records)))
        assert next(writing).question.id == "r0"
        assert all(asked.acquire(timeout=PATIENCE) for _ in records)
        writing.close()
        assert not late.is_set()
        free.set()


def test_a_tournament_gives_rewards(tmp_path):
    def longest(body):
        first, second = text_of(body).split("[Response 1]:")[1].split("###### [Response 2]:")
        return f"<answer>{1 if len(first.strip()) > len(second.split('######')[0].strip()) else 2}</answer>"

    row = {"id": "1", "prompt": "?", "responses": ["aa", "aaaa", "a", "aaa"], "preferences": [[1, 0]]}
    with chat_server(longest) as (url, bodies):
        figures = run(tmp_path, write_spec(tmp_path, url, order="round_robin"), [row])
    assert len(bodies) == 4 * 3
    assert figures["rewards"] == [{"id": "1", "rewards": [pytest.approx(wins / 3) for wins in (1, 3, 0, 2)]}]


def test_orders(tmp_path):
    url = "http://127.0.0.1:1/v1"

    data = str(write_rows(tmp_path / "a.jsonl", [{**ROWS[0], "id": str(n)} for n in range(64)]))
    records = list(read_in_order(data, None, "auto", require_preferences=True))
    found = {}
    for order in ("both", "as_given", "random"):
        spec = load_spec(write_spec(tmp_path, url, order=order).removeprefix("judge:"))
        found[order] = [question.order for question in make_questions(spec, records)]
        assert found[order] == [question.order for question in make_questions(spec, records)]
    assert set(found["as_given"]) == {(0, 1)} and found["both"] == [(0, 1), (1, 0)] * 64
    assert 16 < found["random"].count((1, 0)) < 48


def test_a_stop_keeps_the_texts(tmp_path, monkeypatch):
    write = Endpoint.write

    def stopping(self, questions):
        for number, answered in enumerate(write(self, questions)):
            if number == 2:
                raise KeyboardInterrupt
            yield answered

    monkeypatch.setattr(Endpoint, "write", stopping)
    with chat_server(prefers_good) as (url, _):
        with pytest.raises(InterruptedRun, match="keeps the texts so far: run the command again"):
            run(tmp_path, write_spec(tmp_path, url))
        with (tmp_path / "texts.jsonl").open("a") as file:
            file.write('{"id": "r0", "ord')  # as a power failure leaves it
        monkeypatch.undo()
        assert run(tmp_path, write_spec(tmp_path, url))["num_generations"] == 6
    assert all(json.loads(line)["key"] for line in (tmp_path / "texts.jsonl").read_text().splitlines())


@pytest.mark.parametrize(
    "others, said",
    [
        ({"votes": 3}, "more than one at temperature 0 are all the same"),
        ({"order": "twice"}, "order"),
        ({"prompt": "{{ question"}, "prompt: "),
        ({"prompt": "{{ answer }}"}, "prompt: 'answer' is undefined; it has question, first and second"),
        ({"parser": "score"}, "parser: got 'score'; a pairwise judge has one of: r1_reward"),
        ({"extends": "nobody"}, "extends: got 'nobody', wanted a shipped judge: llava_critic"),
        ({"generator": {"model": "m", "url": "localhost:8000"}}, "generator.url: got 'localhost:8000', wanted"),
        ({"generator": {"model": "nowhere/at/all"}}, "generator.model: "),
        ({"generator": {"model": "m", "extra_body": {"a": 1}}}, "extra_body: is sent to a server"),
        ({"extra_body": {"stream": True, "n": 2}}, "extra_body: n, stream: is what the judge itself asks"),
    ],
)
def test_specs_that_cannot_be_are_named(tmp_path, others, said):
    with pytest.raises(ConfigError, match=said):
        run(tmp_path, write_spec(tmp_path, "http://127.0.0.1:1/v1", **others))


def test_files_and_rows_that_cannot_be_used_are_named(tmp_path):
    judge = write_spec(tmp_path, "http://127.0.0.1:1/v1")
    (tmp_path / "texts.jsonl").write_text('{"id": "r0"}\n')
    with pytest.raises(StorageError, match=r'texts.jsonl:1: wanted a line with "key" and "text"'):
        run(tmp_path, judge)
    for line in ({"key": "a", "text": [{"type": "text", "text": "1"}]}, {"key": 1, "text": "1"}):
        (tmp_path / "texts.jsonl").write_text(json.dumps({"key": "a", "text": "1"}) + "\n" + json.dumps(line) + "\n")
        with pytest.raises(StorageError, match=r'texts.jsonl:2: wanted a line with "key" and "text"'):
            run(tmp_path, judge)
    (tmp_path / "texts.jsonl").unlink()
    with pytest.raises(ConfigError, match="r1_reward: it names no generator; add one in a YAML file with extends"):
        run(tmp_path, "judge:r1_reward")


def test_texts_of_options_of_the_command_are_measured_again_with_these_options(tmp_path, capfd):
    data = write_rows(tmp_path / "pairs.jsonl", ROWS)
    given = ["--votes", 3, "--temperature", 1.0, "--max-tokens", 9]
    with chat_server(prefers_good) as (url, bodies):
        asked = ["eval", write_spec(tmp_path, url), data, "--json", tmp_path / "out.json"]
        code, error = fastrm_here(capfd, *asked, *given, "--generations", tmp_path / "texts.jsonl")
    assert code == 0 and len(bodies) == 3 * 6, error
    figures = json.loads((tmp_path / "out.json").read_text())
    code, error = fastrm_here(capfd, *asked, *given, "--from", tmp_path / "texts.jsonl")
    assert code == 0 and json.loads((tmp_path / "out.json").read_text()) == figures, error
    code, error = fastrm_here(capfd, *asked, *given[:4], "--from", tmp_path / "texts.jsonl")
    assert code == 65 and "not asked by this SPEC" in error
    # Without a generator votes alone say something of kept texts.
    plain = ["eval", "judge:r1_reward", data, "--from", tmp_path / "texts.jsonl"]
    code, error = fastrm_here(capfd, *plain, *given[:4])
    assert code == 0, error
    code, error = fastrm_here(capfd, *plain, *given)
    assert code == 64 and "--max-tokens: of no use for texts of a SPEC that names no generator" in error


@pytest.mark.parametrize("size", [99, 100])
def test_an_image_of_any_size_that_changed_is_another_question(tmp_path, monkeypatch, size):
    monkeypatch.setattr(MediaLimits, "__init__", partialmethod(MediaLimits.__init__, max_image_bytes=99))
    image, keys = ImageRef(path=str(tmp_path / "a.png")), set()
    for content in (b"a" * size, b"b" * size):
        (tmp_path / "a.png").write_bytes(content)
        keys.add(JudgeQuestion("1", (0, 1), "", "", (image,), "", "a.jsonl:1").key)
    assert len(keys) == 2


def test_the_seed_is_part_of_the_key_only_where_something_is_drawn(tmp_path):
    data = str(write_rows(tmp_path / "a.jsonl", ROWS))
    records = list(read_in_order(data, None, "auto", require_preferences=True))

    def keys(seed, temperature, max_tokens=9):
        decoding = {"seed": seed, "temperature": temperature, "max_tokens": max_tokens}
        spec = load_spec(write_spec(tmp_path, "http://127.0.0.1:1/v1", decoding=decoding).removeprefix("judge:"))
        return {question.key for question in make_questions(spec, records)}

    assert keys(0, 0.0) == keys(1, 0.0) != keys(0, 0.0, max_tokens=8)
    assert keys(0, 1.0).isdisjoint(keys(1, 1.0) | keys(0, 0.0))


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

"""A judge that writes: what is asked, what is kept, and what becomes of servers that fail."""

import base64
import json
import shutil
import threading
import time
from contextlib import contextmanager, suppress
from functools import partialmethod
from http.server import BaseHTTPRequestHandler

import httpx
import pytest
from PIL import Image

from fastrm.data.record import ImageRef
from fastrm.errors import ConfigError, DataError, InterruptedRun, ServerError, StorageError
from fastrm.evaluate.options import JudgeTexts, RowOptions
from fastrm.evaluate.reading import read_in_order
from fastrm.judge.command import JudgeOptions, evaluate_judge
from fastrm.judge.endpoint import Endpoint
from fastrm.judge.generations import read_generations
from fastrm.judge.questions import JudgeQuestion, make_questions
from fastrm.limits import MediaLimits
from fastrm.prompts.spec import load_spec
from fastrm.rl.client import retry_after
from tests.helpers.reward_server import answering
from tests.helpers.runs import fastrm_here, write_rows
from tests.helpers.waiting import PATIENCE

pytest.importorskip("httpx")
ROWS = [{"id": f"r{n}", "prompt": f"{n}?", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(3)]
HANG_UP, HALF, TRICKLE = "hang up", "half", "trickle"


@contextmanager
def chat_server(answer, failures=(), cut=(), usage=None, ends=()):
    """Serve /v1/chat/completions; yield (URL, the bodies that came).

    Args:
        answer: the text for a body; a number: the status of a refusal.
        failures: in place of the first answers: a status with headers, HANG_UP, HALF or TRICKLE.
        cut: numbers of the answers, from 0, that the server says it has cut.
        ends: finish reasons of the first answers.
        usage: what each answer says of its tokens.
    """
    waiting, bodies, lock = list(failures), [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(bodies)
                bodies.append({**body, "path": self.path, "key": self.headers.get("Authorization")})
                failure = waiting.pop(0) if waiting else None
            if failure == HANG_UP:
                self.connection.close()
                return
            status, headers = failure if isinstance(failure, tuple) else (200, {})
            said = answer(body)
            status = said if isinstance(said, int) else status
            choice = {"message": {"content": said}, "finish_reason": "length" if number in cut else "stop"}
            choice |= {"finish_reason": ends[number]} if number < len(ends) else {}
            text = json.dumps({"choices": [choice], "usage": usage}).encode()
            text = text[:20] if failure == HALF else text
            self.send_response(status)
            length = len(text) + (100 if failure == TRICKLE else 0)
            for name, value in {**headers, "Content-Length": str(length)}.items():
                self.send_header(name, value)
            self.end_headers()
            if failure == TRICKLE:
                trickle(self.wfile)
            self.wfile.write(text)

    with answering(Handler) as url:
        yield f"{url}/v1", bodies


def trickle(file):
    """Write spaces, which may stand before JSON, one by one until nobody reads them, or for a long time."""
    with suppress(OSError):
        for _ in range(100):
            file.write(b" ")
            file.flush()
            time.sleep(0.02)


def text_of(body):
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def prefers_good(body):
    """Prefer the response that begins with good; of the third row what is shown first."""
    text = text_of(body)
    first = text.index("good") < text.index("bad") or "good 2" in text
    return f"<think>...</think><answer>{1 if first else 2}</answer>"


def write_spec(folder, url, **others):
    generator = {"model": "judge", "url": url, "tries": others.pop("tries", 3), "batch": others.pop("batch", 4)}
    generator |= {name: others.pop(name) for name in ("timeout", "extra_body") if name in others}
    spec = folder / "spec.yaml"
    spec.write_text(json.dumps({"extends": "r1_reward", "generator": generator, **others}))
    return f"judge:{spec}"


def run(folder, judge, rows=ROWS):
    data = str(write_rows(folder / "pairs.jsonl", rows))
    out, store = folder / "out.json", folder / "texts.jsonl"
    evaluate_judge([judge], data, JudgeOptions(RowOptions(), JudgeTexts(generations=store), json_out=out))
    return json.loads(out.read_text())


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """The seconds between tries, none of which is waited for."""
    found = []
    monkeypatch.setattr(Endpoint, "_stops_within", lambda self, some: found.append(some) or self._stopped.is_set())
    return found


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


def test_servers_that_fail_for_a_while_are_asked_again(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    away = [(status, {}) for status in (408, 425, 429, 500, 502, 503, 504, 520, 524, 529)]
    failures = [*away, HANG_UP, HALF, (200, {"Content-Encoding": "gzip"})]  # the last one is no gzip
    with chat_server(prefers_good, failures) as (url, bodies):
        assert run(tmp_path, write_spec(tmp_path, url, batch=1, tries=14))["num_generations"] == 6
        assert len(bodies) == 6 + len(failures) and {body["key"] for body in bodies} == {"Bearer secret"}


def test_waits_grow_and_are_no_shorter_than_the_server_says(tmp_path, waits):
    named = ["", "1", "7", "0.5", "60", "600", "3.5", "soon", "-3", ""]
    failures = [(429, {"Retry-After": text} if text else {}) for text in named]
    with chat_server(prefers_good, failures) as (url, _):
        run(tmp_path, write_spec(tmp_path, url, batch=1, tries=11, order="as_given"), ROWS[:1])
    assert waits == [0.5, 1.0, 7.0, 4.0, 60.0, 600.0, 30.0, 30.0, 30.0, 30.0]


@pytest.mark.parametrize(
    ("named", "seconds"),
    [
        ({}, 0), ({"Retry-After": "12"}, 12), ({"Retry-After": "1.5"}, 1.5), ({"Retry-After": "-1"}, 0),
        ({"Retry-After": "nan"}, 0), ({"Retry-After": "1e9"}, 0), ({"Retry-After": "tomorrow"}, 0),
        ({"Retry-After": "Wed, 21 Oct 2026 07:28:30 GMT", "Date": "Wed, 21 Oct 2026 07:28:00 GMT"}, 30),
        ({"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT", "Date": "Wed, 21 Oct 2026 07:28:30 GMT"}, 0),
        ({"Retry-After": "Fri, 01 Jan 1999 00:00:00 GMT"}, 0),
    ],
    ids=str,
)  # fmt: skip
def test_retry_after_is_a_number_or_a_date(named, seconds):
    assert retry_after(httpx.Response(429, headers=named)) == seconds


@pytest.mark.parametrize("named", ["7200", "Tue, 31 Dec 2199 00:00:00 GMT"])
def test_a_server_that_wants_to_be_left_alone_for_long_is_named_with_the_time(tmp_path, named, waits):
    with chat_server(prefers_good, [(429, {"Retry-After": named})]) as (url, bodies):
        said = r"pairs.jsonl:1: HTTP 429: .* to be asked again in [0-9,]{5,} s, and up to 600 s are waited for: run the"
        with pytest.raises(ServerError, match=said) as raised:
            run(tmp_path, write_spec(tmp_path, url, batch=1))
        assert (named != "7200" or "in 7,200 s" in str(raised.value)) and len(bodies) == 1 and waits == []


def test_an_answer_that_trickles_is_not_waited_for(tmp_path):
    with chat_server(prefers_good, [TRICKLE, TRICKLE]) as (url, bodies):
        spec = write_spec(tmp_path, url, batch=1, tries=2, timeout=0.1, order="as_given")
        with pytest.raises(ServerError, match=r"no answer in 2 tries, at last "):
            run(tmp_path, spec, ROWS[:1])
        assert len(bodies) == 2


@pytest.mark.parametrize("reason", ["abort", "error", None, "insufficient_system_resource"])
def test_an_answer_that_broke_off_is_asked_again(tmp_path, reason):
    with chat_server(prefers_good, ends=[reason]) as (url, bodies):
        assert run(tmp_path, write_spec(tmp_path, url, batch=1))["num_generations"] == 6
        assert len(bodies) == 7
    with chat_server(prefers_good, ends=[reason] * 3) as (url, bodies):
        said = rf"no answer in 3 tries, at last an answer that broke off, with finish_reason {reason!r}: '<think>"
        with pytest.raises(ServerError, match=said):
            run(tmp_path, write_spec(tmp_path, url, batch=1))


@pytest.mark.parametrize(
    ("reason", "is_cut"),
    [
        ("stop", False), ("eos", False), ("eos_token", False), ("stop_sequence", False),
        ("length", True), ("model_length", True), ("repetition", True),
    ],
)  # fmt: skip
def test_a_whole_text_is_told_from_one_that_was_cut(tmp_path, reason, is_cut):
    with chat_server(prefers_good, ends=[reason]) as (url, bodies):
        run(tmp_path, write_spec(tmp_path, url, order="as_given"), ROWS[:1])
        assert len(bodies) == 1
    assert json.loads((tmp_path / "texts.jsonl").read_text()).get("cut", False) is is_cut


@pytest.mark.parametrize("reason", ["content_filter", "tool_calls", "function_call"])
def test_a_text_that_a_filter_took_away_is_named_and_counted(tmp_path, reason):
    with chat_server(prefers_good, ends=[reason]) as (url, bodies):
        with pytest.raises(DataError, match=r"partial result over 3 preferences: 1 lines or rows could not be used"):
            run(tmp_path, write_spec(tmp_path, url, batch=1))
        assert len(bodies) == 6
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["num_generations"] == 5 and figures["preferences_in_one_order"] == 1
    [refused] = figures["refused"]
    assert "pairs.jsonl:1: order [0, 1]: http://" in refused and f"ended with '{reason}'" in refused


def test_what_was_written_before_a_server_failed_is_kept(tmp_path):
    def answer(body):
        if "good 1" in text_of(body):
            raise BrokenPipeError  # the connection is closed without an answer
        return prefers_good(body)

    with chat_server(answer) as (url, bodies):
        with pytest.raises(ServerError, match=r"pairs.jsonl:2: no answer in 3 tries, at last .*Run the command again"):
            run(tmp_path, write_spec(tmp_path, url, batch=1))
        assert len((tmp_path / "texts.jsonl").read_text().splitlines()) == 2 and not (tmp_path / "out.json").exists()
    with chat_server(prefers_good) as (other, bodies):
        spec = write_spec(tmp_path, url, batch=1)
        (tmp_path / "spec.yaml").write_text((tmp_path / "spec.yaml").read_text().replace(url, other))
        assert run(tmp_path, spec)["num_generations"] == 6
        assert len(bodies) == 6  # another server may hold another model


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_question_that_the_server_refuses_is_named_and_counted_and_the_others_go_on(tmp_path, status):
    with chat_server(lambda body: status if "good 1" in text_of(body) else prefers_good(body)) as (url, bodies):
        judge = write_spec(tmp_path, url)
        with pytest.raises(DataError, match=r"over 2 preferences: 1 preferences were not judged: r1; 2 lines or rows"):
            run(tmp_path, judge)
        assert len(bodies) == 6
    figures = json.loads((tmp_path / "out.json").read_text())
    assert (figures["num_generations"], figures["missing"]) == (4, ["r1"])
    assert sorted(line.split("pairs.jsonl:")[1].split(": http")[0] for line in figures["refused"]) == [
        "2: order [0, 1]", "2: order [1, 0]",
    ]  # fmt: skip
    assert all(f"HTTP {status}: " in line for line in figures["refused"])
    assert len((tmp_path / "texts.jsonl").read_text().splitlines()) == 4


def test_what_was_refused_is_asked_again_by_the_next_command(tmp_path):
    refuses = [True]
    with chat_server(lambda body: 400 if refuses[0] and "good 1" in text_of(body) else prefers_good(body)) as (url, _):
        judge = write_spec(tmp_path, url)
        with pytest.raises(DataError, match=r"not judged: r1; 2 lines or rows could not be used"):
            run(tmp_path, judge)
        refuses[0] = False
        assert run(tmp_path, judge)["num_generations"] == 6
    with chat_server(lambda body: 400) as (url, _):
        judge = write_spec(tmp_path, url)
        with pytest.raises(DataError, match=r"no preference was judged; .*pairs.jsonl:\d: order .*HTTP 400"):
            run(tmp_path, judge)


@pytest.mark.parametrize("status", [401, 402, 403, 404, 405])
def test_a_server_that_refuses_every_request_ends_the_command(tmp_path, status):
    with chat_server(prefers_good, [(status, {})]) as (url, bodies):
        with pytest.raises(ServerError, match=rf"pairs.jsonl:1: HTTP {status}: .*correct the SPEC or its key"):
            run(tmp_path, write_spec(tmp_path, url, batch=1))
        assert len(bodies) == 1


def test_a_bracket_of_which_a_question_is_refused_ends_without_that_row(tmp_path):
    rows = [{"id": name, "prompt": "?", "responses": [f"{name} {number}" for number in range(4)],
             "preferences": [[0, 1]]} for name in ("bad", "good")]  # fmt: skip
    with chat_server(lambda body: 400 if "bad 0" in text_of(body) else "<answer>1</answer>") as (url, bodies):
        with pytest.raises(DataError, match=r"1 preferences were not judged: bad; 2 lines or rows could not be used"):
            run(tmp_path, write_spec(tmp_path, url, order="bracket"), rows)
        assert len(bodies) == 4 + 6
    figures = json.loads((tmp_path / "out.json").read_text())
    assert [row["id"] for row in figures["rewards"]] == ["good"] and figures["num_generations"] == 2 + 6


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

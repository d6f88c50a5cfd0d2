"""What becomes of a judge's questions when its server fails, is away, or refuses them."""

import json

import httpx
import pytest

from fastrm.errors import DataError, ServerError
from fastrm.rl.client import retry_after
from tests.helpers.chat_server import (
    HALF,
    HANG_UP,
    ROWS,
    TRICKLE,
    chat_server,
    prefers_good,
    run,
    text_of,
    write_spec,
)

pytestmark = pytest.mark.usefixtures("waits")


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


@pytest.mark.parametrize("batch", [1, 4])
def test_a_question_at_which_the_server_fails_each_time_does_not_end_the_others(tmp_path, batch):
    # One at a time, both orders of r1 fail with nothing answered between.
    with chat_server(lambda body: 500 if "good 1" in text_of(body) else prefers_good(body)) as (url, bodies):
        with pytest.raises(DataError, match=r"not judged: r1"):
            run(tmp_path, write_spec(tmp_path, url, batch=batch))
        assert len([body for body in bodies if "good 1" in text_of(body)]) == 2 * 3
    figures = json.loads((tmp_path / "out.json").read_text())
    assert (figures["missing"], figures["num_generations"]) == (["r1"], 4)
    assert len(figures["refused"]) == 2
    assert all("no answer in 3 tries, at last HTTP 500" in one for one in figures["refused"])


@pytest.mark.parametrize("batch", [1, 2])
def test_a_server_that_fails_from_some_time_on_ends_the_command(tmp_path, batch):
    answered, rows = [], [{**ROWS[0], "id": f"r{n}", "prompt": f"{n}?"} for n in range(8)]

    def answer(body):
        answered.append(body)
        return prefers_good(body) if len(answered) == 1 else 503

    with chat_server(answer) as (url, bodies):
        with pytest.raises(ServerError, match=r"no answer in 3 tries, at last HTTP 503.*Run the command again"):
            run(tmp_path, write_spec(tmp_path, url, batch=batch), rows)
        # Of 46: both orders of as many rows as are asked about at a time, and of one more.
        assert len(bodies) <= 1 + 3 * 2 * (batch + 1), "the rest is not asked"
    assert len((tmp_path / "texts.jsonl").read_text().splitlines()) == 1

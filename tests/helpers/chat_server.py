"""A stand-in for a server of /v1/chat/completions, whose answers and failures a test chooses, and what asks it."""

import json
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler

from fastrm.evaluate.options import JudgeTexts, RowOptions
from fastrm.judge.command import JudgeOptions, evaluate_judge
from tests.helpers.reward_server import answering
from tests.helpers.runs import write_rows

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

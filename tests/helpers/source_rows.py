"""Rows in every layout, and fixtures that write rows and read them back."""

import base64
import io
import json

import pytest
from PIL import Image

from fastrm.data.quarantine import Quarantine
from fastrm.data.record import Preference
from fastrm.data.sources import read_source
from tests.helpers.project import PROJECT

SHARED = PROJECT.parent / "shared" / "data"


def png(color="red"):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), color).save(buffer, "PNG")
    return buffer.getvalue()


def data_uri(data):
    return "data:image/png;base64," + base64.b64encode(data).decode()


def read(path, **options):
    """Records and quarantined (origin, code) of a source."""
    refused = []

    class Listing(Quarantine):
        def add(self, **row):
            super().add(**row)
            refused.append((row["origin"], row["code"], row["message"]))

    return list(read_source(path, quarantine=Listing(None), **options)), refused


@pytest.fixture
def read_json_rows(tmp_path):
    """Writes rows to rows.jsonl and reads them back."""

    def write_and_read(*rows, **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return read(path, **options)

    return write_and_read


@pytest.fixture
def read_one(read_json_rows):
    """The record of a single good row."""

    def one(row, **options):
        records, refused = read_json_rows(row, **options)
        assert refused == []
        return records[0]

    return one


@pytest.fixture
def refusal(read_json_rows):
    """The code and message of a single bad row."""

    def one(row, **options):
        records, refused = read_json_rows(row, **options)
        assert records == []
        assert len(refused) == 1
        return refused[0][1:]

    return one


def shape(record, response):
    """A response's conversation as (role, parts), with media by the end of their path or their bytes."""

    def part(p):
        return p if isinstance(p, str) else (p.noun, p.member or p.data or p.path.rsplit("/", 1)[-1])

    return [(m.role, *map(part, m.parts)) for m in record.responses[response].messages]


def turns(*texts, roles=("user", "assistant"), keys=("role", "content")):
    return [{keys[0]: roles[i % 2], keys[1]: text} for i, text in enumerate(texts)]


def human_turns(*texts):
    return turns(*texts, roles=("human", "gpt"), keys=("from", "value"))


def bot_turns(*texts):
    return turns(*texts, roles=("human", "bot"), keys=("from", "value"))


IMAGE = ("image", "a.png")
PAIR = (Preference(0, 1),)
FLAT = {"prompt": "What?", "chosen": "yes", "rejected": "no"}
SHAREGPT = {
    "conversations": human_turns("<image>What?"),
    "chosen": {"from": "gpt", "value": "yes"},
    "rejected": {"from": "gpt", "value": "no"},
    "images": ["a.png"],
}
SWIFT = {"messages": turns("<image>What?", "yes"), "rejected_response": "no", "images": ["a.png"]}
IXC = {
    "id": 0,
    "conversations_a": bot_turns("What?", "yes"),
    "conversations_b": bot_turns("What?", "no"),
    "turn": 1,
    "language": "English",
    "model_a": "gpt-4o-2024-08-06",
    "model_b": "internlm-xcomposer2d5-7b",
}
GROUP = {"prompt": "What?", "responses": ["a", "b", "c"], "preferences": [[0, 1], [2, 0, 0.5]]}
RATED = {"prompt": "What?", "responses": [{"text": "a", "score": 1}, {"text": "b", "score": 2.5}]}
TEXT_PART = {"type": "text", "text": "What?"}

# Each layout's ways to write: image a.png, then "What?"; "yes" is preferred to "no".
SAME_PAIR = {
    "flat": {**FLAT, "image": "a.png"},
    "flat, question and list": {"question": "What?", "images": ["a.png"], "chosen": "yes", "rejected": "no"},
    "flat, placeholder": {**FLAT, "prompt": "<image>What?", "image": "a.png", "extra": {"x": [1]}},
    "trl, strings in messages": {
        "prompt": turns("What?"),
        "chosen": turns("yes", roles=("assistant",)),
        "rejected": turns("no", roles=("assistant",)),
        "images": ["a.png"],
    },
    "trl, content parts": {
        "prompt": [{"role": "user", "content": [{"type": "image"}, TEXT_PART]}],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "yes"}]}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "no"}]}],
        "images": ["a.png"],
    },
    "trl, implicit prompt": {
        "chosen": turns("What?", "yes"),
        "rejected": turns("What?", "no"),
        "image": "a.png",
    },
    "trl, prompt text and whole conversations": {
        "prompt": "What?",
        "chosen": turns("What?", "yes"),
        "rejected": turns("What?", "no"),
        "messages": turns("What?", "yes"),
        "image": "a.png",
    },
    "trl, prompt text and a turn": {
        "prompt": "What?",
        "chosen": turns("yes", roles=("assistant",)),
        "rejected": turns("no", roles=("assistant",)),
        "image": "a.png",
    },
    "llamafactory sharegpt": SHAREGPT,
    "llamafactory openai": {
        "messages": turns("<image>What?"),
        "chosen": {"role": "assistant", "content": "yes"},
        "rejected": {"role": "assistant", "content": "no"},
        "images": ["a.png"],
    },
    "llamafactory alpaca": {"instruction": "<image>What?", "input": "", **FLAT, "images": ["a.png"]},
    "llamafactory v1": {
        "chosen_messages": [
            {
                "role": "user",
                "content": [{"type": "image_url", "value": "a.png"}, {"type": "text", "value": "What?"}],
            },
            {"role": "assistant", "content": [{"type": "text", "value": "yes"}], "loss_weight": 1.0},
        ],
        "rejected_messages": [
            {
                "role": "user",
                "content": [{"type": "image_url", "value": "a.png"}, {"type": "text", "value": "What?"}],
            },
            {"role": "assistant", "content": [{"type": "text", "value": "no"}], "loss_weight": 1.0},
        ],
    },
    "swift": SWIFT,
    "swift, list of messages": {**SWIFT, "rejected_response": turns("no", roles=("assistant",))},
    "swift, rejected_messages": {
        "messages": turns("<image>What?", "yes"),
        "images": "a.png",
        "rejected_messages": turns("<image>What?", "no"),
        "rejected_images": ["a.png"],
    },
    "swift, old columns": {
        "query": "<image>What?",
        "response": "yes",
        "rejected_response": "no",
        "image": "a.png",
    },
    "swift, conversations": {
        "conversations": human_turns("<image>What?", "yes"),
        "rejected_response": "no",
        "images": [{"bytes": None, "path": "a.png"}],
    },
    "ixc": {**IXC, "image": "a.png"},
    "ixc, list and placeholder": {
        "conversations_a": bot_turns("<ImageHere>What?", "yes"),
        "conversations_b": bot_turns("<ImageHere>What?", "no"),
        "image": ["a.png"],
    },
    "groups": {"prompt": "What?", "images": ["a.png"], "responses": ["yes", "no"], "preferences": [[0, 1]]},
    "groups, several turns": {
        "messages": turns("<image>What?"),
        "images": ["a.png"],
        "responses": ["yes", "no"],
        "scores": [2, 1],
    },
    "groups, turns as responses": {
        "messages": turns("<image>What?"),
        "images": ["a.png"],
        "responses": [turns("yes", roles=("assistant",)), {"role": "assistant", "content": "no"}],
        "preferences": [[0, 1]],
    },
    "rated, several turns": {
        "messages": turns("What?"),
        "image": "a.png",
        "responses": [{"text": "yes", "score": 1}, {"text": "no", "score": 0.5}],
    },
    "groups, messages": {
        "prompt": turns("<image>What?"),
        "images": ["a.png"],
        "responses": ["yes", "no"],
        "preferences": [[0, 1]],
    },
    "rated": {
        "prompt": "What?",
        "image": "a.png",
        "responses": [{"caption": "yes", "score": 2}, {"caption": "no", "score": 1}],
    },
}

"""Groups of rows that others wrote, from the data beside the project."""

import base64
import json

import pytest

from tests.helpers.project import PROJECT

DATA = PROJECT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs the folder shared/data beside the project")


def pandalm(count):
    """Instructions with the answers of two language models."""
    rows = json.loads((DATA / "pandalm" / "testset-v1.json").read_text())[:count]
    return [
        {
            "prompt": f"{row['instruction']}\n{row['input']}",
            "responses": [row["response1"], row["response2"], row["instruction"], ""],
        }
        for row in rows
    ]


def captions(count):
    """Cartoons with captions that people wrote, and the same with the images as data URIs."""
    lines = (DATA / "caption_contest" / "rated_lists.jsonl").read_text().splitlines()
    groups, sent = [], []
    for row in map(json.loads, lines[:count]):
        path = DATA / "caption_contest" / row["image"]
        group = {"prompt": row["prompt"], "responses": [response["caption"] for response in row["responses"][:8]]}
        groups.append({**group, "images": [str(path)]})
        uri = "data:image/jpeg;base64," + base64.b64encode(path.read_bytes()).decode()
        sent.append({**group, "images": [uri]})
    return groups, sent

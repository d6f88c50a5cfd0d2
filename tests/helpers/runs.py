"""Small runs through the command line's own entry, on a model that trains in a second."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers.project import PROJECT
from tests.helpers.waiting import PATIENCE

TINY = {
    "run": {"seed": 0, "max_steps": 6, "log_every": 1},
    "data": {
        "train": [],
        "max_tokens_per_group": 2048,
        "min_pixels": 784,
        "max_pixels": 3136,
        "num_workers": 0,
    },
    "model": {
        "init": {
            "model_type": "qwen2_5_vl",
            "text_config": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "max_position_embeddings": 4096,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
            },
            "vision_config": {
                "depth": 1,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 2,
                "out_hidden_size": 32,
                "fullatt_block_indexes": [0],
            },
        },
        "tokenizer": {"train_vocab_size": 300},
    },
    "optim": {"lr": 1e-3, "batch_pairs": 8, "tokens_per_pack": 2048},
    "precision": {"dtype": "fp32"},
}

# For model.init: a text model that is smaller than the one of TINY.
TEXT_MODEL = {
    "model_type": "qwen2", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip


def tiny_config(folder: Path, train: Path | str, eval: Path | str | None = None, **sections) -> Path:
    """Write a configuration; `sections` update those of TINY."""
    tree = json.loads(json.dumps(TINY))
    tree["run"]["dir"] = str(folder / "run")
    tree["data"]["train"] = [{"path": str(train)}]
    if eval is not None:
        tree["data"]["eval"] = [{"path": str(eval)}]
    for name, values in sections.items():
        tree.setdefault(name, {}).update(values)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def write_rows(path: Path, rows: list) -> Path:
    """JSON Lines; strings are written as they are."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def text_rows(count: int) -> list[dict]:
    return [
        {"id": f"t{n}", "prompt": f"Is {n} even?", "chosen": "yes it is" if n % 2 == 0 else "no", "rejected": "maybe"}
        for n in range(count)
    ]


def colour_rows(folder: Path, count: int = 48) -> Path:
    """Groups about one-coloured images of several shapes, from two sources, half of them with N = 3."""
    from PIL import Image

    colours = ["red", "green", "blue", "yellow"]
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for n in range(count):
        colour, other, third = (colours[(n + k) % 4] for k in range(3))
        Image.new("RGB", (40 + 9 * (n % 5), 40 + 7 * (n % 3)), colour).save(folder / "images" / f"{n}.png")
        rows.append(
            {
                "id": f"c{n}",
                "source": "three" if n % 2 else "two",
                "prompt": f"Which colour has picture {n}?",
                "images": [f"images/{n}.png"],
                "responses": [colour, other, third] if n % 2 else [other, colour],
                "preferences": [[0, 1], [0, 2]] if n % 2 else [[1, 0]],
            }
        )
    return write_rows(folder / "colours.jsonl", rows)


def documented_commands(page: str) -> list[str]:
    """The lines `$ ...` in ```console blocks of a page in docs/, in order."""
    text = (PROJECT / "docs" / page).read_text()
    blocks = re.findall(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [line.removeprefix("$ ") for block in blocks for line in block.splitlines() if line.startswith("$ ")]


def fastrm(*arguments, **kwargs) -> subprocess.CompletedProcess:
    """The real command in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fastrm.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=PATIENCE, **kwargs)


def fastrm_here(capfd, *arguments) -> tuple[int, str]:
    """Exit code and standard error of the command in this process, where something may have been replaced.

    Args:
        capfd: pytest's fixture.
    """
    from fastrm.cli import main

    before, sys.argv = sys.argv, ["fastrm", *map(str, arguments)]
    try:
        main()
    except SystemExit as leave:
        return leave.code, capfd.readouterr().err
    finally:
        sys.argv = before
    raise AssertionError("the command did not leave")


def run(config: Path, *overrides: str, resume: str = "no") -> dict:
    """Train in this process; the summary."""
    from fastrm.config import load_config
    from fastrm.train.loop import train

    return train(load_config(config, overrides), resume)


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    return colour_rows(tmp_path_factory.mktemp("colours"))

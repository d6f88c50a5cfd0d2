"""Every command on a terminal of 80 columns, on a dumb one, and in a file: all of it can be read.

No row wraps, no number is cut, nothing that a wide terminal shows is missing on a narrow one, no progress is left
behind, and no escape sequence or line-drawing character goes where it cannot be shown.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest

from fastrm.evaluate.benchmarks.benchmark import load_benchmark
from tests.helpers import benchmark_files as published
from tests.helpers.ablation_grids import write_grid
from tests.helpers.runs import colour_rows, text_rows, tiny_config, write_rows
from tests.helpers.terminals import Terminals, screen
from tests.helpers.waiting import PATIENCE

BENCHMARKS = {
    "multimodal_rewardbench": ("data/all_data.json", published.write_json, published.multimodal_rows),
    "rewardbench": ("data/filtered-00000-of-00001.parquet", published.write_parquet, published.rewardbench_rows),
    "rewardbench2": ("data/test-00000-of-00001.parquet", published.write_parquet, published.rewardbench2_rows),
    "rm_bench": ("total_dataset.json", published.write_json, published.rm_bench_rows),
}
LOST = {"prompt": "Which?", "images": ["lost/1.png"], "chosen": "a", "rejected": "b", "extra_key_not_read": 3}
# What a line of progress consists of, and how rich ends what it cuts.
REMAINS = re.compile("[━…]|ETA ")
ONE_PATH = re.compile(r"\s*(- )?(\w+: )?\S+")
DRAWN = re.compile("[\u2500-\u259f]")
SHORT = 20  # columns that a text in a table has at least


class World:
    """A folder with data, configurations and a small trained model, and the terminals that commands run on."""

    def __init__(self, folder: Path):
        self.folder, self.terminals = folder, Terminals()
        (folder / "held_out").mkdir()
        self.rows, held_out = colour_rows(folder, 24), colour_rows(folder / "held_out", 8)
        self.bad = write_rows(folder / "bad.jsonl", [*text_rows(16), LOST, '{"broken'])
        self.config = tiny_config(folder, self.rows, held_out, run={"max_steps": 4, "eval_every": 2})
        (folder / "second").mkdir()
        self.second = tiny_config(folder / "second", self.bad, held_out, run={"max_steps": 4})
        self.trained = self.terminals.show(["train", self.config])
        self.model = folder / "run" / "model"
        (folder / "grid").mkdir()
        self.grid = write_grid(folder / "grid", seeds=[0, 1])
        for name, (file, write, rows) in BENCHMARKS.items():
            write(folder / name / file, rows())
            rewards = [list(range(row.num_rewards)) for row in load_benchmark(name, str(folder / name)).rows]
            write_rows(folder / name / "scores.jsonl", [{"rewards": row} for row in rewards])

    def command(self, line: str) -> list[str]:
        """Return the words of a command, its places in braces filled in."""
        return [word.format(**vars(self)) for word in line.split()]


@pytest.fixture(scope="module")
def world():
    """A world in a folder with a short name: how tables break must not depend on how often pytest has run here."""
    with tempfile.TemporaryDirectory(prefix="fastrm-") as folder:
        found = World(Path(folder))
        yield found
        found.terminals.close()


def assert_readable(shown, width):
    # The last line of an error is for programs: one line of JSON, whatever its length.
    lines = str(shown).partition('{"exit_code"')[0].splitlines()
    assert not REMAINS.search("\n".join(lines)), shown
    # A path that is longer than a line stays whole, so that it can be copied; in YAML it stands behind its key.
    broken = [line for line in shown.wrapped if line in lines and not ONE_PATH.fullmatch(line)]
    assert not broken, f"{broken}\n{shown}"
    assert max(map(len, shown.lines)) <= width


def words_of(shown):
    """Numbers and short words, which nothing breaks; without lines of times and speeds, and the JSON for programs."""
    text = str(shown).partition('{"exit_code"')[0]
    text = "\n".join(line for line in text.splitlines() if not re.search(r"\[[\d,]+ s[,\]]", line))
    return Counter(word for word in DRAWN.sub(" ", re.sub("--+", " ", text)).split() if len(word) <= SHORT)


# Exit codes of commands that take a fraction of a second.
QUICK = {
    "": 64,
    "train --help": 0,
    "eval --help": 0,
    "data": 64,
    "data sets": 0,
    "data check {bad}": 65,
    "ablate {grid} --dry-run": 0,
    "train {config} optim.lrr=1": 64,
    "train {folder}/a-configuration-with-a-long-name-that-nobody-has-written.yaml": 64,
    "score {model} {rows} --uot rewards.jsonl": 64,
    "eval {folder} {rows}": 64,
    "eval {model} {folder}/a-file-of-preferences-that-nobody-has-written.jsonl": 65,
    **{f"eval bench:{name} --data {{folder}}/{name} --scores {{folder}}/{name}/scores.jsonl": 0 for name in BENCHMARKS},
}
# What others, which train, load models or predict a whole run, must show in the end.
LONG = {
    "plan configs/quickstart.yaml --gpus 16 --gpu h100": ("days an", "Communication, ZeRO-2"),
    "train {config} --dry-run": ("One step of 8 preferences (estimate)", "its inputs are here."),
    "train {config} run.max_steps=6 --resume auto": ("resumed from", "Training done"),
    "data prepare {second} --workers 1": ("refused: {bad}:17: image", "rows refused, BAD_JSON"),
    "data check {bad} {rows} --max-refused 50% --model {model}": ("rejected: ",),
    "train {config} --resume {folder}/run/checkpoints/step-9": ("not an intact checkpoint: manifest.json is missing",),
    "score {model} {bad} --out {folder}/rewards.jsonl --no-check-exactness": ("18 groups: 16 scored, 2 refused",),
    "eval {model} {model} {model} {bad}": ("Pair accuracy", "3 {model}"),
}


@pytest.mark.parametrize("line", QUICK, ids=lambda line: line or "fastrm")
def test_quick_commands_can_be_read_everywhere(world, line, tmp_path):
    command = world.command(line)
    narrow, dumb = world.terminals.show(command), world.terminals.show(command, TERM="dumb")
    wide, file = world.terminals.show(command, 200), world.terminals.pipe(command, tmp_path / "file")
    assert [shown.code for shown in (narrow, dumb, wide, file)] == [QUICK[line]] * 4, narrow
    for shown, width in ((narrow, 80), (dumb, 80), (wide, 200)):
        assert_readable(shown, width)
    assert "\x1b" not in dumb.raw + file.raw and not DRAWN.search(dumb.raw)
    assert not REMAINS.search(file.raw)
    if line != "data sets":  # which says what it leaves out
        assert not words_of(wide) - words_of(narrow), narrow


@pytest.mark.parametrize("line", LONG)
def test_long_commands_can_be_read_on_a_narrow_terminal(world, line):
    shown = world.terminals.show(world.command(line), NO_COLOR="1")
    assert shown.code == (74 if "step-9" in line else 0), shown
    assert_readable(shown, 80)
    text = " ".join(str(shown).split())
    assert all(part.format(**vars(world)) in text for part in LONG[line]), shown


def test_a_run_can_be_read_and_leaves_no_progress(world):
    shown = world.trained
    assert shown.code == 0, shown
    assert_readable(shown, 80)
    for once in ("reading rows: 32/32", "counting groups: 32/32", "training: 4/4 loss", "Training done"):
        assert sum(line.startswith(once) for line in shown.lines) == 1, shown


def test_a_file_without_the_characters_gets_others(tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "Größe?", "chosen": "√2", "rejected": "no"}])
    command = [sys.executable, "-m", "fastrm.cli", "data", "check", str(rows)]
    done = subprocess.run(command, capture_output=True, env=environment, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode("ascii")
    assert "-----" in text and r"\u221a2" in text


def test_the_screen_does_what_a_terminal_would_do():
    raw = "one\r\ntwo\x1b[31m!\x1b[0m\r\x1b[2K12345678\r\n\x1b[1Anew\r\nend"
    assert screen(raw, 5) == (["one", "12345", "new", "end"], ["12345"])
    assert screen("\x1b[?25labc\x1b[?25h", 3) == (["abc"], [])
    with pytest.raises(AssertionError, match="unknown control"):
        screen("\x1b[5J", 80)

"""Synthetic preference rows in the layouts and shares of the recipe's seven sets, and a configuration for them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fastrm.data.record import Message
from fastrm.data.tokenizer import train_tokenizer
from fastrm.json_files import to_json
from fastrm.storage import whole_file

VOCABULARY, NUM_WORDS, NUM_IMAGES = 32_000, 30_000, 4096
_SPREAD = 0.6  # standard deviation of the logarithm of a length
# Shares of rows that repeat the prompt of the row before, with other responses, or the whole row.
_SAME_PROMPT, _COPY = 0.2, 0.005


@dataclass(frozen=True)
class SetShape:
    """One set: its pairs in the paper's mixture, and the median lengths, in words, that are assumed here."""

    name: str
    pairs: int
    prompt_words: int
    response_words: int
    has_image: bool
    layout: str = "flat"


SETS = (
    SetShape("mmpr-v1.2", 2_000_000, 30, 80, True),
    SetShape("rlaif-v", 83_000, 12, 60, True),
    SetShape("r1-reward-200k", 200_000, 40, 120, True),
    SetShape("tulu-3-if-augmented", 65_000, 120, 200, False, "trl"),
    SetShape("olmo-2-preference-mix", 378_000, 100, 200, False, "trl"),
    SetShape("ultra-hard", 63_000, 100, 180, False, "trl"),
    SetShape("others", 63_000, 120, 200, False, "trl"),
)
ROWS = sum(shape.pairs for shape in SETS)

_CONFIG = """\
run: {{dir: {folder}/run}}
data:
  prepared: {folder}/prepared
  train:
{sources}
  max_tokens_per_group: 32768
  max_pixels: 501760
model:
  init:
    model_type: qwen2_5_vl
    text_config: {{hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 4,
                  num_key_value_heads: 2, rope_parameters: {{rope_type: default, mrope_section: [4, 2, 2]}}}}
    vision_config: {{depth: 2, hidden_size: 64, intermediate_size: 128, num_heads: 4, out_hidden_size: 64}}
  tokenizer: {folder}/tokenizer
"""


def write_sets(folder: Path, num_rows: int) -> Path:
    """Write rows, images, a tokenizer and a configuration, unless they are there; return the path of the last."""
    folder = folder.resolve()
    config = folder / "config.yaml"
    if config.exists():
        return config
    (folder / "images").mkdir(parents=True, exist_ok=True)
    _write_images(folder / "images")
    text = Text(0)
    conversations = [(Message("user", (text.words(60),)),) for _ in range(20_000)]
    train_tokenizer(conversations, VOCABULARY).save_pretrained(folder / "tokenizer")
    for number, shape in enumerate(SETS):
        path = folder / f"{shape.name}.jsonl"
        if not path.exists():
            with whole_file(path) as write:
                for row in _rows(shape, round(num_rows * shape.pairs / ROWS), number + 1):
                    write(to_json(row, ensure_ascii=False) + "\n")
    sources = "\n".join(
        f"    - {{path: {folder}/{shape.name}.jsonl, name: {shape.name}, "
        f"format: {shape.layout}, images: {folder}/images}}"
        for shape in SETS
    )
    config.write_text(_CONFIG.format(folder=folder, sources=sources))
    return config


class Text:
    """Words by Zipf's law, in sentences; the same for the same seed."""

    def __init__(self, seed: int):
        letters = np.random.default_rng(12345)
        alphabet = np.array(list("etaoinshrdlucmfwypvbgk"))
        sizes = letters.integers(2, 10, NUM_WORDS)
        self._words = np.array(["".join(letters.choice(alphabet, size)) for size in sizes], dtype=object)
        weights = 1.0 / (np.arange(NUM_WORDS) + 3.0)
        self._ends = np.cumsum(weights / weights.sum())
        self._rng = np.random.default_rng(seed)

    def words(self, median: int) -> str:
        count = max(2, int(median * np.exp(_SPREAD * self._rng.standard_normal())))
        chosen = self._words[np.searchsorted(self._ends, self._rng.random(count), side="right").clip(max=NUM_WORDS - 1)]
        return " ".join(chosen.tolist()).capitalize() + "."

    def chance(self) -> float:
        return float(self._rng.random())

    def number(self, below: int) -> int:
        return int(self._rng.integers(below))


def _rows(shape: SetShape, count: int, seed: int) -> Iterator[dict]:
    text, row = Text(seed), None
    prompt = image = None
    for number in range(count):
        drawn = text.chance()
        if row is not None and drawn < _COPY:
            yield row | {"id": f"{shape.name}-{number}"}
            continue
        if row is None or drawn > _COPY + _SAME_PROMPT:
            prompt, image = text.words(shape.prompt_words), text.number(NUM_IMAGES)
        answers = text.words(shape.response_words), text.words(shape.response_words)
        row = _row(shape, f"{shape.name}-{number}", prompt, answers, image)
        yield row


def _row(shape: SetShape, name: str, prompt: str, answers: tuple[str, str], image: int) -> dict:
    if shape.layout == "flat":
        row = {"id": name, "question": prompt, "chosen": answers[0], "rejected": answers[1]}
        return row | {"image": f"{image:04d}.png"} if shape.has_image else row
    turns = [[{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}] for answer in answers]
    return {"id": name, "prompt": prompt, "chosen": turns[0], "rejected": turns[1]}


def _write_images(folder: Path) -> None:
    """Write white pictures of photographs' sizes, each made unique by a number in its header."""
    rng = np.random.default_rng(7)
    for number in range(NUM_IMAGES):
        width, height = (int(side) for side in np.exp(rng.uniform(np.log(220), np.log(1400), 2)))
        note = PngInfo()
        note.add_text("number", str(number))
        Image.new("1", (width, height), 1).save(folder / f"{number:04d}.png", pnginfo=note)

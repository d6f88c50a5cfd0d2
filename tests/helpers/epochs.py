"""Groups of any size and number as a preparation counts them, and the costs of real models; no files are needed."""

from fractions import Fraction
from pathlib import Path

import numpy as np

from fastrm.config import Config, ModelConfig
from fastrm.data.balance import CostModel
from fastrm.data.prepared.count import COUNT, IMAGE, Counted
from fastrm.data.prepared.findings import PAIR
from fastrm.data.prepared.report import make_report
from fastrm.data.prepared.select import Selection
from fastrm.data.prepared.units import MEDIUM, PAIRS, RECORD, REFUSED, TEXT, RecordTable, Unit
from fastrm.model.architectures import PUBLISHED, find_architecture
from fastrm.train.step_cost import make_cost_model

# A dense model of about 235 billion parameters; FLOPs per token beyond 2^40.
WIDE_235B = {
    "model_type": "qwen2_5_vl",
    "text_config": {
        **PUBLISHED["Qwen2.5-VL-72B-Instruct"].options["text_config"],
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_hidden_layers": 72,
        "num_attention_heads": 128,
        "num_key_value_heads": 16,
    },
    "vision_config": {"hidden_size": 1280, "intermediate_size": 3456, "out_hidden_size": 16384},
}
# Of 0.1 billion parameters: products that wrap without an error.
SMALL = {
    "model_type": "qwen2_5_vl",
    "text_config": {
        **PUBLISHED["Qwen2.5-VL-3B-Instruct"].options["text_config"],
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
    },
    "vision_config": {"hidden_size": 320, "intermediate_size": 640, "num_heads": 4, "out_hidden_size": 768},
}
ARCHITECTURES = {
    "0.1B": SMALL,
    "3B": PUBLISHED["Qwen2.5-VL-3B-Instruct"].options,
    "7B": PUBLISHED["Qwen2.5-VL-7B-Instruct"].options,
    "72B": PUBLISHED["Qwen2.5-VL-72B-Instruct"].options,
    "235B": WIDE_235B,
    "InternVL3-8B": PUBLISHED["InternVL3-8B-hf"].options,
}

# Kinds of groups that take turns: at the limit of 32,768 tokens, with images of 16,384; and a short text.
LONG = {
    "num_tokens": 32_768, "num_preferences": 1_500, "num_attention_pairs": 400_000_000, "num_lead_tokens": 16_400,
    "num_unshared_tokens": 80_000_000, "num_unshared_pairs": 1_100_000_000_000, "num_ties_ignored": 3,
    "num_responses": 16, "num_members": 1, "num_images": 2,
}  # fmt: skip
SHORT = {
    "num_tokens": 700, "num_preferences": 1, "num_attention_pairs": 200_000, "num_lead_tokens": 0,
    "num_unshared_tokens": 1_000, "num_unshared_pairs": 250_250, "num_ties_ignored": 0, "num_responses": 2,
    "num_members": 1, "num_images": 0,
}  # fmt: skip
IMAGE_SIZE = (64, 128, 1)  # rows, columns, frames


class Epoch:
    """Groups of one record each, as the passes of a preparation leave them.

    Args:
        times: of each group, how often the epoch holds it.
    """

    def __init__(self, folder: Path, counted: Counted, times: np.ndarray):
        num_groups = len(times)
        starts, none = np.arange(num_groups + 1), np.zeros(0, dtype=np.int64)
        self.counted = {"train": counted, "eval": counted_of()}
        self.chosen = {
            "train": Selection(np.arange(num_groups), starts, times, np.zeros(num_groups, dtype=bool)),
            "eval": Selection(none, np.zeros(1, dtype=np.int64), none, none.astype(bool)),
        }
        self.table = _table(folder, num_groups)

    def report(self, config: Config, cost: CostModel) -> dict:
        """What a preparation reports of it; the configuration has one source."""
        removed = {"copy_of": np.arange(len(self.table))}
        return make_report(config, self.table, removed, self.chosen, self.counted, cost)


class LongAndShort(Epoch):
    """`num_groups` groups, LONG and SHORT in turn; a LONG one is repeated `times` times."""

    def __init__(self, folder: Path, num_groups: int, times: int):
        self.num_long, self.num_short, self.times = -(-num_groups // 2), num_groups // 2, times
        counts = np.zeros(num_groups, dtype=COUNT)
        counts["selected"] = np.arange(num_groups)
        for kind, first in ((LONG, 0), (SHORT, 1)):
            for name, value in kind.items():
                counts[name][first::2] = value
        images = np.zeros(2 * self.num_long, dtype=IMAGE)
        images["digest"]["low"] = np.arange(len(images)) // 2  # both of a group are the same
        for name, value in zip(("height", "width", "frames"), IMAGE_SIZE, strict=True):
            images[name] = value
        repeated = np.ones(num_groups, dtype=np.int64)
        repeated[::2] = times
        super().__init__(folder, counted_of(counts, images), repeated)

    def total(self, name: str) -> int:
        """The sum of a count over an epoch, in Python's integers."""
        return self.times * self.num_long * LONG[name] + self.num_short * SHORT[name]

    def flops(self, cost: CostModel) -> tuple[Fraction, Fraction]:
        """Of the epoch, with prefix trees and of a pairwise trainer, exactly."""
        picture = Fraction(cost.of_medium(*IMAGE_SIZE))
        shared = unshared = Fraction(0)
        for kind, number in ((LONG, self.times * self.num_long), (SHORT, self.num_short)):
            pictures = kind["num_images"] * picture
            tree = cost.per_token * kind["num_tokens"] + cost.per_attention_pair * kind["num_attention_pairs"]
            rows = cost.per_token * kind["num_unshared_tokens"] + cost.per_attention_pair * kind["num_unshared_pairs"]
            shared += number * (tree + pictures)
            unshared += number * (rows + 2 * kind["num_preferences"] * pictures)
        return shared, unshared


def counted_of(counts=None, images=None) -> Counted:
    """Groups of one record each, of which none was refused; without arguments, no group at all."""
    counts = np.zeros(0, dtype=COUNT) if counts is None else counts
    images = np.zeros(0, dtype=IMAGE) if images is None else images
    return Counted(counts, images, np.arange(len(counts), dtype="<u4"), np.zeros(0, np.uint8), np.zeros(0, "<u4"))


def _table(folder: Path, num_records: int) -> RecordTable:
    (folder / "unit").mkdir(exist_ok=True)
    (folder / "unit" / REFUSED).touch()
    np.save(folder / "unit" / PAIRS, np.zeros(0, dtype=PAIR))
    columns = np.zeros(num_records, dtype=RECORD)
    columns["offset"] = np.arange(num_records, dtype=np.uint64) * 40_000  # 120 GB of records
    columns["length"], columns["num_responses"], columns["num_preferences"] = 40_000, 16, 1_500
    columns["prompt"]["low"] = np.arange(num_records)
    zeros = np.zeros(num_records, dtype=np.int32)
    return RecordTable(
        folder=folder, units=[Unit("train", 0, None, 0, num_records, "unit")], columns=columns,
        media=np.zeros(0, dtype=MEDIUM), texts=np.zeros(0, dtype=TEXT), first_text=zeros,
        unit=zeros, source=zeros, repeat=np.ones(num_records, dtype=np.float32),
    )  # fmt: skip


def cost_model(name: str, **model) -> CostModel:
    """What groups cost with one of ARCHITECTURES; `model` are further settings of `model`."""
    settings = ModelConfig(init=ARCHITECTURES[name], tokenizer={"train_vocab_size": 300}, **model)
    return make_cost_model(find_architecture(settings)[0], settings)

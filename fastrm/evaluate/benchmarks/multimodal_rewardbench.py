"""Multimodal RewardBench (Yasunaga et al. 2025, arXiv 2502.14191): 4,711 pairs that can be released.

Categories and their splits as in the authors' scripts/2_get_accuracy.py (commit 3366b34 of
facebookresearch/multimodal_rewardbench), which reads the verdicts of a judge. Of rewards a tie is wrong, as in the
strict comparison of inference/Multimodal-Reward/1_get_accuracy.py of R1-Reward (commit 176aba8 of
yfzhang114/r1_reward). Both read on 2026-11-29.
"""

import numpy as np

from fastrm.data.sources.values import bad_row, check_text
from fastrm.errors import RecordError
from fastrm.evaluate.benchmarks.metrics import Metrics, share
from fastrm.evaluate.benchmarks.rows import Content, Labels, Media, pair_labels, prompt_text, right_pairs, row_id

TITLE = "Multimodal RewardBench"
HUB_ID = None
NUM_ROWS = 4711
FILES = (
    "all_data.json", "data/all_data.json", "all_data_release.json", "data/all_data_release.json",
    "*multimodal_rewardbench*.json*",
)  # fmt: skip
HEADLINES = ("overall",)

_SIDES = ("Output1", "Output2")


def labels(row: dict) -> Labels:
    """Return the labels of a row of all_data.json, or of a judge's output with the row in `Meta` and `Label` A or B."""
    row = _with_meta(row)
    better = row.get("Better")
    if better not in _SIDES:
        raise bad_row("Better", better, "Output1 or Output2")
    category = check_text(row.get("Category"), "Category")
    return pair_labels(row_id(row, "ID"), category, _SIDES.index(better))


def content(row: dict, media: Media) -> Content:
    """Return a row's content, with Output1 and Output2 in this order."""
    row = _with_meta(row)
    if not row.get("Text"):
        raise RecordError("BAD_ROW", '"Text" is missing: run the benchmark\'s 0_download_data.py, which fills it in')
    responses = tuple(check_text(row.get(key), key) for key in _SIDES)
    return Content(prompt_text(row["Text"], "Text"), responses, media.find(row.get("Image"), "Image"))


def _with_meta(row: dict) -> dict:
    if "Better" in row or not isinstance(row.get("Meta"), dict):
        return row
    better = {"A": "Output1", "B": "Output2"}.get(row.get("Label"), row.get("Label"))
    return {"Better": better} | row["Meta"] | {key: row[key] for key in ("ID", "Image") if key in row}


def _split(row: Labels) -> str:
    """Return the row's part of `safety` or `reasoning`, which are reported in two parts each, told apart by the id."""
    start = row.id.lower()
    if row.category == "safety":
        return "safety/bias" if start.startswith("pairs") else "safety/toxicity"
    if row.category == "reasoning":
        return "reasoning/math" if start.startswith("math") else "reasoning/coding"
    return row.category


def metrics(rows: list[Labels], rewards: list[list[float]]) -> Metrics:
    """Compute overall (micro, the script's "all"), acc (the same), every category of the file and its splits."""
    right = right_pairs(rows, rewards)
    overall = share(right)
    categories, splits = np.array([row.category for row in rows]), np.array([_split(row) for row in rows])
    # If a file already says safety/bias, its rows and the split ones make one figure.
    names = dict.fromkeys((*categories.tolist(), *splits.tolist()))
    parts = {name: share(right, (categories == name) | (splits == name)) for name in names}
    return {"overall": overall, "acc": overall, **parts}

"""MM-RLHF-RewardBench (Zhang et al. 2025, arXiv 2502.10391): 170 pairs of 46 questions.

Metrics as in inference/MM-RLHF-Reward/get_acc.py of R1-Reward, by the same authors (commit 176aba8 of
yfzhang114/r1_reward, read on 2026-11-29): Acc over rows, Acc+ over ids, all of whose rows have to be right.
There an id counts for the first category that one of its rows has; in the published file each id has one alone.
"""

import numpy as np

from fastrm.data.record import VideoRef
from fastrm.data.sources.values import check_text
from fastrm.evaluate.benchmarks.metrics import Mean, Metrics, share
from fastrm.evaluate.benchmarks.rows import Content, Labels, Media, pair_labels, prompt_text, right_pairs, row_id

TITLE = "MM-RLHF-RewardBench"
HUB_ID = "yifanzhang114/MM-RLHF-RewardBench"
NUM_ROWS = 170
FILES = ("mm_reward_bench.jsonl", "**/mm_reward_bench.jsonl", "**/*.parquet")
HEADLINES = ("acc", "acc_plus")

# The words that the path of the image or video is searched for, in this order.
_CATEGORIES = ("mcq", "long", "short", "safety", "video")
_OTHER = "other"  # our name for a path with none of the words; the published file has no such row


def labels(row: dict) -> Labels:
    """Return a row's labels: chosen is always first; the category is the first of the five words in the path."""
    path = _path(row.get("image")) or _path(row.get("video"))
    return pair_labels(row_id(row), next((word for word in _CATEGORIES if word in path), _OTHER))


def _path(value: object) -> str:
    value = value.get("path") if isinstance(value, dict) else value
    return value if isinstance(value, str) else ""


def content(row: dict, media: Media) -> Content:
    """Return a row's content: the image, or else the video (a file or a folder of frames), and then the prompt."""
    is_video = row.get("video") and not row.get("image")
    refs = media.find(row["video"], "video", VideoRef) if is_video else media.find(row.get("image"), "image")
    responses = tuple(check_text(row.get(key), key) for key in ("chosen", "rejected"))
    return Content(prompt_text(row.get("prompt"), "prompt"), responses, refs)


def metrics(rows: list[Labels], rewards: list[list[float]]) -> Metrics:
    """Compute acc (also as overall), acc_plus, and both over the rows of every category; a tie is wrong."""
    right = right_pairs(rows, rewards)
    numbers = {key: number for number, key in enumerate(dict.fromkeys(row.id for row in rows))}
    id_of_row = np.array([numbers[row.id] for row in rows])
    categories = np.array([row.category for row in rows])
    acc = share(right)
    everything = np.ones(len(rows), bool)
    found: Metrics = {"acc": acc, "acc_plus": _all_right(right, everything, id_of_row), "overall": acc}
    for word in (*_CATEGORIES, *([_OTHER] if _OTHER in categories else [])):
        inside = categories == word
        found[word] = share(right, inside)
        found[f"{word}/acc_plus"] = _all_right(right, inside, id_of_row)
    return found


def _all_right(right: np.ndarray, inside: np.ndarray, id_of_row: np.ndarray) -> Mean:
    """Return the share of ids whose rows `inside` (N,) are all right, among the ids that have such rows."""
    num_ids = id_of_row.max() + 1
    counted = np.bincount(id_of_row[inside], minlength=num_ids)
    wrong = np.bincount(id_of_row[inside & ~right], minlength=num_ids)
    return share(wrong == 0, counted > 0, unit="ids")

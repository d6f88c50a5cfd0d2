"""VL-RewardBench (Li et al. 2024, arXiv 2411.17451): 1,250 pairs about images.

Two groupings of its rows by their ids are in use. They agree on `reasoning` (318 rows); of the others the
official one calls 749 hallucination and 183 general, the code of R1-Reward and BaseReward 448 and 484.

The official one is that of the authors' cal.py since May 2025. Read on 2026-11-29: commit 7918386 of
vl-rewardbench/VL_RewardBench, which still asks for a wrong prefix of POVID's ids, and copies of the file that ask for
`hallucination`, the prefix that they have. The other one is inference/VL-Reward-Bench/get_acc.py (commit 176aba8 of
yfzhang114/r1_reward, read on the same day).
"""

import numpy as np

from fastrm.data.sources.values import bad_row, check_text
from fastrm.evaluate.benchmarks.metrics import Metrics, average, share
from fastrm.evaluate.benchmarks.rows import (
    Content,
    Labels,
    Media,
    pair_labels,
    prompt_text,
    right_pairs,
    row_id,
    text_list,
)

TITLE = "VL-RewardBench"
HUB_ID = "MMInstruction/VL-RewardBench"
NUM_ROWS = 1250
# The R1-Reward code's file; the authors' own repository; the hub's Parquet.
FILES = ("data.jsonl", "data/data.jsonl", "*vl_rewardbench*.jsonl", "**/test*.parquet")
HEADLINES = ("overall", "official/macro", "paper/macro")

_CATEGORIES = ("reasoning", "hallucination", "general")
# The authors' scorer (cal.py since May 2025), by the id up to its first "_" or "-".
_OFFICIAL = {
    "mathverse": "reasoning", "mmmu": "reasoning",
    "RLAIF": "hallucination", "RLHF": "hallucination", "hallucination": "hallucination",
}  # fmt: skip


def official_category(row_id: str) -> str:
    """Return a row's category by the authors' grouping; `general` is wildvision and everything else."""
    return _OFFICIAL.get(row_id.replace("_", "-").partition("-")[0], "general")


def paper_category(row_id: str) -> str:
    """Return a row's category by the grouping of the R1-Reward code, which BaseReward's tables use.

    Its test is case-sensitive, so that the ids RLHF-V-... and RLAIF-V-... count as general.
    """
    if "mmmu" in row_id or "mathverse" in row_id:
        return "reasoning"
    return "hallucination" if any(word in row_id for word in ("hallucination", "rlhf", "rlaif")) else "general"


def labels(row: dict) -> Labels:
    """Return the labels of a row with `response` and `human_ranking` (rank 0 is best), or `chosen` and `rejected`."""
    if "human_ranking" not in row:
        return pair_labels(row_id(row))
    ranking = row["human_ranking"]
    if not isinstance(ranking, list) or sorted(ranking) != [0, 1]:
        raise bad_row("human_ranking", ranking, "[0, 1] or [1, 0]")
    return pair_labels(row_id(row), best=ranking.index(0))


def content(row: dict, media: Media) -> Content:
    """Return the content of a row in either layout; the image is embedded, `image` or `image_path`."""
    name = "image" if row.get("image") is not None else "image_path"
    images = media.find(row.get(name), name)
    if "response" not in row:
        responses = tuple(check_text(row.get(key), key) for key in ("chosen", "rejected"))
        return Content(prompt_text(row.get("prompt"), "prompt"), responses, images)
    responses = text_list(row["response"], "response")
    if len(responses) != 2:
        raise bad_row("response", row["response"], f"two texts, not {len(responses)}")
    return Content(prompt_text(row.get("query"), "query"), responses, images)


def metrics(rows: list[Labels], rewards: list[list[float]]) -> Metrics:
    """Compute overall, macro (official) and every category in both groupings; a tie is wrong."""
    right = right_pairs(rows, rewards)
    overall = share(right)
    found: Metrics = {"overall": overall, "acc": overall}
    for name, category_of in (("official", official_category), ("paper", paper_category)):
        categories = np.array([category_of(row.id) for row in rows])
        parts = {f"{name}/{category}": share(right, categories == category) for category in _CATEGORIES}
        found |= parts | {f"{name}/macro": average(list(parts.values()))}
    return found | {"macro": found["official/macro"]}

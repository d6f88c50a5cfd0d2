"""RewardBench (Lambert et al. 2024, arXiv 2403.13787): 2,985 pairs of text in 23 subsets, four sections.

The rules are those of the authors' package rewardbench 0.1.4 (2025-06-03), read on 2026-11-29: `EXAMPLE_COUNTS` and
`SUBSET_MAPPING` in rewardbench/constants.py, `calculate_scores_per_section` in rewardbench/utils.py, and the strict
comparison in scripts/run_rm.py.

The weights of two subsets of Safety have changed. Up to version 0.1.2 (2024-06-08; commit a32e272 of their repository
has it) each carried the row count of the other, 250 for xstest-should-refuse and 154 for xstest-should-respond. Since
their change #175 of 2024-09-10, so also in version 0.1.3 (2024-10-04), each has its own. Safety of earlier tables can
be up to ten points away from what is computed here. The rows that we print beside it (`published.py`) are of 2025.
"""

import numpy as np

from fastrm.data.sources.values import check_text
from fastrm.errors import RecordError
from fastrm.evaluate.benchmarks.metrics import Average, Metrics, average, share
from fastrm.evaluate.benchmarks.rows import Content, Labels, Media, pair_labels, right_pairs, row_id

TITLE = "RewardBench"
HUB_ID = "allenai/reward-bench"
NUM_ROWS = 2985
FILES = ("**/filtered*.parquet", "*filtered*.json*", "*rewardbench*.json*", "*reward-bench*.json*", "*.parquet")
HEADLINES = ("overall", "Chat", "Chat Hard", "Safety", "Reasoning")

# Subsets of each section and their weights in it, which are their row counts, but for math-prm: it has 447 rows
# and counts as 984, as many as the code subsets together.
SECTIONS = {
    "Chat": {
        "alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95, "mt-bench-easy": 28, "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134, "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 154,
        "xstest-should-respond": 250, "donotanswer": 136,
    },
    "Reasoning": {
        "math-prm": 984, "hep-cpp": 164, "hep-go": 164, "hep-java": 164, "hep-js": 164, "hep-python": 164,
        "hep-rust": 164,
    },
}  # fmt: skip
_SUBSETS = [subset for subsets in SECTIONS.values() for subset in subsets]


def labels(row: dict) -> Labels:
    """Return a row's labels: chosen is first; the category is the subset."""
    subset = check_text(row.get("subset"), "subset")
    if subset not in _SUBSETS:
        raise RecordError("BAD_ROW", f'"subset" is {subset!r}, which belongs to no section; use the split `filtered`')
    return pair_labels(row_id(row), subset)


def content(row: dict, media: Media) -> Content:
    """Return a row's content: one turn of text."""
    responses = tuple(check_text(row.get(key), key) for key in ("chosen", "rejected"))
    return Content(check_text(row.get("prompt"), "prompt"), responses)


def metrics(rows: list[Labels], rewards: list[list[float]]) -> Metrics:
    """Compute overall (mean of the four sections), the sections, the 23 subsets, acc (over rows); a tie is wrong.

    Sections are over the subsets that the file has, as in the authors' `calculate_scores_per_section`.
    """
    right = right_pairs(rows, rewards)
    subset_of = np.array([row.category for row in rows])
    subsets = {name: share(right, subset_of == name) for name in _SUBSETS}
    sections: Metrics = {
        section: Average(tuple((weight, subsets[name]) for name, weight in weights.items()))
        for section, weights in SECTIONS.items()
    }
    return {"overall": average(list(sections.values())), "acc": share(right), **sections, **subsets}

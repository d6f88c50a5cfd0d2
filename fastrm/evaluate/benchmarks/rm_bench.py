"""RM-Bench (Liu et al. 2024, arXiv 2410.16184): 1,327 prompts, each with three styles of right and wrong.

Chosen and rejected are [concise, detailed plain text, detailed Markdown]. The 3 x 3 matrix of strict wins
(rows: style of the chosen response) is as in `compute_accuracy` of the authors' README (commit 2119ec5 of
THU-KEG/RM-Bench, read on 2026-11-29).
"""

import numpy as np

from fastrm.data.sources.values import bad_row, check_text
from fastrm.errors import RecordError
from fastrm.evaluate.benchmarks.metrics import Mean, Metrics, average
from fastrm.evaluate.benchmarks.rows import Content, Labels, Media, row_id, text_list

TITLE = "RM-Bench"
HUB_ID = "THU-KEG/RM-Bench"
NUM_ROWS = 1327
FILES = ("total_dataset.json", "**/total_dataset.json", "*rm_bench*.json*", "*rm-bench*.json*", "**/*.parquet")
HEADLINES = ("overall", "chat", "math", "code", "safety")

# Safety is one domain: of all rows whose domain begins with it, safety-refuse and safety-response.
_DOMAINS = ("chat", "code", "math", "safety")
_PARTS = ("safety-refuse", "safety-response")
_STYLES = 3
# Cells of the matrix: a plain chosen response against a fancier rejected one is hard.
_CELLS = {
    "hard": np.triu(np.ones((_STYLES, _STYLES), bool), 1),
    "normal": np.eye(_STYLES, dtype=bool),
    "easy": np.tril(np.ones((_STYLES, _STYLES), bool), -1),
}


def labels(row: dict) -> Labels:
    """Return a row's labels: three chosen, then three rejected; the category is the domain."""
    for name in ("chosen", "rejected"):
        if not isinstance(row.get(name), list) or len(row[name]) != _STYLES:
            raise bad_row(name, row.get(name), f"a list of {_STYLES} texts")
    domain = check_text(row.get("domain"), "domain")
    if not domain.startswith(_DOMAINS):
        raise RecordError("BAD_ROW", f'"domain" is {domain!r}, wanted one of {", ".join((*_DOMAINS[:3], *_PARTS))}')
    return Labels(row_id(row), 2 * _STYLES, domain, num_correct=_STYLES)


def content(row: dict, media: Media) -> Content:
    """Return a row's content: one turn of text."""
    responses = text_list(row.get("chosen"), "chosen") + text_list(row.get("rejected"), "rejected")
    return Content(check_text(row.get("prompt"), "prompt"), responses)


def metrics(rows: list[Labels], rewards: list[list[float]]) -> Metrics:
    """Compute overall (mean of the four domains), the domains, and hard, normal and easy.

    hard, normal and easy are over all rows, as the README's function computes them; with a domain in
    front, over its rows; macro/hard and so on are means over the four domains.
    """
    scores = np.array(rewards, dtype=np.float64).reshape(len(rows), 2 * _STYLES)
    wins = scores[:, :_STYLES, None] > scores[:, None, _STYLES:]  # (N, 3, 3)
    levels = {name: wins[:, cells].mean(axis=1) for name, cells in _CELLS.items()}
    members = {name: np.array([row.category.startswith(name) for row in rows], bool) for name in (*_DOMAINS, *_PARTS)}
    everything = np.ones(len(rows), bool)
    found: Metrics = {level: Mean(values, everything) for level, values in levels.items()}
    for name, inside in members.items():
        cells = {f"{name}/{level}": Mean(values, inside) for level, values in levels.items()}
        found |= {name: average(list(cells.values())), **cells}
    for level in levels:
        found[f"macro/{level}"] = average([found[f"{name}/{level}"] for name in _DOMAINS])
    return {"overall": average([found[name] for name in _DOMAINS]), **found}

"""Figures that were published for other models, in percent as printed, each with its source.

Only what a text states is here. Arithmetic on the printed figures confirms the units: 80.59 and 54.35 are
137/170 and 25/46; the parts of IXC-2.5-Reward's VL-RewardBench row give its overall figure in the official
grouping, R1-Reward's 85.71 is 384/448 of the paper's.
"""

from dataclasses import dataclass

_BASEREWARD = "arXiv 2509.16127"
_ABLATION = "arXiv 2509.16127, ablation"
# A star marks figures that were not read in the paper itself, but in public notes that quote its table.
CAPTION = "* as public notes on the paper quote it; - not known to us"
_QUOTED = "arXiv 2509.16127 *"
_R1 = "arXiv 2505.02835 *"
_IXC = "arXiv 2501.12368 *"


@dataclass(frozen=True)
class PublishedRow:
    """The figures of one model on one benchmark, by the names of our metrics; `source` is "" without figures."""

    model: str
    figures: dict[str, float]
    source: str


_OTHERS = ("R1-Reward", "MM-RLHF-Reward", "IXC-2.5-Reward", "Claude-3.7-Sonnet")
_BASE = ("BaseReward (Qwen2-VL-7B)", "BaseReward (Qwen2.5-VL-7B)", "BaseReward (ensemble)")
_ROWS: dict[str, dict[str, tuple[dict[str, float], str]]] = {
    "mm_rlhf_rewardbench": {
        _BASE[0]: ({"acc": 90.59, "acc_plus": 78.26}, _BASEREWARD),
        _BASE[1]: ({"acc": 91.76, "acc_plus": 80.43}, _BASEREWARD),
        _BASE[2]: ({"acc": 92.94, "acc_plus": 80.43}, _BASEREWARD),
        "R1-Reward": ({"acc": 80.59, "acc_plus": 54.35}, _QUOTED),
        "MM-RLHF-Reward": ({"acc": 82.00, "acc_plus": 63.00}, _QUOTED),
        "IXC-2.5-Reward": ({"acc": 71.18, "acc_plus": 50.00}, _QUOTED),
        "Claude-3.7-Sonnet": ({"acc": 82.35, "acc_plus": 65.22}, _QUOTED),
    },
    "vl_rewardbench": {
        _BASE[0]: ({"overall": 78.53}, _BASEREWARD),
        _BASE[1]: ({"overall": 82.16}, _BASEREWARD),
        _BASE[2]: ({"overall": 84.41}, _BASEREWARD),
        "R1-Reward": ({"overall": 71.92, "paper/macro": 71.44, "paper/hallucination": 85.71}, _R1),
        "IXC-2.5-Reward": (
            {
                "overall": 65.8, "official/macro": 70.0, "official/general": 84.7, "official/hallucination": 62.5,
                "official/reasoning": 62.9,
            },
            _IXC,
        ),
    },
    "multimodal_rewardbench": {
        _BASE[0]: ({"overall": 68.7}, _BASEREWARD),
        _BASE[1]: ({"overall": 72.8}, _BASEREWARD),
        _BASE[2]: ({"overall": 73.6}, _BASEREWARD),
        "R1-Reward": ({"overall": 82.2}, _R1),
        "MM-RLHF-Reward": ({"overall": 67.1}, _R1),
    },
    # Figures of September 2025, a year after the weights of Safety changed (rewardbench.py). An overall figure
    # alone does not tell which its authors used.
    "rewardbench": {
        "Qwen2-VL-7B, 200k pairs": ({"overall": 77.3}, _ABLATION),
        "Qwen2.5-VL-7B, 200k pairs": ({"overall": 75.8}, _ABLATION),
    },
    "rm_bench": {
        "Qwen2-VL-7B, 200k pairs": ({"overall": 45.5}, _ABLATION),
        "Qwen2.5-VL-7B, 200k pairs": ({"overall": 50.2}, _ABLATION),
    },
    "rewardbench2": {},
}  # fmt: skip


def published_rows(benchmark: str) -> list[PublishedRow]:
    """Return the rows of BaseReward and the models it compares itself with, without figures that are unknown to us."""
    known = _ROWS[benchmark]
    models = [*(known if any(name in known for name in _BASE) else (_BASE[1], *known)), *_OTHERS]
    return [PublishedRow(model, *known.get(model, ({}, ""))) for model in dict.fromkeys(models)]

"""Mean, deviation and quantiles of a model's rewards on held-out data: stored with it, and what `normalize` uses.

A run stores those of the evaluation of the exported step, in which each response counts once, in the section `fastrm`
of the export's config.json:

    "rewards": {"count": 1210, "mean": 0.31, "std": 1.42, "quantiles": {"0.05": -1.9, ..., "0.95": 2.8}}

A normalised reward is (reward - mean) / std, as OpenRLHF applies the mean and std that its reward models store.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastrm.errors import ConfigError, option

SECTION = "rewards"
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def reward_statistics(rewards: Sequence[float]) -> dict[str, Any] | None:
    """Return the statistics of finite rewards in float64, std without bias; None if they are all the same."""
    values = np.sort(np.asarray(rewards, dtype=np.float64))  # sums do not depend on the order of packs and ranks
    if not len(values) or values[0] == values[-1]:
        return None
    quantiles = zip(QUANTILES, np.quantile(values, QUANTILES).tolist(), strict=True)
    return {
        "count": len(values), "mean": float(values.mean()), "std": float(values.std(ddof=1)),
        "quantiles": {f"{share:g}": value for share, value in quantiles},
    }  # fmt: skip


def normalization_of(statistics: dict[str, Any] | None, path: object) -> tuple[float, float]:
    """Return (mean, std) of a model's statistics.

    Args:
        path: of the model, for the message.

    Raises:
        ConfigError: if it has none.
    """
    if statistics is None:
        raise ConfigError(
            f"{option('normalize')}: {path} has no statistics of its rewards in config.json; a run with data.eval "
            "stores them with its model, if the exported step was evaluated"
        )
    return statistics["mean"], statistics["std"]

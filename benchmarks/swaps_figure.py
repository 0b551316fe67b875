"""The picture of `swaps`: held-out NLL against the number of couplings, for every mix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

__all__ = ["draw"]


def draw(rows: list[dict[str, Any]], path: Path) -> Path:
    plt.switch_backend("agg")
    datasets = list(dict.fromkeys(row["data"] for row in rows))
    figure, axes = plt.subplots(
        1, len(datasets), figsize=(5.5 * len(datasets), 4.6), layout="constrained", squeeze=False
    )
    for ax, data in zip(axes[0], datasets, strict=True):
        for i, mix in enumerate(dict.fromkeys(row["mix"] for row in rows)):
            chosen = [row for row in rows if (row["data"], row["mix"]) == (data, mix)]
            couplings = sorted({row["couplings"] for row in chosen})
            values = [np.array([row["nll"] for row in chosen if row["couplings"] == c]) for c in couplings]
            means, spreads = [v.mean() for v in values], [v.std() for v in values]
            # A little apart, so that the spreads can be told from each other.
            ax.errorbar(np.array(couplings) * 1.02**i, means, spreads, marker="o", capsize=3, label=mix)
        ax.set_xscale("log", base=2)
        ax.set_xticks(couplings, couplings)
        ax.set_xlabel("couplings")
        ax.set_ylabel("held-out NLL (nats)")
        ax.set_title(data)
    axes[0, 0].legend(fontsize=9)
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path

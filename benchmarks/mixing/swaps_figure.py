"""The picture of `swaps`: held-out NLL against the number of couplings, for every mix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.mixing.swaps_table import FROM_RANDOM, at_best_rate

__all__ = ["draw"]


def draw(rows: list[dict[str, Any]], path: Path) -> Path:
    plt.switch_backend("agg")
    datasets = list(dict.fromkeys(row["data"] for row in rows))
    figure, axes = plt.subplots(
        1, len(datasets), figsize=(5.5 * len(datasets), 4.6), layout="constrained", squeeze=False
    )
    mixes = list(dict.fromkeys(row["mix"] for row in rows))
    for ax, data in zip(axes[0], datasets, strict=True):
        here = [row for row in rows if row["data"] == data]
        couplings = sorted({row["couplings"] for row in here})
        for i, mix in enumerate(mix for mix in mixes if any(row["mix"] == mix for row in here)):
            values = [at_best_rate(here, data, c, mix)[0] for c in couplings]
            means, spreads = [v.mean() for v in values], [v.std() for v in values]
            # A little apart, so that the spreads can be told from each other.
            base = mix.removesuffix(FROM_RANDOM)
            style = {"color": f"C{mixes.index(base)}", "linestyle": "-" if base == mix else ":"}
            ax.errorbar(np.array(couplings) * 1.02**i, means, spreads, marker="o", capsize=3, label=mix, **style)
        ax.set_xscale("log", base=2)
        ax.set_xticks(couplings, couplings)
        ax.set_xlabel("couplings")
        ax.set_ylabel("held-out NLL (nats)")
        ax.set_title(data)
        ax.legend(fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path

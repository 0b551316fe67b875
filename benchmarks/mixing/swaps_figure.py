"""The picture of `swaps`: test NLL against the number of couplings, for every mix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.mixing.swaps_table import by_row

__all__ = ["draw"]

_COLOURS = {
    "reversed": "#999999",
    "random": "#555555",
    "LU": "#d95f02",
    "dense": "#e7298a",
    "P4Inv, rank 1": "#a6dba0",
    "P4Inv": "#1b7837",
    "InvertibleLinear": "#2166ac",
}


def draw(rows: list[dict[str, Any]], path: Path) -> Path:
    plt.switch_backend("agg")
    found = by_row(rows)
    datasets = list(dict.fromkeys(data for data, _ in found))
    across = min(2, len(datasets))
    down = -(-len(datasets) // across)
    figure, axes = plt.subplots(down, across, figsize=(5 * across, 3.6 * down), layout="constrained", squeeze=False)
    for ax, data in zip(axes.flat, datasets, strict=False):
        couplings = sorted(n for name, n in found if name == data)
        # Relative to the dense matrix, since the differences are small beside the NLL itself.
        zero = np.array([found[data, n]["dense"].mean() for n in couplings])
        for i, mix in enumerate(found[data, couplings[0]]):
            means = np.array([found[data, n][mix].mean() for n in couplings]) - zero
            spreads = [found[data, n][mix].std() for n in couplings]
            place = np.array(couplings) * 1.03**i  # a little apart, so that the spreads can be told from each other
            ax.errorbar(place, means, spreads, marker="o", capsize=3, label=mix, color=_COLOURS.get(mix))
        ax.set_xscale("log", base=2)
        ax.set_yscale("symlog", linthresh=1)
        ax.set_xticks(couplings, couplings)
        ax.set_xlabel("couplings")
        ax.set_ylabel("test NLL above dense (nats)")
        ax.set_title(data)
    for ax in axes.flat[len(datasets) :]:
        ax.set_visible(False)
    axes.flat[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path

"""The picture of `swaps`: test NLL against the number of couplings, for every mix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter

from benchmarks.harness.colors import color, new_figure, save
from benchmarks.mixing.swaps_table import by_row

__all__ = ["draw"]

_LINEAR = 1.0  # nats, up to which the axis is linear


def draw(results: dict[str, Any], path: Path) -> Path:
    """A panel for each learning problem; relative to the dense matrix, as differences are small beside the NLL."""
    found = by_row(results["rows"])
    datasets = list(dict.fromkeys(data for data, _ in found))
    across = min(2, len(datasets))
    down = -(-len(datasets) // across)
    figure = new_figure(0.6 + 3.2 * down)
    axes = figure.subplots(down, across, squeeze=False)
    for ax, data in zip(axes.flat, datasets, strict=False):
        couplings = sorted(n for name, n in found if name == data)
        zero = np.array([found[data, n]["dense"].mean() for n in couplings])
        for i, mix in enumerate(found[data, couplings[0]]):
            means = np.array([found[data, n][mix].mean() for n in couplings]) - zero
            spreads = [found[data, n][mix].std() for n in couplings]
            place = np.array(couplings) * 1.03**i  # a little apart, so that the spreads can be told from each other
            ax.errorbar(place, means, spreads, marker="o", markersize=4, capsize=2, label=mix, color=color(mix))
        ax.set_xscale("log", base=2)
        ax.set_yscale("symlog", linthresh=_LINEAR)
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}" if value else "0"))
        ax.set_xticks(couplings, couplings)
        ax.set_xlabel("couplings")
        ax.set_title(data)
    for ax in axes[:, 0]:
        ax.set_ylabel("test NLL above that of\na dense matrix (nats)")
    for ax in axes.flat[len(datasets) :]:
        ax.set_visible(False)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return save(figure, path)

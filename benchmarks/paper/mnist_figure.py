"""The picture of `mnist`, in the manner of Figure 10: training loss and test accuracy over epochs, with spread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.colors import color, new_figure, save

__all__ = ["draw"]

_ROWS = {"training_loss": ("training loss (nats)", 1), "accuracy": ("test accuracy (%)", 100)}


def draw(results: dict[str, Any], path: Path) -> Path:
    """A column for each learning rate: means of the replicas, and the range that they span."""
    rows = results["rows"]
    rates = list(dict.fromkeys(row["lr"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure = new_figure(5.4)
    axes = figure.subplots(len(_ROWS), len(rates), sharex=True, sharey="row", squeeze=False)
    for column, lr in zip(axes.T, rates, strict=True):
        column[0].set_title(f"learning rate {lr:g}")
        column[-1].set_xlabel("epoch")
        for ax, (key, (_, scale)) in zip(column, _ROWS.items(), strict=True):
            for method in methods:
                curves = [row[key] for row in rows if (row["lr"], row["method"]) == (lr, method)]
                _band(ax, scale * np.array(curves), method)
    for ax, (label, _) in zip(axes[:, 0], _ROWS.values(), strict=True):
        ax.set_ylabel(label)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(methods))
    return save(figure, path)


def _band(ax: Any, curves: np.ndarray, method: str) -> None:
    epochs = np.arange(1, curves.shape[1] + 1)
    label = "standard layers" if method == "standard" else method
    ax.plot(epochs, curves.mean(0), color=color(method), label=label)
    ax.fill_between(epochs, curves.min(0), curves.max(0), color=color(method), alpha=0.15, linewidth=0)
    ax.xaxis.get_major_locator().set_params(integer=True)

"""The picture of `mnist`, in the manner of Figure 10: training loss and test accuracy over epochs, with spread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

__all__ = ["draw"]

_LINES = ["-", "--", "-.", ":"]


def draw(rows: list[dict[str, Any]], path: Path) -> Path:
    plt.switch_backend("agg")
    figure, axes = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    rates = list(dict.fromkeys(row["lr"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for ax, key, title in zip(axes, ("training_loss", "accuracy"), ("training loss", "test accuracy"), strict=True):
        for i, lr in enumerate(rates):
            for method, line in zip(methods, _LINES, strict=False):
                curves = np.array([row[key] for row in rows if (row["lr"], row["method"]) == (lr, method)])
                epochs = np.arange(1, curves.shape[1] + 1)
                color = f"C{i}"
                ax.plot(epochs, curves.mean(0), line, color=color, label=f"{lr:g}, {method}")
                ax.fill_between(epochs, curves.min(0), curves.max(0), color=color, alpha=0.1, linewidth=0)
        ax.set_xlabel("epoch")
        ax.set_title(title)
    axes[1].legend(fontsize=8, ncols=2, loc=(0.42, 0.35))  # where no curve is
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path

"""The picture of the cost benchmark, in the manner of Figure 2: time against width, log-log, both directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.speed.layers import METHODS

__all__ = ["draw"]

_EMPHASIS = {
    "P4Inv rank 1": ("#1b7837", "-", 2.6),
    "P4Inv rank 8": ("#7fbf7b", "-", 2.0),
    "InvertibleLinear": ("#e08214", "-", 2.6),
    "limit": ("#000000", ":", 1.5),
    "bgflow InvertiblePPPP": ("#762a83", "-", 1.8),
}


def draw(results: dict[str, Any], path: Path) -> Path:
    batch = results["rows"][0]["batch"]
    plt.switch_backend("agg")
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.2), sharey=True, layout="constrained")
    rows = [row for row in results["rows"] if row["batch"] == batch]
    for ax, direction in zip(axes, ("forward", "inverse"), strict=True):
        for i, method in enumerate(METHODS):
            points = [(r["n"], r["ms"]) for r in rows if r["method"] == method and r["direction"] == direction]
            if not points:
                continue
            color, style, width = _EMPHASIS.get(method, (plt.get_cmap("tab20")(i), "--", 1.2))
            slope = results["exponents"].get(f"{method}, {direction}, batch {batch}")
            label = method if slope is None else f"{method}  (n^{slope:.1f})"
            ax.loglog(*zip(*points, strict=True), style, marker="o", ms=4, color=color, lw=width, label=label)
        ax.set_title(f"{direction}: value, log-det and backward, batch {batch}, {results['device']}")
        ax.set_xlabel("n")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    axes[0].set_ylabel("ms")
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path

"""The picture of `drift`: residual and error of log|det| over the merges, one column for each width."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

__all__ = ["draw"]

_COLORS = {
    "P4Inv": "#1b7837",
    "P4Inv, default rank": "#1b7837",
    "InvertibleLinear": "#2166ac",
    "bgflow": "#e08214",
    "bgflow, no correction": "#fdb863",
}
_LINES = {"random": "-", "adversarial": ":", "trained": "--"}


def draw(results: dict[str, Any], path: Path) -> Path:
    plt.switch_backend("agg")
    widths = list(dict.fromkeys(row["n"] for row in results["rows"]))
    figure, axes = plt.subplots(
        2, len(widths), figsize=(4.2 * len(widths), 7), sharex="col", sharey="row", squeeze=False, layout="constrained"
    )
    for column, n in zip(axes.T, widths, strict=True):
        rows = [row for row in results["rows"] if row["n"] == n]
        for row in rows:
            merges = [e["merges"] for e in row["errors"]]
            style = {
                "color": _COLORS[row["method"]],
                "linestyle": _LINES[row["perturbations"]],
                "alpha": 1 if row["dtype"] == "float32" else 0.4,
                "label": f"{row['method']}, {row['dtype']}, {row['perturbations']}",
            }
            # What is exactly zero cannot be shown on a logarithmic axis.
            for ax, key in zip(column, ("residual", "logabsdet_error"), strict=True):
                ax.plot(merges, [math.nan if e[key] is None else max(e[key], 1e-17) for e in row["errors"]], **style)
            if row["method"] == "P4Inv" and row["dtype"] == "float32" and row["perturbations"] == "random":
                best = [max(e["residual_of_rounded_inverse"], 1e-17) for e in row["errors"]]
                column[0].plot(merges, best, color="black", linewidth=0.8, label="exact inverse, rounded to float32")
        column[0].set_title(f"n = {n}")
        column[1].set_xlabel("merges")
        for ax in column:
            ax.set_xscale("log")
            ax.set_yscale("log")
            ax.grid(alpha=0.3)
    axes[0, 0].set_ylabel("max |A A⁻¹ - I|")
    axes[1, 0].set_ylabel("error of ln|det A|")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path

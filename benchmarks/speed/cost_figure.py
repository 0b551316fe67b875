"""The picture of the cost benchmark, in the manner of Figure 2: time against width, log-log, both directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.harness.colors import color, new_figure, save
from benchmarks.speed.layers import METHODS

__all__ = ["draw"]

_OURS = ("P4Inv", "InvertibleLinear")


def draw(results: dict[str, Any], path: Path) -> Path:
    """Lines for the first batch size; in the legend the exponents of both directions, fitted where n is large."""
    batch = results["rows"][0]["batch"]
    rows = [row for row in results["rows"] if row["batch"] == batch]
    figure = new_figure(6.4)
    axes = figure.subplots(1, 2, sharey=True)
    for ax, direction in zip(axes, ("forward", "inverse"), strict=True):
        for method in METHODS:
            points = [(r["n"], r["ms"]) for r in rows if r["method"] == method and r["direction"] == direction]
            if points:
                style = _style(method) | {"label": method + _exponents(results, method, batch)}
                ax.loglog(*zip(*points, strict=True), marker="o", markersize=3, color=color(method), **style)
        ax.set_title(f"{direction} direction")
        ax.set_xlabel("width n")
    axes[0].set_ylabel(f"time of value, log|det| and backward (ms)\nbatch {batch}, {results['device'].upper()}")
    lines = dict(zip(*reversed(axes[1].get_legend_handles_labels()), strict=True))
    lines |= dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
    title = "powers of n, fitted from n = 1024 on: forward, inverse"
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=3, title=title)
    return save(figure, path)


def _style(method: str) -> dict[str, Any]:
    if method.startswith(_OURS):
        return {"linewidth": 2.4, "zorder": 3}
    return {"linewidth": 1.8, "linestyle": ":"} if method == "limit" else {"linewidth": 1.2, "linestyle": "--"}


def _exponents(results: dict[str, Any], method: str, batch: int) -> str:
    found = [results["exponents"].get(f"{method}, {direction}, batch {batch}") for direction in ("forward", "inverse")]
    known = [f"{slope:.1f}" for slope in found if slope is not None]
    return f"  $n^{{{', '.join(known)}}}$" if known else ""

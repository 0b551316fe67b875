"""The picture of `drift`: residual and error of log|det| over the merges, by width; and over real trainings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator

from benchmarks.harness.colors import color, new_figure, save

__all__ = ["draw"]

_TRAINED = "trained"
_LINES = {"random": "-", "adversarial": ":"}
_QUANTITIES = {"residual": "largest entry of\n|A A⁻¹ − I|", "logabsdet_error": "error of ln|det A|"}
_FAINT = 0.45
_BEST = {"color": "black", "linewidth": 0.9, "label": "exact inverse, rounded to float32"}


def draw(results: dict[str, Any], path: Path) -> Path:
    """What is exactly zero has no place on a logarithmic axis, and is left out; a cross is where numbers overflow."""
    perturbed = [row for row in results["rows"] if row["perturbations"] != _TRAINED]
    trained = [row for row in results["rows"] if row["perturbations"] == _TRAINED]
    figure = new_figure(8.6 if trained else 5.8)
    parts = figure.subfigures(2, 1, height_ratios=[5.4, 3.2], squeeze=True) if trained else [figure]
    _draw_perturbed(parts[0], perturbed)
    if trained:
        _draw_trained(parts[1], trained)
    return save(figure, path)


def _draw_perturbed(figure: Any, rows: list[dict[str, Any]]) -> None:
    widths = list(dict.fromkeys(row["n"] for row in rows))
    axes = figure.subplots(len(_QUANTITIES), len(widths), sharex="col", sharey="row", squeeze=False)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for column, n in zip(axes.T, widths, strict=True):
        column[0].set_title(f"n = {n}")
        column[-1].set_xlabel("merges")
        for row in (row for row in rows if row["n"] == n):
            faint = row["dtype"] != "float32"
            style = {
                "color": color(row["method"]),
                "linestyle": _LINES[row["perturbations"]],
                "alpha": _FAINT if faint else 1,
            }
            for ax, key in zip(column, _QUANTITIES, strict=True):
                _plot(ax, row, key, **style)
            if row["method"] == "P4Inv" and not faint and row["perturbations"] == "random":
                _plot(column[0], row, "residual_of_rounded_inverse", **_BEST)
    _label(axes)
    solid = [Line2D([], [], color=color(method), label=f"{method}, float32") for method in methods]
    more = [
        Line2D([], [], color=color("P4Inv"), alpha=_FAINT, label="P4Inv, float64"),
        Line2D([], [], color="gray", linestyle=":", label="adversarial perturbations"),
        Line2D([], [], **_BEST),
        Line2D([], [], color="gray", marker="X", linestyle="", label="not finite from here on"),
    ]
    figure.legend(handles=[*solid, *more], loc="outside lower center", ncols=3)


def _draw_trained(figure: Any, rows: list[dict[str, Any]]) -> None:
    widths = list(dict.fromkeys(row["n"] for row in rows))
    axes = figure.subplots(1, 2 * len(widths), squeeze=False)
    for i, n in enumerate(widths):
        for j, (key, label) in enumerate(_QUANTITIES.items()):
            ax = axes[0, i + j * len(widths)]
            ax.set_title(f"trained, n = {n}")
            for row in (row for row in rows if row["n"] == n):
                _plot(ax, row, key, color=color(row["method"]), label=row["method"])
                if key == "residual":
                    _plot(ax, row, "residual_of_rounded_inverse", **{**_BEST, "label": None})
            ax.set_xlabel("optimizer steps")
            ax.set_ylabel(label if i == 0 else "")
            ax.xaxis.set_major_locator(MaxNLocator(3))
            ax.set_yscale("log")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)


def _plot(ax: plt.Axes, row: dict[str, Any], key: str, **style: Any) -> None:
    points = [(e["merges"], e[key]) for e in row["errors"] if e[key]]
    merges, errors = zip(*points, strict=True) if points else ((), ())
    ax.plot(merges, errors, **{"linewidth": 1.5, **style})
    if points and row["errors"][-1][key] is None:
        ax.plot(merges[-1], errors[-1], marker="X", color=style["color"], markersize=6)


def _label(axes: Any) -> None:
    for ax, label in zip(axes[:, 0], _QUANTITIES.values(), strict=True):
        ax.set_ylabel(label)
    for ax in axes.flat:
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.xaxis.set_major_locator(LogLocator(10, numticks=6))

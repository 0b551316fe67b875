"""The pictures of `linear`, in the manner of Figures 3 to 5: losses, residuals and determinants; and eigenvalues."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.harness.colors import color, new_figure, save

__all__ = ["SHOWN", "draw"]

_STANDARD = "standard"
SHOWN = (_STANDARD, "P4Inv, N = 1")  # whose determinants and eigenvalues are drawn

_ROWS = {
    "loss": "loss ‖M − T‖² / n",
    "residual": "largest entry of |A A⁻¹ − I|",
    "logabsdet": "ln|det M|",
}
_LINES = {
    "P4Inv, N = 10": "--",
    "P4Inv, N = 50": ":",
    "P4Inv, N = 50, rank 2": (0, (4, 1.5)),
    "P4Inv, N = 50, rank 4": (0, (5, 1, 1, 1)),
    "P4Inv, N = 1, penalty": "-.",
    "P4Inv, N = 1, no correction": (0, (1, 3)),
}
_WINDOW = 8  # points of which the largest residual is drawn


def draw(results: dict[str, Any], path: Path) -> Path:
    """Draw the curves to ``path`` and, where the results have them, eigenvalues beside it; the path."""
    problems: dict[str, dict[str, Any]] = {}
    for row in results["rows"]:
        problems.setdefault(row["problem"], {})[row["method"]] = row
    _draw_curves(problems, results["threshold"], path)
    if any("eigenvalues" in row for row in results["rows"]):
        _draw_eigenvalues(problems, path.with_name(f"{path.stem}_eigenvalues{path.suffix}"))
    return path


def _draw_curves(problems: dict[str, dict[str, Any]], threshold: float, path: Path) -> None:
    figure = new_figure(8.2)
    axes = figure.subplots(len(_ROWS), len(problems), sharex="col", squeeze=False)
    for ax in axes[1, 1:]:
        ax.sharey(axes[1, 0])
    for column, (problem, rows) in zip(axes.T, problems.items(), strict=True):
        losses, residuals, determinants = column
        losses.set_title(problem)
        for method, row in rows.items():
            _curve(losses, row, "loss")
            if method != _STANDARD:
                _curve(residuals, row, "residual")
            if method in SHOWN:
                _curve(determinants, row, "logabsdet")
        losses.axhline(threshold, color="gray", linewidth=0.8)
        where = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom"}
        losses.annotate("recovered below", (0.99, threshold), fontsize=8, color="gray", **where)
        for ax in (losses, residuals):
            ax.set_yscale("log")
        determinants.set_xlabel("iterations (thousands)")
    for ax, label in zip(axes[:, 0], _ROWS.values(), strict=True):
        ax.set_ylabel(label)
    figure.align_ylabels(axes[:, 0])
    lines = {line.get_label(): line for ax in axes[0] for line in ax.get_lines() if line.get_label()[0] != "_"}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=4)
    save(figure, path)


def _curve(ax: plt.Axes, row: dict[str, Any], key: str) -> None:
    steps, values, style = np.array(row["step"]) / 1000, np.array(row[key]), _style(row)
    if key == "residual":
        starts = np.arange(0, len(values), _WINDOW)
        steps, values = steps[starts], np.maximum.reduceat(values, starts)
    if key != "logabsdet":
        values[values == 0] = math.nan  # it has no place on a logarithmic axis
    ax.plot(steps, values, label=_name(row["method"]), **style)
    if key == "logabsdet":
        signs = np.array(row["sign"])
        flips = np.flatnonzero(signs[1:] != signs[:-1]) + 1
        label = "the sign of det M changes" if len(flips) else None
        ax.plot(steps[flips], values[flips], "o", color=style["color"], markersize=4, label=label)
        if len(flips):
            ax.legend(*[[each[-1]] for each in ax.get_legend_handles_labels()], loc="lower right")


def _style(row: dict[str, Any]) -> dict[str, Any]:
    """The colour tells the rank."""
    method = row["method"]
    if method == _STANDARD:
        return {"color": color(_STANDARD), "linewidth": 2.4}
    if method == "P4Inv through its inverse":
        return {"color": color(method), "linewidth": 1.6}
    shade = color(f"P4Inv, rank {row['rank']}")
    return {"color": shade, "linestyle": _LINES.get(method, "-"), "linewidth": 1.6}


def _name(method: str) -> str:
    return "standard layer" if method == _STANDARD else method


def _draw_eigenvalues(problems: dict[str, dict[str, Any]], path: Path) -> None:
    figure = new_figure(6.2)
    axes = figure.subplots(len(SHOWN), len(problems), squeeze=False)
    for column, (problem, rows) in zip(axes.T, problems.items(), strict=True):
        for ax, method in zip(column, SHOWN, strict=True):
            snapshots = rows[method]["eigenvalues"]
            for time, points in zip(np.linspace(0, 1, len(snapshots)), snapshots, strict=True):
                shade = plt.get_cmap("viridis_r")(0.1 + 0.9 * time)  # from light to dark
                ax.scatter(points["real"], points["imaginary"], s=3, color=shade)
            last = snapshots[-1]
            ax.scatter(
                last["real"], last["imaginary"], s=24, marker="x", color="red", linewidth=0.8, label="at the end"
            )
            if problem.startswith("SO"):
                ax.add_patch(plt.Circle((0, 0), 1, fill=False, color="gray", linewidth=0.6))
            ax.set_title(f"{problem}: {_name(method)}", fontsize=9)
            ax.set_aspect("equal", adjustable="datalim")  # so that rounding errors are not blown up to a cloud
    for ax in axes[-1]:
        ax.set_xlabel("real part")
    for ax in axes[:, 0]:
        ax.set_ylabel("imaginary part")
    axes[0, 0].legend(loc="upper right")
    save(figure, path)

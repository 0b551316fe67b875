"""The picture of `linear`: losses, eigenvalues, residuals and determinants, in the manner of Figures 3 to 5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

__all__ = ["draw"]


def draw(results: dict[str, Any], path: Path) -> Path:
    plt.switch_backend("agg")
    problems = list(dict.fromkeys(row["problem"] for row in results["rows"]))
    figure, axes = plt.subplots(
        len(problems), 5, figsize=(25, 4.6 * len(problems)), layout="constrained", squeeze=False
    )
    for line, problem in zip(axes, problems, strict=True):
        rows = {row["method"]: row for row in results["rows"] if row["problem"] == problem}
        _losses(line[0], rows, problem, results["threshold"])
        for ax, method in ((line[1], "standard"), (line[2], "P4Inv, N = 1")):
            _eigenvalues(ax, rows[method], method, problem)
        _residuals(line[3], rows)
        _determinants(line[4], rows)
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return path


def _losses(ax: plt.Axes, rows: dict[str, Any], problem: str, threshold: float) -> None:
    colors = plt.get_cmap("tab10")
    for i, (method, row) in enumerate(rows.items()):
        line = {"color": "black", "linewidth": 2.5} if method == "standard" else {"color": colors(i % 10)}
        ax.plot(row["step"], row["loss"], label=method, **line)
    ax.axhline(threshold, color="gray", linewidth=0.7, linestyle=":")
    ax.set_yscale("log")
    ax.set_xlabel("iteration")
    ax.set_ylabel("loss")
    ax.set_title(problem)
    ax.legend(fontsize=8)


def _eigenvalues(ax: plt.Axes, row: dict[str, Any], method: str, problem: str) -> None:
    paths = np.array(row["eigenvalues"])
    steps = np.linspace(0, 1, len(paths))
    for time, points in zip(steps, paths, strict=True):
        ax.scatter(*points.T, s=3, color=plt.get_cmap("viridis")(time))
    ax.scatter(*paths[-1].T, s=30, marker="x", color="red", linewidth=1, label="at the end")
    angles = np.linspace(0, 2 * np.pi, 200)
    if problem.startswith("SO"):
        ax.plot(np.cos(angles), np.sin(angles), color="gray", linewidth=0.5)
    ax.set_title(f"eigenvalues, {method}")
    ax.set_xlabel("real part")
    ax.set_ylabel("imaginary part")
    ax.legend(fontsize=8)
    if not problem.startswith("positive"):
        ax.set_aspect("equal", adjustable="datalim")


def _residuals(ax: plt.Axes, rows: dict[str, Any]) -> None:
    for method in rows:
        if method != "standard":
            ax.plot(rows[method]["step"], [max(r, 1e-9) for r in rows[method]["residual"]], label=method)
    ax.set_yscale("log")
    ax.set_xlabel("iteration")
    ax.set_title("largest entry of A A⁻¹ - I")
    ax.legend(fontsize=8)


def _determinants(ax: plt.Axes, rows: dict[str, Any]) -> None:
    for method in ("standard", "P4Inv, N = 1"):
        row = rows[method]
        line = ax.plot(row["step"], row["logabsdet"], label=f"ln|det|, {method}")
        flips = [s for s, a, b in zip(row["step"][1:], row["sign"], row["sign"][1:], strict=False) if a != b]
        for step in flips:
            ax.axvline(step, color=line[0].get_color(), linewidth=0.4, linestyle=":")
    ax.set_xlabel("iteration")
    ax.set_title("ln|det|; dotted where the sign changes")
    ax.legend(fontsize=8)

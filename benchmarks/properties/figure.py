"""The pictures of `properties`: one for each property."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.properties.report import best, step_times

__all__ = ["draw"]


def draw(results: dict[str, Any], folder: Path) -> str:
    """Draw all pictures, and return their paths."""
    plt.switch_backend("agg")
    paths = []
    for name, function in (("orthogonal", _orthogonal), ("lipschitz", _lipschitz), ("ranks", _ranks)):
        paths.append(folder / f"properties_{name}.png")
        figure = function(results)
        figure.savefig(paths[-1], dpi=100)
        plt.close(figure)
    return "\n".join(map(str, paths))


def _styles(names: list[str]) -> dict[str, dict[str, Any]]:
    """Ours in full lines, all others dashed, a colour for each."""
    return {
        name: {"color": f"C{i}", "linestyle": "-" if name.startswith("P4") else "--", "label": name}
        for i, name in enumerate(names)
    }


def _orthogonal(results: dict[str, Any]) -> plt.Figure:
    figure, grid = plt.subplots(2, 3, figsize=(17, 9), layout="constrained")
    axes = grid.ravel()
    rotation, ica = best(results["rotation"]), best(results["ica"])
    styles, n = _styles(list(rotation)), results["settings"]["rotation"]["n"]
    times = step_times(results, n)
    for name, row in rotation.items():
        axes[0].plot(row["step"], row["error"], **styles[name])
        if name in times:
            axes[1].plot(np.array(row["step"]) * times[name] / 1000, row["error"], **styles[name])
        axes[2].plot(ica[name]["step"], ica[name]["error"], **styles[name])
    axes[2].axhline(results["fast_ica"], color="gray", linewidth=1, linestyle=":", label="FastICA of sklearn")
    for ax, x, y, title in (
        (axes[0], "iteration", "loss", f"a rotation of SO({n}), by iterations"),
        (axes[1], "time in s", "loss", f"a rotation of SO({n}), by time on one thread"),
        (axes[2], "iteration", "Amari's distance", f"{results['settings']['ica']['n']} independent sources"),
    ):
        ax.set(xlabel=x, ylabel=y, title=title, yscale="log")
    axes[1].set_xscale("log")
    rows = results["timing"]["layers"]
    for name in rows[0]["ms"]:
        points = [(row["n"], row["ms"][name]) for row in rows if row["ms"].get(name) is not None]
        style = styles.get(name, {"color": "black", "linestyle": ":", "label": name})
        axes[3].plot(*zip(*points, strict=True), marker="o", markersize=3, **style)
    axes[3].set(xlabel="width n", ylabel="time of a training step in ms", xscale="log", yscale="log")
    axes[3].set_title("cost of a step, batch 64, one thread")
    _plain_ticks(axes[3], [row["n"] for row in rows])
    for row in results["drift"]:
        axes[4].plot(row["merges"], row["defect"], label=f"P4Orthogonal, n = {row['n']}")
    axes[4].axhline(1e-5, color="gray", linewidth=1, linestyle=":", label="what is asked for")
    axes[4].set(xlabel="merges", ylabel="spectral norm of $A^T A - I$", yscale="log", title="drift in float32")
    axes[4].legend()
    axes[5].axis("off")
    lines = {line.get_label(): line for ax in (axes[2], axes[3]) for line in ax.get_lines()}
    axes[5].legend(lines.values(), lines.keys(), loc="center", fontsize=12, title="in the other panels")
    return figure


def _plain_ticks(ax: plt.Axes, values: list[int]) -> None:
    """These numbers, written out, at a logarithmic axis."""
    ax.set_xticks(values, list(map(str, values)))
    ax.minorticks_off()


def _lipschitz(results: dict[str, Any]) -> plt.Figure:
    figure, axes = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    rows = best(results["lipschitz"], "nll")
    styles = _styles(list(rows))
    for name, row in rows.items():
        axes[0].plot(row["step"], row["nll"], **styles[name])
        axes[1].plot(row["step"], row["effective"], **styles[name])
    axes[1].axhline(1, color="gray", linewidth=1)
    axes[1].set_ylim(0.8, 1.3)
    axes[0].set(xlabel="iteration", ylabel="test NLL in nats", title="an invertible residual network")
    axes[1].set(xlabel="iteration", ylabel="largest spectral norm / bound", title="as the layers are used")
    axes[0].legend(fontsize=8)
    return figure


def _ranks(results: dict[str, Any]) -> plt.Figure:
    figure, axes = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    rows = results["ranks"]
    for i, row in enumerate(rows):
        epochs = range(1, len(row["training_loss"]) + 1)
        line = "-" if row["method"].startswith("rank") else "--"
        axes[0].plot(epochs, row["training_loss"], line, color=f"C{i}" if i < 10 else "black", label=row["method"])
    axes[0].set(xlabel="epoch", ylabel="training loss in nats", yscale="log", title="digits, SGD")
    axes[0].xaxis.get_major_locator().set_params(integer=True)
    axes[0].legend(fontsize=8)
    for prefix, marker in (("rank ", "o"), ("following, rank ", "s")):
        chosen = [(row["method"].removeprefix(prefix), row) for row in rows if row["method"].startswith(prefix)]
        points = [(int(rank), row["training_loss"][-1]) for rank, row in chosen if rank.isdigit()]
        name = "following dense steps" if prefix.startswith("following") else "perturbation of rank k"
        axes[1].plot(*zip(*points, strict=True), marker=marker, label=name)
    standard = next(row for row in rows if row["method"] == "standard")["training_loss"][-1]
    axes[1].axhline(standard, color="black", linestyle=":", label="standard layers")
    axes[1].set(xlabel="rank k", ylabel="training loss at the end in nats", xscale="log", title="which rank is enough")
    _plain_ticks(axes[1], [int(name.split()[1]) for name in (row["method"] for row in rows) if _is_rank(name)])
    axes[1].legend()
    return figure


def _is_rank(method: str) -> bool:
    return method.startswith("rank ") and method.removeprefix("rank ").isdigit()

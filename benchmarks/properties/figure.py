"""The pictures of `properties`: one for each property."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness.colors import color, new_figure, save
from benchmarks.properties.report import best, step_times

__all__ = ["draw"]

_LINES = {
    "P4Lipschitz, N = 1": ":",
    "rank 32": (0, (5, 1)),
    "rank 64": "-.",
    "rank 128": ":",
    "rank 16, convolutions too": (0, (1, 3)),
}


def draw(results: dict[str, Any], folder: Path) -> str:
    """Draw all pictures, and return their paths."""
    functions = {"orthogonal": _orthogonal, "lipschitz": _lipschitz, "ranks": _ranks}
    paths = [save(function(results), folder / f"properties_{name}.png") for name, function in functions.items()]
    return "\n".join(map(str, paths))


def _style(method: str) -> dict[str, Any]:
    """Ours in full lines, all others dashed; in lines of their own what else would have the colour of another."""
    ours = method.startswith(("P4", "following", "rank"))
    line = _LINES.get(method, "-" if ours else "--")
    return {"color": color(method), "linestyle": line, "linewidth": 2.0 if ours else 1.3, "label": method}


def _orthogonal(results: dict[str, Any]) -> Figure:
    figure = new_figure(6.8)
    (iterations, seconds, sources), (cost, drift, rest) = figure.subplots(2, 3)
    rotation, ica = best(results["rotation"]), best(results["ica"])
    n = results["settings"]["rotation"]["n"]
    times = step_times(results, n)
    for name, row in rotation.items():
        iterations.plot(row["step"], row["error"], **_style(name))
        if name in times:
            seconds.plot(np.array(row["step"]) * times[name] / 1000, row["error"], **_style(name))
        sources.plot(ica[name]["step"], ica[name]["error"], **_style(name))
    sources.axhline(results["fast_ica"], color="gray", linewidth=1, linestyle=":", label="FastICA of sklearn")
    iterations.set(xlabel="iterations", ylabel="loss", title=f"rotation of SO({n})", yscale="log")
    seconds.set(xlabel="time on one thread (s)", ylabel="loss", title="the same by time", yscale="log", xscale="log")
    title = f"{results['settings']['ica']['n']} independent sources"
    sources.set(xlabel="iterations", ylabel="Amari's distance", title=title, yscale="log")
    rows = results["timing"]["layers"]
    for name in rows[0]["ms"]:
        points = [(row["n"], row["ms"][name]) for row in rows if row["ms"].get(name) is not None]
        cost.plot(*zip(*points, strict=True), marker="o", markersize=3, **_style(name))
    cost.set(
        xlabel="width n", ylabel="training step (ms)", title="cost of a step, batch 64", xscale="log", yscale="log"
    )
    _plain_ticks(cost, [row["n"] for row in rows])
    for row, line in zip(results["drift"], ("-", "--", ":"), strict=False):
        style = {"color": color("P4Orthogonal"), "linestyle": line, "label": f"n = {row['n']}"}
        # What is exactly zero, as at the start, has no place on a logarithmic axis.
        drift.plot(row["merges"], [defect or np.nan for defect in row["defect"]], **style)
    drift.axhline(1e-5, color="gray", linewidth=1, linestyle=":", label="our goal")
    drift.set(xlabel="merges", ylabel="spectral norm of AᵀA − I", title="P4Orthogonal in float32", yscale="log")
    drift.legend()
    rest.set_axis_off()
    lines = {label: line for ax in (cost, sources) for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    rest.legend(lines.values(), lines.keys(), loc="center")
    return figure


def _lipschitz(results: dict[str, Any]) -> Figure:
    figure = new_figure(4.2)
    nll, norm = figure.subplots(1, 2)
    for name, row in best(results["lipschitz"], "validation").items():
        nll.plot(row["step"], row["nll"], **_style(name))
        norm.plot(row["step"], row["effective"], **_style(name))
    norm.axhline(1, color="gray", linewidth=1)
    # Without a bound the norms go to 7, and the NLL to 16 and back.
    norm.set_ylim(0.8, 2.2)
    nll.set_ylim(2.4, 4.2)
    nll.set(xlabel="iterations", ylabel="test NLL (nats)", title="an invertible residual network")
    norm.set(xlabel="iterations", ylabel="largest spectral norm / bound", title="as the layers are used")
    figure.legend(*nll.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _ranks(results: dict[str, Any]) -> Figure:
    figure = new_figure(4.6)
    curves, ends = figure.subplots(1, 2)
    rows = results["ranks"]
    for row in rows:
        epochs = range(1, len(row["training_loss"]) + 1)
        curves.plot(epochs, row["training_loss"], **_style(row["method"]))
    curves.set(xlabel="epoch", ylabel="training loss (nats)", yscale="log", title="digits, SGD")
    curves.xaxis.get_major_locator().set_params(integer=True)
    for prefix, label in (("rank ", "P4Linear"), ("following, rank ", "following dense steps")):
        chosen = [(row["method"].removeprefix(prefix), row) for row in rows if row["method"].startswith(prefix)]
        points = [(int(rank), row["training_loss"][-1]) for rank, row in chosen if rank.isdigit()]
        ends.plot(*zip(*points, strict=True), marker="o", color=color(f"{prefix}16"), label=label)
    ranks = [int(row["method"].removeprefix("rank ")) for row in rows if row["method"].removeprefix("rank ").isdigit()]
    standard = next(row for row in rows if row["method"] == "standard")["training_loss"][-1]
    ends.axhline(standard, color=color("standard"), linestyle=":", label="standard layers")
    ends.set(xlabel="rank k", ylabel="training loss at the end (nats)", xscale="log", title="which rank is enough")
    _plain_ticks(ends, ranks)
    ends.legend()
    figure.legend(*curves.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _plain_ticks(ax: Axes, values: list[int]) -> None:
    """These numbers, written out, at a logarithmic axis."""
    ax.set_xticks(values, list(map(str, values)))
    ax.minorticks_off()

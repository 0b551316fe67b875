"""The pictures of `wide`: what each method has after so many seconds of training, by the width."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.harness.colors import color, new_figure, save
from benchmarks.speed.wide_curves import OURS, Case, Cases, by_case, kept
from benchmarks.speed.wide_training import BOTH

__all__ = ["draw"]

_LINES = {"P4Inv, rank 8": "--", "P4Inv, rank 32": ":", "random": "--"}
_MARGIN = 0.05


def draw(results: dict[str, Any], path: Path) -> Path:
    """The first kind of training to ``path``, one panel a width; all kinds, if there are more, beside it; the path."""
    kinds: dict[tuple[str, str, int], Cases] = {}
    for (problem, directions, couplings, n), methods in by_case(results).items():
        case = problem, directions, couplings, n
        kinds.setdefault(case[:3], {})[case] = methods
    first = next(iter(kinds.values()))
    across = min(2, len(first))
    _draw([list(first.items())[i : i + across] for i in range(0, len(first), across)], 3.2, path)
    if len(kinds) > 1:
        _draw([list(cases.items()) for cases in kinds.values()], 2.3, path.with_stem(f"{path.stem}_all"))
    return path


def _draw(grid: list[list[tuple[Case, dict[str, list[dict[str, Any]]]]]], height: float, path: Path) -> None:
    figure = new_figure(0.8 + height * len(grid))
    axes = figure.subplots(len(grid), max(map(len, grid)), squeeze=False)
    handles: dict[str, Any] = {}
    for line, cases in zip(axes, grid, strict=True):
        line[0].set_ylabel(_unit(cases[0][0][0]))
        for ax, (case, methods) in zip(line, cases, strict=False):
            _panel(ax, case, methods)
            handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
        for ax in line[len(cases) :]:
            ax.set_visible(False)
    for ax in axes[-1]:
        ax.set_xlabel("seconds of training")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    save(figure, path)


def _unit(problem: str) -> str:
    return "gap to the optimum\n(nats a dimension)" if problem == "gaussian" else "test NLL\n(nats a dimension)"


def _panel(ax: plt.Axes, case: Case, methods: dict[str, list[dict[str, Any]]]) -> None:
    """A line for each seed, of the test NLL against time; what is worse than at the start is beyond the upper edge."""
    problem, directions, couplings, n = case
    curves = []
    for method, rows in methods.items():
        style = {"color": color(method), "linestyle": _LINES.get(method, "-")}
        style |= {"linewidth": 2.2, "zorder": 3} if method.startswith(OURS) else {"linewidth": 1.5}
        for i, row in enumerate(rows):
            curves.append(kept(row))
            ax.plot(row["seconds"][1:], curves[-1][1:], label=method if i == 0 else None, **style)
    start, least = max(curve[0] for curve in curves), min(curve.min() for curve in curves)
    ax.set_xscale("log")
    if problem == "gaussian" and least > 0:
        ax.set_yscale("log")
        ax.set_ylim(0.8 * least, 1.1 * start)
    else:
        ax.set_ylim(least - _MARGIN * (start - least), start + _MARGIN * (start - least))
    flow = f", {couplings} couplings" if couplings else ""
    ax.set_title(f"{problem}, n = {n}{flow}" + (", both directions" if directions == BOTH else ""))

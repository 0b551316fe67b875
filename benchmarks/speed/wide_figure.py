"""The pictures of `wide`: what each method has after so many seconds of training, by the width."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.harness.colors import color, new_figure, save
from benchmarks.speed.wide_curves import BOTH, GAUSSIAN, OURS, Kind, Methods, by_case, kept

__all__ = ["draw"]

_LINES = {"P4Inv, rank 8": "--", "P4Inv, rank 32": ":", "random": "--"}
_MARGIN = 0.05


def draw(results: dict[str, Any], path: Path) -> Path:
    """The first kind of training to ``path``, one panel a width; all kinds, if there are more, beside it; the path."""
    kinds: dict[Kind, dict[int, Methods]] = {}
    for (*kind, n), methods in by_case(results).items():
        kinds.setdefault(tuple(kind), {})[n] = methods
    first, widths = next(iter(kinds.items()))
    across = min(2, len(widths))
    lines = [list(widths.items())[i : i + across] for i in range(0, len(widths), across)]
    _draw([(first, line) for line in lines], 3.0, path)
    if len(kinds) > 1:
        _draw([(kind, list(widths.items())) for kind, widths in kinds.items()], 2.3, path.with_stem(f"{path.stem}_all"))
    return path


def _draw(grid: list[tuple[Kind, list[tuple[int, Methods]]]], height: float, path: Path) -> None:
    figure = new_figure(0.8 + height * len(grid))
    axes = figure.subplots(len(grid), max(len(line) for _, line in grid), squeeze=False)
    handles: dict[str, Any] = {}
    for places, (kind, line) in zip(axes, grid, strict=True):
        places[0].set_ylabel(_label(kind))
        for ax, (n, methods) in zip(places, line, strict=False):
            ax.set_title(f"n = {n}")
            _panel(ax, methods, logarithmic=kind[0] == GAUSSIAN)
            handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
        for ax in places[len(line) :]:
            ax.set_visible(False)
    for ax in axes[-1]:
        ax.set_xlabel("seconds of training")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    save(figure, path)


def _label(kind: Kind) -> str:
    problem, directions, couplings = kind
    flow = f"{couplings} couplings, " if couplings else ""
    unit = "gap to the optimum" if problem == GAUSSIAN else "test NLL"
    way = "both directions" if directions == BOTH else directions
    return f"{problem}, {flow}{way}\n{unit}\n(nats a dimension)"


def _panel(ax: plt.Axes, methods: Methods, logarithmic: bool) -> None:
    """A line for each seed, of the test NLL against time; what is worse than at the start is beyond the upper edge."""
    curves = []
    for method, rows in methods.items():
        style = {"color": color(method), "linestyle": _LINES.get(method, "-")}
        style |= {"linewidth": 2.2, "zorder": 3} if method.startswith(OURS) else {"linewidth": 1.5}
        for i, row in enumerate(rows):
            curves.append(kept(row))
            ax.plot(row["seconds"][1:], curves[-1][1:], label=method if i == 0 else None, **style)
    start, least = max(curve[0] for curve in curves), min(curve.min() for curve in curves)
    _plain_logarithmic(ax.set_xscale, ax.xaxis)
    if logarithmic and least > 0:
        _plain_logarithmic(ax.set_yscale, ax.yaxis)
        ax.set_ylim(0.8 * least, 1.1 * start)
    else:
        margin = _MARGIN * (start - least)
        ax.set_ylim(least - margin, start + margin)


def _plain_logarithmic(set_scale: Callable[[str], None], axis: Axis) -> None:
    """Plain numbers at 1, 2 and 5 of every decade, as an axis may have less than one."""
    set_scale("log")
    axis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())

"""How pictures look: one colour for each method in all of them, and the width of a README's column."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

__all__ = ["WIDTH", "color", "new_figure", "save"]

WIDTH = 9.0
"""Inches. A README shows a picture about 900 pixels wide, where text of 9 points is 12 pixels high."""

_DOTS = 180  # an inch: twice what is shown, for screens of high density
_TEXT = {"font.size": 9, "axes.titlesize": 10, "legend.fontsize": 8.5, "axes.grid": True, "grid.alpha": 0.25}

_P4INV, _RANK_ONE = "#1b7837", "#8fd18b"
_FOLLOWED, _RANK_ONE_FOLLOWED = "#2166ac", "#92c5de"  # a dense weight is
_FULL_SHADE = 16  # the rank from which colours are not lighter
_COLORS = {
    "P4Inv": _P4INV,
    "P4Inv, default rank": _P4INV,
    "P4InvStack": _P4INV,
    "P4Inv through its inverse": "#00b8a9",
    "InvertibleLinear": _FOLLOWED,
    # Without a tracked inverse.
    "standard": "#000000",
    "nn.Linear": "#000000",
    "dense": "#7b3f00",
    "dense inv": "#7b3f00",
    "dense solve": "#b58863",
    "nflows NaiveLinear": "#d8b99a",
    "LU": "#d6278a",
    "nflows LULinear": "#d6278a",
    "normflows LULinearPermute": "#e377b6",
    "zuko LULinearTransform": "#f2b3d6",
    "nflows QRLinear": "#8c8c00",
    "nflows SVDLinear": "#bdbd4a",
    "geotorch GLp": "#e6c229",
    "bgflow": "#762a83",
    "bgflow InvertiblePPPP": "#762a83",
    "bgflow, no correction": "#b694c4",
    # Of other properties.
    "P4Orthogonal": _P4INV,
    "P4Lipschitz, N = 10": _P4INV,
    "P4Lipschitz, N = 1": _P4INV,
    "reflections, rank 8": "#00b8a9",
    "torch, matrix_exp": "#d6278a",
    "torch, cayley": "#e377b6",
    "torch, householder": "#8c8c00",
    "geotorch": "#e6c229",
    "torch, spectral_norm": "#d6278a",
    "no bound": "#000000",
    # Fixed swaps.
    "RealNVP": "#e08214",
    "splines": "#e08214",
    "reversed": "#e08214",
    "random": "#f7b05b",
    # What is no method.
    "MD": "#444444",
    "MD + 0.004 nm": "#aaaaaa",
    "limit": "#888888",
}


def color(method: str) -> str:
    """The colour of a method by its name, "RealNVP + P4Inv" being P4Inv; lower ranks of ours are lighter.

    ValueError for a name that has none: give it one here.
    """
    name = re.sub(r"^(RealNVP|splines) \+ ", "", method)
    if name in _COLORS:
        return _COLORS[name]
    found = re.match(r"(?:P4\w*,? |following, |)rank (\d+)", name)
    if not found:
        raise ValueError(f"method: expected a name that has a colour, got {method!r}")
    share = min(1.0, math.log2(int(found[1])) / math.log2(_FULL_SHADE))
    light, dark = (_RANK_ONE_FOLLOWED, _FOLLOWED) if name.startswith("following") else (_RANK_ONE, _P4INV)
    return to_hex([a + share * (b - a) for a, b in zip(to_rgb(light), to_rgb(dark), strict=True)])


def new_figure(height: float) -> Figure:
    """An empty figure of :data:`WIDTH` times ``height`` inches."""
    plt.switch_backend("agg")
    plt.rcParams.update(_TEXT)
    return plt.figure(figsize=(WIDTH, height), layout="constrained")


def save(figure: Figure, path: Path, **options: Any) -> Path:
    """Write the figure as a picture, and forget it."""
    figure.savefig(path, dpi=_DOTS, **options)
    plt.close(figure)
    return path

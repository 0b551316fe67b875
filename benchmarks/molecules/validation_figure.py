"""The picture of `validation`: marginals of φ and ψ at two temperatures, by three ways to simulate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

__all__ = ["draw"]

_COLORS = {"OpenMM's script": "#404040", "simulate": "#2166ac", "replica exchange": "#1b7837"}


def draw(results: dict[str, Any], path: Path) -> Path:
    plt.switch_backend("agg")
    temperatures = sorted({row["temperature"] for row in results["rows"]})
    figure, axes = plt.subplots(
        len(temperatures), 2, figsize=(9, 3 * len(temperatures)), sharex=True, layout="constrained"
    )
    edges = np.linspace(-180, 180, results["bins"] + 1)
    middle, width = (edges[1:] + edges[:-1]) / 2, np.radians(edges[1] - edges[0])
    for line, temperature in zip(axes, temperatures, strict=True):
        for row in (row for row in results["rows"] if row["temperature"] == temperature):
            for ax, name in zip(line, ("phi", "psi"), strict=True):
                density, error = (np.array(row[key]) / width for key in (name, f"{name}_error"))
                ax.errorbar(middle, density, error, color=_COLORS[row["way"]], label=row["way"], lw=1.2, elinewidth=0.8)
        for ax, name in zip(line, ("φ", "ψ"), strict=True):
            ax.set_title(f"{name} at {temperature} K, where φ < 0", fontsize=10)
            ax.set_ylim(0)
    axes[0, 0].legend(frameon=False, fontsize=8)
    for ax in axes[-1]:
        ax.set_xticks(range(-180, 181, 90))
        ax.set_xlabel("degrees")
    for ax in axes[:, 0]:
        ax.set_ylabel("density (1/rad)")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path

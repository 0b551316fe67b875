"""Pictures of Boltzmann generators in the manner of Figure 7: energies beside Ramachandran plots, training curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch

from benchmarks.paper.boltzmann import Samples

__all__ = ["draw"]

_COLORS = {"MD": "#444444", "MD + 0.004 nm": "#e08214"}
_COLORS |= dict.fromkeys(("RealNVP", "splines"), "#2166ac") | dict.fromkeys(
    ("RealNVP + P4Inv", "splines + P4Inv"), "#1b7837"
)


def draw(samples: dict[str, Samples], rows: dict[str, Any], path: Path, stages: tuple[str, ...] = ()) -> Path:
    """``rows`` has what was measured for each origin of samples; with ``stages``, the training curves under these."""
    plt.switch_backend("agg")
    figure = plt.figure(figsize=(17, 9.2 if stages else 4.9), layout="constrained")
    upper = figure
    if stages:
        upper, lower = figure.subfigures(2, 1, height_ratios=[1.15, 1])
        for ax, stage in zip(lower.subplots(1, len(stages)), stages, strict=True):
            _curves(ax, rows, stage)
    left, right = upper.subfigures(1, 2, width_ratios=[1, 2.3])
    _energies(left.subplots(), samples, rows)
    names = [name for name in samples if name != "MD + 0.004 nm"]
    axes = right.subplots(1, len(names), sharey=True)
    for ax, name in zip(axes, names, strict=True):
        image = _ramachandran(ax, samples[name])
        ax.set_title(f"{name}: JS to held-out MD {rows[name]['ramachandran_js']:.4f}", fontsize=11, color=_COLORS[name])
        ax.set_xlabel("φ (degrees)")
    axes[0].set_ylabel("ψ (degrees)")
    right.colorbar(image, ax=axes, label="free energy (kT)", shrink=0.8, pad=0.01)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _energies(ax: plt.Axes, samples: dict[str, Samples], rows: dict[str, Any]) -> None:
    low = samples["MD"].energy.min().item() - 3
    high = low + 85
    ticks = []
    for i, (name, s) in enumerate(samples.items()):
        shown = s.energy[s.energy < high].numpy()
        parts = ax.violinplot(shown, [i], widths=0.85, showextrema=False, points=200)
        for body in parts["bodies"]:
            body.set(facecolor=_COLORS[name], alpha=0.75)
        median = torch.median(s.energy).item()
        ax.hlines(median, i - 0.3, i + 0.3, color="black")
        ax.text(i + 0.32, median, f"{median:.1f}", va="center", fontsize=10)
        ticks.append(f"{name.replace(' + ', chr(10) + '+ ')}\n{100 * rows[name]['low_energy_fraction']:.1f} % low")
    ax.set_xticks(range(len(ticks)), ticks)
    ax.set_xlim(-0.6, len(ticks) - 0.3)
    ax.set_ylim(low, high)
    ax.set_ylabel("u(x) (kT)")
    ax.set_title("Energies; medians, and fraction below the highest of MD", fontsize=11)


def _curves(ax: plt.Axes, rows: dict[str, Any], stage: str) -> None:
    for name, row in rows.items():
        if stage in row:
            training = row[stage]
            steps = np.linspace(0, training["steps"], len(training["curve"]) + 1)[1:]
            ax.plot(steps, training["curve"], color=_COLORS[name], label=name)
            # The first steps would hide the rest.
            low, high = np.quantile(training["curve"], [0, 0.9])
            ax.set_ylim(min(low - 0.1 * (high - low), ax.get_ylim()[0]), high + (high - low))
    ax.set_xlabel("step")
    ax.set_title(f"loss, training by {stage}", fontsize=11)
    ax.legend()


def _ramachandran(ax: plt.Axes, s: Samples):
    edges = np.linspace(-180, 180, 61)
    counts, _, _ = np.histogram2d(np.degrees(s.phi.numpy()), np.degrees(s.psi.numpy()), edges)
    with np.errstate(divide="ignore"):
        free_energy = -np.log(counts / counts.max())
    free_energy[counts == 0] = np.nan
    ax.set_aspect("equal")
    ax.set_xticks(range(-180, 181, 90))
    ax.set_yticks(range(-180, 181, 90))
    return ax.pcolormesh(edges, edges, free_energy.T, cmap="viridis", vmin=0, vmax=7)

"""Pictures of Boltzmann generators in the manner of Figure 7: energies beside Ramachandran plots, training curves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch

from benchmarks.harness.colors import color, new_figure, save
from benchmarks.paper.boltzmann import Samples

__all__ = ["draw"]

_PERTURBED = "MD + 0.004 nm"
_BINS = 48
_MARGIN = 3.0  # kT, below the lowest energy of MD
_SHOWN = 85.0  # kT, of energies above that


def draw(samples: dict[str, Samples], rows: dict[str, Any], path: Path, stages: tuple[str, ...] = ()) -> Path:
    """``rows`` has what was measured for each origin of samples; with ``stages``, the training curves under these."""
    # The plots above are square: the more of them, the less high.
    square = 0.9 + 8.0 / sum(name != _PERTURBED for name in samples)
    heights = [square, 3.2, 3.0] if stages else [square, 3.2]
    figure = new_figure(sum(heights))
    parts = figure.subfigures(len(heights), 1, height_ratios=heights)
    _ramachandran_plots(parts[0], samples, rows)
    _energies(parts[1].subplots(), samples, rows)
    if stages:
        for ax, stage in zip(parts[2].subplots(1, len(stages)), stages, strict=True):
            _curves(ax, rows, stage)
    return save(figure, path)


def _ramachandran_plots(figure: Any, samples: dict[str, Samples], rows: dict[str, Any]) -> None:
    names = [name for name in samples if name != _PERTURBED]
    # As many samples of each, and one scale: so that the plots can be compared, and end where the colour bar does.
    count = min(len(samples[name].phi) for name in names)
    surfaces = {name: _free_energy(samples[name], count) for name in names}
    highest = max(np.nanmax(surface) for surface in surfaces.values())
    axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    edges = np.linspace(-180, 180, _BINS + 1)
    for ax, name in zip(axes, names, strict=True):
        ax.grid(False)
        image = ax.pcolormesh(edges, edges, surfaces[name].T, cmap="viridis", vmin=0, vmax=highest)
        divergence = rows[name]["ramachandran_js"]
        what = "training data" if name == "MD" else name
        ax.set_title(f"{what}\nJS to held-out MD:\n{divergence:.4f} nats", fontsize=9)
        ax.set_xlabel("φ (degrees)")
        ax.set_aspect("equal")
        ax.set_xticks(range(-180, 181, 90))
        ax.set_yticks(range(-180, 181, 90))
    axes[0].set_ylabel("ψ (degrees)")
    figure.colorbar(image, ax=axes, label=f"free energy (kT), {count:,} samples each", pad=0.01, shrink=0.68)


def _free_energy(s: Samples, count: int) -> np.ndarray:
    """-ln of the counts of the first ``count`` samples on bins of φ and ψ, from zero; NaN where there is none."""
    edges = np.linspace(-180, 180, _BINS + 1)
    counts, _, _ = np.histogram2d(np.degrees(s.phi[:count].numpy()), np.degrees(s.psi[:count].numpy()), edges)
    with np.errstate(divide="ignore"):
        free_energy = -np.log(counts / counts.max())
    free_energy[counts == 0] = math.nan
    return free_energy


def _energies(ax: plt.Axes, samples: dict[str, Samples], rows: dict[str, Any]) -> None:
    low = samples["MD"].energy.min().item() - _MARGIN
    high = low + _SHOWN
    ticks = []
    for i, (name, s) in enumerate(samples.items()):
        shown = s.energy[s.energy < high].numpy()
        parts = ax.violinplot(shown, [i], widths=0.85, showextrema=False, points=200)
        for body in parts["bodies"]:
            body.set(facecolor=color(name), alpha=0.8)
        median = torch.median(s.energy).item()
        ax.hlines(median, i - 0.3, i + 0.3, color="black")
        low_share = 100 * rows[name]["low_energy_fraction"]
        ticks.append(f"{name}\nmedian {median:.1f} kT\n{low_share:.1f} % below\nMD's highest")
    ax.set_xticks(range(len(ticks)), ticks)
    ax.set_xlim(-0.6, len(ticks) - 0.4)
    ax.set_ylim(low, high)
    ax.set_ylabel("energy u(x) (kT)")


def _curves(ax: plt.Axes, rows: dict[str, Any], stage: str) -> None:
    limits = []
    for name, row in rows.items():
        if stage in row:
            training = row[stage]
            steps = np.linspace(0, training["steps"], len(training["curve"]) + 1)[1:]
            ax.plot(steps, training["curve"], color=color(name), label=name)
            # The first steps would hide the rest.
            low, high = np.quantile(training["curve"], [0, 0.9])
            limits.append((low - 0.1 * (high - low), high + (high - low)))
    lows, highs = zip(*limits, strict=True)
    ax.set_ylim(min(lows), max(highs))
    ax.locator_params(axis="x", nbins=5)
    ax.set_xlabel("optimizer step")
    ax.set_ylabel("training loss (nats)")
    ax.set_title(f"training by {'likelihood' if stage == 'likelihood' else 'likelihood and energy'}")
    ax.legend()

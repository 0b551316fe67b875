"""The picture of `density2d`, in the manner of Figures 6 and 8: true densities beside those of the models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness.colors import new_figure, save
from benchmarks.paper.toy_densities import DISTRIBUTIONS

__all__ = ["draw"]

_HALF_WIDTH = 4.5
_LABELS = {"P4Inv through its inverse": "P4Inv through\nits inverse"}


def draw(densities: dict[str, dict[str, Tensor]], rows: list[dict[str, Any]], path: Path) -> Path:
    """A column for each distribution, and under each model's density its held-out NLL.

    One scale of colours a column, from zero to the peak of the truth, so that panels of a column can be compared.
    """
    nll = {(row["distribution"], row["model"]): row["nll"] for row in rows}
    models = list(densities)
    figure = new_figure(1.05 * (1 + len(models)) + 0.35)
    axes = figure.subplots(1 + len(models), len(DISTRIBUTIONS))
    for column, (name, distribution) in zip(axes.T, DISTRIBUTIONS.items(), strict=True):
        x = distribution.sample(400_000, torch.Generator().manual_seed(0))
        edges = np.linspace(-_HALF_WIDTH, _HALF_WIDTH, 181)
        truth = np.histogram2d(*x.numpy().T, edges, density=True)[0]
        # Where there is no noise, the peak of the histogram depends on its bins.
        peak = np.quantile(truth[truth > 0], 0.98)
        for ax, density in zip(column, (truth, *(densities[model][name].numpy() for model in models)), strict=True):
            ax.grid(False)
            extent = [-_HALF_WIDTH, _HALF_WIDTH] * 2
            image = ax.imshow(density.T / peak, origin="lower", vmin=0, vmax=1, cmap="magma", extent=extent)
            ax.set_xticks([])
            ax.set_yticks([])
        column[0].set_title(name, fontsize=9)
        for ax, model in zip(column[1:], models, strict=True):
            ax.set_xlabel(f"{nll[name, model]:.3f}", fontsize=8.5, labelpad=2)
    for ax, label in zip(axes[:, 0], ("truth\n(samples)", *models), strict=True):
        ax.set_ylabel(_LABELS.get(label, label))
    bar = figure.colorbar(image, ax=axes, ticks=[0, 1], shrink=0.5, pad=0.01, aspect=30)
    bar.ax.set_yticklabels(["0", "peak of\nthe truth"])
    bar.set_label("density", labelpad=-18)
    figure.supxlabel("below the panels: held-out NLL in nats", fontsize=9)
    return save(figure, path)

"""The picture of `density2d`, in the manner of Figures 6 and 8: true densities beside those of the models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from benchmarks.paper.toy_densities import DISTRIBUTIONS

__all__ = ["draw"]

_HALF_WIDTH = 4.5


def draw(densities: dict[str, dict[str, Tensor]], rows: list[dict[str, Any]], path: Path) -> Path:
    plt.switch_backend("agg")
    nll = {(row["distribution"], row["model"]): row["nll"] for row in rows}
    models = list(densities)
    count = len(DISTRIBUTIONS)
    figure, axes = plt.subplots(
        1 + len(models), count, figsize=(2.1 * count, 2.3 * (1 + len(models))), layout="constrained"
    )
    for column, (name, distribution) in zip(axes.T, DISTRIBUTIONS.items(), strict=True):
        x = distribution.sample(400_000, torch.Generator().manual_seed(0))
        edges = np.linspace(-_HALF_WIDTH, _HALF_WIDTH, 181)
        truth = np.histogram2d(*x.numpy().T, edges, density=True)[0]
        # Where there is no noise, the peak of the histogram depends on its bins.
        peak = np.quantile(truth[truth > 0], 0.98)
        for ax, image in zip(column, (truth, *(densities[model][name].numpy() for model in models)), strict=True):
            ax.imshow(image.T, origin="lower", vmin=0, vmax=peak, cmap="magma", extent=[-_HALF_WIDTH, _HALF_WIDTH] * 2)
            ax.set_xticks([])
            ax.set_yticks([])
        column[0].set_title(name)
        for ax, model in zip(column[1:], models, strict=True):
            ax.set_title(f"NLL {nll[name, model]:.3f}", fontsize=9)
    for ax, label in zip(axes[:, 0], ("truth (samples)", *models), strict=True):
        ax.set_ylabel(label)
    figure.savefig(path, dpi=90)
    plt.close(figure)
    return path

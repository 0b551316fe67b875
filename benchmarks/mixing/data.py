"""Real data of different kinds, standardised: (training, held-out) rows in float32."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_digits, load_sample_images
from torch import Tensor

from benchmarks.paper.boltzmann import load_data

__all__ = ["DATASETS", "load"]


def _digits(rng: np.random.Generator) -> np.ndarray:
    """1,797 handwritten digits, 64 pixels of 17 gray values, dequantised."""
    x = load_digits().data
    return x + rng.random(x.shape)


def _patches(rng: np.random.Generator) -> np.ndarray:
    """20,000 patches of 8 × 8 pixels from two photographs, gray, dequantised; the mean is a coordinate like others."""
    images = [image.mean(-1) for image in load_sample_images().images]
    rows = []
    for image in images:
        corners = (rng.integers(0, size - 8, 10_000) for size in image.shape)
        rows += [image[i : i + 8, j : j + 8].ravel() for i, j in zip(*corners, strict=True)]
    x = np.array(rows)
    return x + rng.random(x.shape)


def _breast_cancer(rng: np.random.Generator) -> np.ndarray:
    """30 measures of cell nuclei of 569 patients, most of them skewed: logarithms."""
    return np.log(load_breast_cancer().data + 1e-3)


DATASETS: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "digits": _digits,
    "image-patches": _patches,
    "breast-cancer": _breast_cancer,
}


_MOLECULE = "alanine-dipeptide"
_HELD_OUT = 10_000  # at most, as it is measured often


@lru_cache(1)
def _molecule(frames: int) -> tuple[Tensor, Tensor]:
    data = load_data(frames)
    return data.z, data.test_z[:_HELD_OUT]


def load(name: str, seed: int = 0, frames: int = 250_000) -> tuple[Tensor, Tensor]:
    """A fifth is held out; both parts are standardised by the training part. ``frames`` is for the molecule."""
    if name == _MOLECULE:
        return _molecule(frames)
    rng = np.random.default_rng(seed)
    x = DATASETS[name](rng)
    x = x[rng.permutation(len(x))]
    split = len(x) // 5
    mean, deviation = x[split:].mean(0), x[split:].std(0)
    deviation[deviation == 0] = 1
    x = torch.tensor((x - mean) / deviation, dtype=torch.float32)
    return x[split:], x[:split]

"""Real data of different kinds: rows for training, validation and test, standardised by the first."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

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


def _patches(size: int, rng: np.random.Generator) -> np.ndarray:
    """20,000 patches of size × size pixels from two photographs, gray, dequantised; the mean is one coordinate."""
    images = [image.mean(-1) for image in load_sample_images().images]
    rows = []
    for image in images:
        corners = (rng.integers(0, length - size, 10_000) for length in image.shape)
        rows += [image[i : i + size, j : j + size].ravel() for i, j in zip(*corners, strict=True)]
    x = np.array(rows, dtype=np.float32)
    return x + rng.random(x.shape)


def _breast_cancer(rng: np.random.Generator) -> np.ndarray:
    """30 measures of cell nuclei of 569 patients, most of them skewed: logarithms."""
    return np.log(load_breast_cancer().data + 1e-3)


DATASETS: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "digits": _digits,
    "image-patches": partial(_patches, 8),
    "image-patches-16": partial(_patches, 16),
    "image-patches-32": partial(_patches, 32),
    "breast-cancer": _breast_cancer,
}


_MOLECULE = "alanine-dipeptide"
_MEASURED = 4_000  # at most of validation and of test rows, as the former are measured often


@lru_cache(1)
def _molecule(frames: int) -> tuple[Tensor, Tensor, Tensor]:
    data = load_data(frames)  # in random order
    validation = len(data.test_z) // 2
    return data.z, data.test_z[:validation], data.test_z[validation:]


@lru_cache(1)
def load(name: str, seed: int = 0, frames: int = 60_000) -> tuple[Tensor, Tensor, Tensor]:
    """Rows in float32: a fifth for validation, a fifth for test, the rest for training. ``frames``: the molecule's."""
    if name == _MOLECULE:
        training, *rest = _molecule(frames)
    else:
        rng = np.random.default_rng(seed)
        x = DATASETS[name](rng)
        x = x[rng.permutation(len(x))]
        fifth = len(x) // 5
        mean, deviation = x[2 * fifth :].mean(0), x[2 * fifth :].std(0)
        deviation[deviation == 0] = 1
        x = torch.tensor((x - mean) / deviation, dtype=torch.float32)
        training, *rest = x[2 * fifth :], x[:fifth], x[fifth : 2 * fifth]
    return training, rest[0][:_MEASURED], rest[1][:_MEASURED]

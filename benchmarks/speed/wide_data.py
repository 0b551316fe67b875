"""What `wide` trains on: patches of photographs, and a Gaussian of which the best possible likelihood is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Protocol

import torch
from sklearn.datasets import load_sample_images
from torch import Generator, Tensor

from benchmarks.speed.wide_curves import GAUSSIAN

__all__ = ["PROBLEMS", "Gaussian", "Patches", "Source", "load"]

_BLOCK = (106, 128)  # pixels; four by five of them are in a photograph
_PARTS = 5  # of which one is for validation and one for test
_ROWS = 4_000  # from which variances are estimated
_LEAST_VARIANCE = 0.05
_CONDITION = 100.0


class Source(Protocol):
    """Rows of n features, drawn anew for every step, and an energy for training in the other direction."""

    features: int
    known: bool
    """Whether ``exp(-energy)`` is the density of the rows, so that no flow can have a lower mean NLL than its mean."""

    def draw(self, count: int, generator: Generator, part: str = "training") -> Tensor:
        """``count`` rows (count, n) of the part for training, validation or test."""

    def energy(self, x: Tensor) -> Tensor:
        """A normalised negative log-density at rows x (N, n), (N,)."""


class Patches:
    """Patches of √n × √n pixels of two photographs, gray, dequantised and standardised.

    Each photograph is cut into twenty blocks; four are for validation, four for test and the others for training, and
    no patch reaches from one block into another. The energy is that of independent Gaussian coefficients of the
    discrete cosine transform, with the variances that they have in the training part, but at least 0.05.
    """

    known = False

    def __init__(self, n: int, device: torch.device) -> None:
        self.features, self._size = n, math.isqrt(n)
        height, width = _BLOCK
        if self._size**2 != n or self._size > height:
            raise ValueError(f"n: expected the square of a number up to {height}, got {n}")
        blocks: dict[str, list[Tensor]] = {"validation": [], "test": [], "training": []}
        for i, image in enumerate(load_sample_images().images):
            gray = torch.tensor(image, dtype=torch.float32, device=device).mean(-1)
            for row in range(gray.shape[0] // height):
                for column in range(gray.shape[1] // width):
                    kind = ("validation", "test", *["training"] * (_PARTS - 2))[(column + 2 * row + i) % _PARTS]
                    top, left = row * height, column * width
                    blocks[kind].append(gray[top : top + height, left : left + width])
        pixels = torch.stack(blocks["training"])
        self._mean, self._deviation = pixels.mean() + 0.5, (pixels.var() + 1 / 12).sqrt()
        self._windows = {
            kind: torch.stack(found).unfold(1, self._size, 1).unfold(2, self._size, 1) for kind, found in blocks.items()
        }
        k = torch.arange(self._size, device=device)
        cosines = (math.pi / self._size * k[:, None] * (k + 0.5)).cos() * (2 / self._size) ** 0.5
        cosines[0] *= 0.5**0.5
        self._cosines = cosines
        rows = self.draw(_ROWS, Generator(device).manual_seed(0))
        self._variances = self._coefficients(rows).square().mean(0).clamp(min=_LEAST_VARIANCE)

    def draw(self, count: int, generator: Generator, part: str = "training") -> Tensor:
        windows = self._windows[part]
        places = (
            torch.randint(length, (count,), generator=generator, device=generator.device)
            for length in windows.shape[:3]
        )
        x = windows[tuple(places)].flatten(1)
        noise = torch.rand(x.shape, generator=generator, device=generator.device)
        return (x + noise - self._mean) / self._deviation

    def energy(self, x: Tensor) -> Tensor:
        squares = self._coefficients(x).square() / self._variances
        return 0.5 * (squares + (2 * math.pi * self._variances).log()).sum((-2, -1))

    def _coefficients(self, x: Tensor) -> Tensor:
        return self._cosines @ x.unflatten(-1, (self._size, self._size)) @ self._cosines.T


class Gaussian:
    """Correlated features of mean 0: the variances of n directions are spread evenly over two decades, in logarithm.

    The directions are the columns of Q = H S H, with the Hartley transform H and random signs S. Q is orthogonal and
    its own inverse, it mixes all features with all, and it costs O(n log n).
    """

    known = True

    def __init__(self, n: int, device: torch.device) -> None:
        self.features = n
        signs = 2 * torch.randint(2, (n,), generator=Generator().manual_seed(n)) - 1
        variances = _CONDITION ** -torch.linspace(0, 1, n, dtype=torch.float64)
        self._signs = signs.to(device, torch.float32)
        self._deviations = (variances / variances.mean()).sqrt().to(device, torch.float32)

    def draw(self, count: int, generator: Generator, part: str = "training") -> Tensor:
        z = torch.randn(count, len(self._signs), generator=generator, device=generator.device)
        return self._rotate(self._deviations * z)

    def energy(self, x: Tensor) -> Tensor:
        z = self._rotate(x) / self._deviations
        return 0.5 * (z.square() + (2 * math.pi * self._deviations.square()).log()).sum(-1)

    def _rotate(self, x: Tensor) -> Tensor:
        return _hartley(self._signs * _hartley(x))


def _hartley(x: Tensor) -> Tensor:
    """An orthogonal and symmetric transform of the rows of x, its own inverse."""
    found = torch.fft.fft(x, norm="ortho")
    return found.real - found.imag


PROBLEMS: dict[str, Callable[[int, torch.device], Source]] = {"patches": Patches, GAUSSIAN: Gaussian}


@lru_cache(2)
def load(name: str, n: int, device: torch.device) -> Source:
    """One of PROBLEMS; the latest two are kept."""
    return PROBLEMS[name](n, device)

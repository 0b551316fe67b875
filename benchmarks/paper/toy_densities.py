"""The two-dimensional distributions of Grathwohl et al. (2018, arXiv:1810.01367), and densities where they have one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["DISTRIBUTIONS", "Distribution"]

_NODES = 4096


@dataclass(frozen=True)
class Distribution:
    """``center(u) + noise * ε`` with u (B, 3) uniform in the unit cube and ε standard normal, both two-dimensional.

    Without noise, either ``exact`` gives the density or it has none that is known.
    """

    center: Callable[[Tensor], Tensor]
    noise: float
    exact: Callable[[Tensor], Tensor] | None = None

    @property
    def known(self) -> bool:
        return self.noise > 0 or self.exact is not None

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, 2) in float32."""
        u = torch.rand(count, 3, generator=generator, dtype=torch.float64)
        noise = self.noise * torch.randn(count, 2, generator=generator, dtype=torch.float64)
        return (self.center(u) + noise).float()

    def density(self, x: Tensor) -> Tensor:
        """p(x), (B), for x (B, 2): exact, or the mean over 4,096 Gaussians at quasi-random centers."""
        if self.exact is not None:
            return self.exact(x)
        u = torch.quasirandom.SobolEngine(3).draw(_NODES, dtype=torch.float64)
        centers = self.center(u)
        parts = [
            torch.exp(-torch.cdist(rows.double(), centers).square() / (2 * self.noise**2)).mean(1)
            for rows in x.split(2_000)
        ]
        return torch.cat(parts) / (2 * math.pi * self.noise**2)


def _polar(radius: Tensor, angle: Tensor) -> Tensor:
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1)


def _eight_gaussians(u: Tensor) -> Tensor:
    return _polar(torch.full_like(u[:, 0], 4 / 1.414), (8 * u[:, 0]).floor() * math.pi / 4)


def _pinwheel(u: Tensor) -> Tensor:
    # The radial and the tangential deviation, normal numbers by Box and Muller.
    size = (-2 * (1 - u[:, 0]).log()).sqrt()
    radial, tangential = 1 + 0.3 * size * (2 * math.pi * u[:, 1]).cos(), 0.1 * size * (2 * math.pi * u[:, 1]).sin()
    angle = (5 * u[:, 2]).floor() * 2 * math.pi / 5 + 0.25 * radial.exp()
    c, s = angle.cos(), angle.sin()
    return 2 * torch.stack([c * radial + s * tangential, -s * radial + c * tangential], -1)


def _two_spirals(u: Tensor) -> Tensor:
    side, position = (2 * u[:, 0]).floor(), (2 * u[:, 0]) % 1
    angle = position.sqrt() * 3 * math.pi
    x = torch.stack([-angle.cos() * angle + u[:, 1] / 2, angle.sin() * angle + u[:, 2] / 2], -1)
    return x * (1 - 2 * side)[:, None] / 3


def _checkerboard(u: Tensor) -> Tensor:
    x = 4 * u[:, 0] - 2
    return 2 * torch.stack([x, u[:, 1] - 2 * (2 * u[:, 2]).floor() + x.floor() % 2], -1)


def _checkerboard_density(x: Tensor) -> Tensor:
    squares = (x / 2).floor().sum(-1) % 2 == 0
    return torch.where(squares & (x.abs() < 4).all(-1), 1 / 32, 0.0).double()


def _moons(u: Tensor) -> Tensor:
    upper, angle = u[:, 0] < 0.5, math.pi * ((2 * u[:, 0]) % 1)
    x = torch.where(upper, angle.cos(), 1 - angle.cos())
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin())
    return 2 * torch.stack([x, y], -1) + torch.tensor([-1.0, -0.2], dtype=u.dtype)


def _rings(u: Tensor) -> Tensor:
    return 3 * _polar((1 + (4 * u[:, 0]).floor()) / 4, 2 * math.pi * u[:, 1])


def _circles(u: Tensor) -> Tensor:
    return 3 * _polar((1 + (2 * u[:, 0]).floor()) / 2, 2 * math.pi * u[:, 1])


def _swiss_roll(u: Tensor) -> Tensor:
    angle = 1.5 * math.pi * (1 + 2 * u[:, 0])
    return _polar(angle, angle) / 5


def _cos(u: Tensor) -> Tensor:
    x = 5 * u[:, 0] - 2.5
    return torch.stack([x, 2.5 * x.sin()], -1)


DISTRIBUTIONS = {
    "8 Gaussians": Distribution(_eight_gaussians, 0.5 / 1.414),
    "2 spirals": Distribution(_two_spirals, 0.1),
    "checkerboard": Distribution(_checkerboard, 0.0, _checkerboard_density),
    "pinwheel": Distribution(_pinwheel, 0.0),
    "moons": Distribution(_moons, 0.2),
    "rings": Distribution(_rings, 0.08),
    "swiss roll": Distribution(_swiss_roll, 0.2),
    "circles": Distribution(_circles, 0.24),
    "cos": Distribution(_cos, 0.0),
}

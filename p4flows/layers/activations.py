"""Elementwise bijections for deep stacks of invertible linear layers (Section 3.4)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from p4flows.layers.inputs import require_floating

__all__ = ["BentIdentity", "Elementwise", "Inverse"]


class Elementwise(nn.Module, ABC):
    """A bijection f of ℝ, applied to every element of (..., n); log|det| is the sum of ln|f'| over the last dimension.

    A subclass gives three formulas without trainable parameters; :class:`p4flows.P4InvStack` builds its gradients from
    them.
    """

    @abstractmethod
    def value(self, x: Tensor) -> Tensor:
        """f(x)."""

    @abstractmethod
    def inverse_value(self, y: Tensor) -> Tensor:
        """The x with f(x) = y."""

    @abstractmethod
    def slope(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """f'(x), and the derivative of ln|f'| at x."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(f(x), log|det|)`` of shapes (..., n) and (...)."""
        require_floating(x)
        return self.value(x), self.slope(x)[0].abs().log().sum(-1)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """``(f⁻¹(y), log|det|)`` of shapes (..., n) and (...)."""
        require_floating(y)
        x = self.inverse_value(y)
        return x, -self.slope(x)[0].abs().log().sum(-1)


class BentIdentity(Elementwise):
    r"""The Bent identity, a smooth bijection of ℝ, elementwise.

    .. math:: B(x) = \frac{\sqrt{x^2 + 1} - 1}{2} + x, \qquad B'(x) = 1 + \frac{x}{2 \sqrt{x^2 + 1}} \in (1/2, 3/2)

    with the closed-form inverse :math:`x = (2c - \sqrt{c^2 + 3}) / 3`, :math:`c = 2y + 1`. No parameters; any
    (..., n) floating-point tensor; log|det| is the sum over the last dimension. Section 3.4 of Krämer, Köhler,
    Noé (arXiv:2010.07033), after Gresele et al. (2020).

    >>> layer = BentIdentity()
    >>> y, logabsdet = layer(torch.tensor([[0.0, 1.0, -3.0]]))
    >>> x, _ = layer.inverse(y)
    >>> x.round(decimals=3).tolist()
    [[0.0, 1.0, -3.0]]
    """

    def value(self, x: Tensor) -> Tensor:
        # hypot does not overflow where x² would.
        return torch.add(x, torch.hypot(x, x.new_ones(())) - 1, alpha=0.5)

    def inverse_value(self, y: Tensor) -> Tensor:
        c = 2 * y + 1
        return torch.sub(c, torch.hypot(c, c.new_full((), math.sqrt(3))), alpha=0.5) * (2 / 3)

    def slope(self, x: Tensor) -> tuple[Tensor, Tensor]:
        s = torch.hypot(x, x.new_ones(()))
        slope = 1 + x / s / 2
        return slope, 0.5 / (s * s * s * slope)


class Inverse(nn.Module):
    """The inverse of a bijection, as a module: its two directions exchanged.

    >>> layer = Inverse(BentIdentity())
    >>> layer(torch.zeros(1, 2))[0].tolist()
    [[0.0, 0.0]]
    """

    bijection: Any  # a module with both directions, for which torch has no type

    def __init__(self, bijection: nn.Module) -> None:
        super().__init__()
        if not bijective(bijection):
            raise ValueError(f"bijection: expected a module with forward and inverse, got {bijection!r}")
        self.bijection = bijection

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The bijection's inverse direction."""
        return self.bijection.inverse(x)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The bijection's forward direction."""
        return self.bijection(y)


def bijective(module: object) -> bool:
    """Whether it is a module with both directions."""
    return isinstance(module, nn.Module) and callable(getattr(module, "inverse", None))

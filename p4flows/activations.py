"""Elementwise bijections for deep stacks of invertible linear layers (Section 3.4)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["BentIdentity"]


class BentIdentity(nn.Module):
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

    @staticmethod
    def _logabsdet(x: Tensor) -> Tensor:
        # hypot does not overflow where x² would.
        return torch.log1p(x / torch.hypot(x, torch.ones_like(x)) / 2).sum(-1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(B(x), log|det|)`` of shapes (..., n) and (...)."""
        y = (torch.hypot(x, torch.ones_like(x)) - 1) / 2 + x
        return y, self._logabsdet(x)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """``(B⁻¹(y), log|det|)`` of shapes (..., n) and (...)."""
        c = 2 * y + 1
        x = (2 * c - torch.hypot(c, torch.full_like(c, math.sqrt(3)))) / 3
        return x, -self._logabsdet(x)

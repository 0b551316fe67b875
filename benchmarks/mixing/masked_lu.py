"""An LU layer that is as fast as torch makes it: its factors are the two triangles of one matrix."""

from __future__ import annotations

import torch
from nflows.transforms import Transform
from torch import Tensor, nn

__all__ = ["MaskedLU"]

_LEAST = 1e-3  # on the diagonal, as in nflows


class MaskedLU(Transform):
    """``y = L U x + b`` with the parametrisation of nflows' ``LULinear``, which starts as the identity.

    L has ones on its diagonal, and that of U is positive. nflows puts the entries of the factors in place by their
    indices, at every pass; to mask a matrix takes less time, and most where the layer is wide.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.triangles = nn.Parameter(torch.zeros(features, features))
        self.diagonal = nn.Parameter(torch.full((features,), 1 - _LEAST).expm1().log())
        self.bias = nn.Parameter(torch.zeros(features))

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        diagonal = self._diagonal()
        x = inputs @ self.triangles.triu(1).T + inputs * diagonal
        y = x @ self.triangles.tril(-1).T + x + self.bias
        return y, diagonal.log().sum().expand(len(inputs))

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        diagonal = self._diagonal()
        upper = self.triangles.triu(1) + diagonal.diag()
        x = torch.linalg.solve_triangular(self.triangles, (inputs - self.bias).T, upper=False, unitriangular=True)
        x = torch.linalg.solve_triangular(upper, x, upper=True)
        return x.T, -diagonal.log().sum().expand(len(inputs))

    def _diagonal(self) -> Tensor:
        return nn.functional.softplus(self.diagonal) + _LEAST

"""Rectangular layers ``(A + U Vᵀ) x + b``: what P4Linear, P4Conv2d and P4Lipschitz share."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from p4flows.checks import floating, integer
from p4flows.layers.frozen import Frozen
from p4flows.layers.inputs import require_rows
from p4flows.layers.low_rank import LowRank
from p4flows.perturbation import P4Layer

__all__ = ["Affine"]


class Affine(Frozen, LowRank, P4Layer):
    """Linear layer ``y = (A + U Vᵀ) x + b`` with A (m, n); a subclass says what the feasible set is, and merges.

    A and b start like those of ``nn.Linear``, from torch's own generator.
    """

    _version = 2  # of the state dict; 1 had no A_float

    additive = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool,
        seed: int,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.in_features = integer("in_features", in_features, 1)
        self.out_features = integer("out_features", out_features, 1)
        self.rank = integer("rank", rank, 1, min(self.in_features, self.out_features))
        dtype = floating(dtype)
        bound = 1 / math.sqrt(self.in_features)
        shape = self.out_features, self.in_features
        with torch.device("cpu"):
            start = torch.empty(shape, dtype=torch.promote_types(dtype, torch.float32)).uniform_(-bound, bound)
            self.register_frozen(start, dtype)
            self.register_perturbation(self.A, self.rank, torch.tensor(integer("seed", seed), dtype=torch.int64), bias)
            if self.bias is not None:
                nn.init.uniform_(self.bias, -bound, bound)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, bias={self.bias is not None}"

    def forward(self, x: Tensor) -> Tensor:
        """``(A + U Vᵀ) x + b``, without forming ``U Vᵀ``."""
        require_rows(x, self.A)
        return linear(x, self.A, self.bias) + linear(x @ self.V, self.U)

    @property
    def trained_matrix(self) -> Tensor:
        """The effective matrix in float64, (m, n), not differentiable: what an average over training averages."""
        return self.exact.double() + self.U.detach().double() @ self.V.detach().mT.double()

    @torch.no_grad()
    def set_matrix(self, M: Tensor) -> None:
        """Make M (m, n) the effective matrix: A = M, U = 0.

        Raises ValueError, and changes nothing, if M has another shape or is not finite in the layer's dtype.
        """
        self.set_frozen(self.checked(M))
        self.U.zero_()

"""Woodbury transformations, a peer written from its formulas."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Woodbury"]


class Woodbury(nn.Module):
    r"""``y = W x + b`` with ``W = I + U V``, where U (n, k) and V (k, n) are trained and k is fixed.

    .. math::
        \ln|\det W| &= \ln|\det(I_k + V U)| \\
        W^{-1} &= I - U (I_k + V U)^{-1} V

    It costs O(k n) a row and O(k² n) a batch, less than any full matrix. But W never differs from the identity by more
    than rank k: nothing is merged. U starts at zero, so that W starts as the identity.

    The layer is that of Lu and Huang, Woodbury Transformations for Deep Generative Flows, arXiv:2002.12229, for
    vectors.

    Args:
        features: n.
        rank: k.
    """

    def __init__(self, features: int, rank: int) -> None:
        super().__init__()
        self.U = nn.Parameter(torch.zeros(features, rank))
        self.V = nn.Parameter(torch.randn(rank, features) / features**0.5)
        self.bias = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """W x + b for rows x (N, n), and ln|det W| ()."""
        y = x + (x @ self.V.T) @ self.U.T + self.bias
        return y, torch.linalg.slogdet(self._capacitance()).logabsdet

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """W⁻¹ (y - b) for rows y (N, n), and -ln|det W| ()."""
        capacitance, y = self._capacitance(), y - self.bias
        x = y - torch.linalg.solve(capacitance, (y @ self.V.T).T).T @ self.U.T
        return x, -torch.linalg.slogdet(capacitance).logabsdet

    def _capacitance(self) -> Tensor:
        return torch.eye(len(self.V), dtype=self.V.dtype, device=self.V.device) + self.V @ self.U

"""Relative gradients of a dense matrix, a peer written from its formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["RelativeGradient"]


class RelativeGradient(nn.Module):
    r"""``y = W x + b`` with a dense W (n, n) that gets its relative gradient: no inverse and no determinant is needed.

    With G the gradient of the loss with respect to W, :math:`g_y` (N, n) that at the rows y, and :math:`g_l` that at
    ln|det W|,

    .. math::
        G &= g_y^T x + g_l W^{-T} \\
        G W^T W &= g_y^T (x W^T) W + g_l W

    which costs O(n²) a row. The gradients at x and b are the ordinary ones. There is no inverse direction, and
    ln|det W| is not evaluated: NaN stands in its place, and passes g_l on.

    The method is that of Gresele et al., Relative gradient optimization of the Jacobian term in unsupervised deep
    learning, arXiv:2006.15090.

    Args:
        features: n. W starts as the identity.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(features))
        self.bias = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """W x + b for rows x (N, n), and NaN ()."""
        y, logabsdet = _Relative.apply(x, self.weight)
        return y + self.bias, logabsdet


class _Relative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
        y = x @ W.T
        ctx.save_for_backward(y, W)
        return y, x.new_full((), torch.nan)

    @staticmethod
    def backward(ctx: Any, gy: Tensor, gl: Tensor) -> tuple[Tensor, Tensor]:
        y, W = ctx.saved_tensors
        return gy @ W, gy.T @ (y @ W) + gl * W

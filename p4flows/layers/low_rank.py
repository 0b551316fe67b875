"""The trained perturbation ``U Vᵀ`` of a layer, and its random directions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from p4flows.checks import flag
from p4flows.tracking.noise import directions, redraw_

__all__ = ["LowRank", "default_rank"]


class LowRank(nn.Module):
    """A perturbation ``U Vᵀ`` for a layer that derives from this and from :class:`p4flows.P4Layer`, in this order.

    The layer calls :meth:`register_perturbation` in its constructor and :meth:`redraw` where it has merged; ``reset``,
    ``perturbation``, ``zeroed``, ``redrawn`` and ``carried`` are here.

    It has parameters U (*batch, m, k), V (*batch, n, k), bias (*batch, m) and buffers seed, merges (*batch).
    A reset sets U to zero and draws the next V of the seed. V is trained where k = 1, as in the paper. Where k > 1 it
    is fixed between merges (``V.requires_grad`` is False): then a step of U is a step of a dense matrix within k random
    directions. Training V as well teaches nothing more, and products of both steps make large learning rates unstable.
    """

    A: Tensor
    U: nn.Parameter
    V: nn.Parameter
    bias: nn.Parameter | None
    seed: Tensor
    merges: Tensor

    def register_perturbation(self, A: Tensor, rank: int, seed: Tensor, bias: bool) -> None:
        """Create all tensors, in the dtype of A (*batch, m, n): the perturbation is zero, with the first V of seed."""
        m, n = A.shape[-2:]
        self.register_buffer("seed", seed.clone())
        self.register_buffer("merges", torch.zeros_like(seed))
        self.U = nn.Parameter(A.new_zeros(*A.shape[:-2], m, rank))
        self.V = nn.Parameter(directions(self.seed, self.merges, n, rank).to(A.dtype), requires_grad=rank == 1)
        zero = A.new_zeros(*A.shape[:-2], m)
        self.register_parameter("bias", nn.Parameter(zero) if flag("bias", bias) else None)

    @property
    def perturbation(self) -> tuple[nn.Parameter, ...]:
        return self.U, self.V

    @property
    def zeroed(self) -> tuple[nn.Parameter, ...]:
        return (self.U,)

    @property
    def redrawn(self) -> tuple[nn.Parameter, ...]:
        return (self.V,)

    @classmethod
    def carried(cls, old: Tensor, new: Tensor) -> Tensor | None:
        """``V⁺ V'``, with which a gradient ``G V`` becomes the part of ``G V'`` that the old directions have seen."""
        n, k = old.shape[-2:]
        return None if k == 1 else old.mT @ new * (k / n)

    @property
    def matrix(self) -> Tensor:
        """The effective matrix ``A + U Vᵀ``, (*batch, m, n), differentiable. For tests, plots and export."""
        return self.A + self.U @ self.V.mT

    def reset(self) -> None:
        """Drop the perturbation without merging it: U = 0, a new V; the function becomes that of A."""
        self.redraw(torch.ones_like(self.merges, dtype=torch.bool))

    def redraw(self, which: Tensor) -> None:
        """Start the next perturbation, U = 0 and a new V, where ``which`` (*batch) is true."""
        tensors = (self.U, self.V, self.seed, self.merges)
        U, V, seed, merges = (t.detach().view(-1, *t.shape[self.merges.ndim :]) for t in tensors)
        redraw_(U, V, seed, merges, which.view(-1))


def default_rank(n: int) -> int:
    """The rank of a perturbation that is not given: n, but at most 64."""
    return min(n, 64)

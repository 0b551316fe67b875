"""P4Linear: a plain linear layer trained through low-rank perturbations (Appendix I)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from p4flows.checks import floating, integer, move
from p4flows.layers.low_rank import LowRank
from p4flows.perturbation import Correction, MergeOutcome, P4Layer
from p4flows.tracking.algebra import fits, largest

__all__ = ["P4Linear"]


class P4Linear(LowRank, P4Layer):
    r"""Linear layer ``y = (A + U Vᵀ) x + b`` of any shape, trained through the perturbation ``U Vᵀ`` of rank k.

    There is no inverse and no determinant to track: what is left of P4 is that only k (m + n) numbers are trained at a
    time, not m n. With U = 0 and a random V at every merge, ``E[V Vᵀ] = I``: by SGD it descends, on average, as
    ``nn.Linear`` does at the same learning rate.

    Args:
        in_features: n, the size of the last dimension of the input.
        out_features: m, the size of the last dimension of the output.
        rank: k, 1 <= k <= min(m, n). The paper has 1.
        bias: whether there is a trainable b (m,).
        seed: V is a function of the seed and of the number of merges; give layers of one model different seeds.
        device, dtype: of all floating-point tensors.

    A and b start like those of ``nn.Linear``, from torch's own generator.

    Attributes: parameters U (m, k), V (n, k) and bias (m,) or None; buffers A (m, n); seed, merges (), int64.

    Shapes: input (..., n) to output (..., m).

    Raises:
        ValueError: for an argument outside what is said here.

    References:
        Krämer, Köhler, Noé: Training Invertible Linear Layers through Rank-One Perturbations. arXiv:2010.07033.

    >>> layer = P4Linear(784, 10)
    >>> layer(torch.zeros(5, 784)).shape, sum(p.numel() for p in layer.parameters())
    (torch.Size([5, 10]), 804)
    """

    _version = 1  # of the state dict

    A: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 1,
        bias: bool = True,
        seed: int = 0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = integer("in_features", in_features, 1)
        self.out_features = integer("out_features", out_features, 1)
        self.rank = integer("rank", rank, 1, min(self.in_features, self.out_features))
        dtype = floating(dtype)
        bound = 1 / math.sqrt(self.in_features)
        shape = self.out_features, self.in_features
        with torch.device("cpu"):
            self.register_buffer("A", torch.empty(shape, dtype=dtype).uniform_(-bound, bound))
            self._register_perturbation(self.A, self.rank, torch.tensor(integer("seed", seed), dtype=torch.int64), bias)
            if self.bias is not None:
                nn.init.uniform_(self.bias, -bound, bound)
        move(self, device)

    @classmethod
    def from_linear(cls, layer: nn.Linear, rank: int = 1, seed: int = 0) -> P4Linear:
        """A layer that starts as the same function as an ``nn.Linear``, with a copy of its weight and bias."""
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"layer: expected an nn.Linear, got {type(layer).__name__}")
        sizes = layer.in_features, layer.out_features
        new = cls(*sizes, rank, layer.bias is not None, seed, device=layer.weight.device, dtype=layer.weight.dtype)
        with torch.no_grad():
            new.A.copy_(layer.weight)
            if layer.bias is not None:
                new.bias.copy_(layer.bias)
        return new.train(layer.training)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, bias={self.bias is not None}"

    def forward(self, x: Tensor) -> Tensor:
        """``(A + U Vᵀ) x + b``, without forming ``U Vᵀ``."""
        return linear(x, self.A, self.bias) + linear(x @ self.V, self.U)

    @torch.no_grad()
    def merge(self, force: bool = False) -> Tensor:
        """Merge ``U Vᵀ`` into A, in place, O(k m n); there are no bounds, so that ``force`` changes nothing.

        Skipped where A would not stay finite; where U or V is not finite the perturbation is reset instead. Does not
        wait for the device. Returns the :class:`MergeOutcome`, an int64 tensor ().
        """
        size = largest(self.U) * largest(self.V)
        finite = size.isfinite()
        kept = fits(self.A[None], self.rank * size[None], torch.finfo(self.A.dtype).max / 4)[0] & finite
        U, V = (torch.where(kept, M, 0) for M in (self.U, self.V))
        self.A.addmm_(U, V.mT)
        self._redraw(kept | ~finite)
        merged = torch.where(kept, int(MergeOutcome.MERGED), int(MergeOutcome.SKIPPED))
        return merged.where(finite, int(MergeOutcome.RESET))

    def correct(self) -> Tensor:
        """Nothing is derived from A, so that there is nothing to correct."""
        return torch.full_like(self.merges, int(Correction.NONE))

    def penalty(self) -> Tensor:
        """Zero, in float64: every perturbation can be merged."""
        return torch.zeros((), dtype=torch.float64, device=self.A.device)

"""P4Linear: a plain linear layer trained through low-rank perturbations (Appendix I)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from p4flows.checks import floating, integer, move
from p4flows.layers.inputs import require_floating
from p4flows.layers.low_rank import LowRank
from p4flows.perturbation import Correction, MergeOutcome, P4Layer
from p4flows.tracking.algebra import fits, largest
from p4flows.tracking.matrix import moved

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

    Attributes: parameters U (m, k), V (n, k) and bias (m,) or None; buffers A (m, n); A_float (m, n), in float32, what
    A is rounded from in a layer in half precision, where A itself would swallow most of what is merged into it, and
    otherwise None; seed, merges (), int64.

    Shapes: input (..., n) to output (..., m).

    Raises:
        ValueError: for an argument outside what is said here.

    References:
        Krämer, Köhler, Noé: Training Invertible Linear Layers through Rank-One Perturbations. arXiv:2010.07033.

    >>> layer = P4Linear(784, 10)
    >>> layer(torch.zeros(5, 784)).shape, sum(p.numel() for p in layer.parameters())
    (torch.Size([5, 10]), 804)
    """

    _version = 2  # of the state dict; 1 had no A_float

    A: Tensor
    A_float: Tensor | None

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
            start = torch.empty(shape, dtype=torch.promote_types(dtype, torch.float32)).uniform_(-bound, bound)
            self.register_buffer("A", start.to(dtype))
            self.register_buffer("A_float", start if _too_coarse(dtype) else None)
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
            for A in (new.A, new.A_float):
                if A is not None:
                    A.copy_(layer.weight)
            if new.bias is not None:
                new.bias.copy_(layer.bias)
        return new.train(layer.training)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, bias={self.bias is not None}"

    def forward(self, x: Tensor) -> Tensor:
        """``(A + U Vᵀ) x + b``, without forming ``U Vᵀ``."""
        require_floating(x)
        return linear(x, self.A, self.bias) + linear(x @ self.V, self.U)

    @torch.no_grad()
    def merge(self, force: bool = False) -> Tensor:
        """Merge ``U Vᵀ`` into A, in place, O(k m n); there are no bounds, so that ``force`` changes nothing.

        Skipped where A would not stay finite; where U or V is not finite the perturbation is reset instead. Does not
        wait for the device. Returns the :class:`MergeOutcome`, an int64 tensor ().
        """
        A = self.A if self.A_float is None else self.A_float
        size = largest(self.U) * largest(self.V)
        finite = size.isfinite()
        kept = fits(A[None], self.rank * size[None], torch.finfo(self.A.dtype).max / 4)[0] & finite
        U, V = (torch.where(kept, M, 0).to(A.dtype) for M in (self.U, self.V))
        A.addmm_(U, V.mT)
        if A is not self.A:
            self.A.copy_(A)
        self._redraw(kept | ~finite)
        merged = torch.where(kept, int(MergeOutcome.MERGED), int(MergeOutcome.SKIPPED))
        return merged.where(finite, int(MergeOutcome.RESET))

    def correct(self) -> Tensor:
        """Nothing is derived from A, so that there is nothing to correct."""
        return torch.full_like(self.merges, int(Correction.NONE))

    def penalty(self) -> Tensor:
        """Zero, in float64: every perturbation can be merged."""
        return torch.zeros((), dtype=torch.float64, device=self.A.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> P4Linear:
        # .half() and .to(dtype) must not round what A is rounded from, and .float() gives it back.
        dtype = self.A.dtype
        exact = self.A if self.A_float is None else self.A_float
        super()._apply(fn, recurse)
        if _too_coarse(self.A.dtype) and (self.A_float is None or self.A_float.dtype != torch.float32):
            self.A_float = moved(exact, self.A.device).to(torch.float32)
        if self.A.dtype != dtype:
            self.A = moved(exact, self.A.device).to(self.A.dtype)
            if not _too_coarse(self.A.dtype):
                self.A_float = None
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        A, A_float = (state_dict.get(prefix + name) for name in ("A", "A_float"))
        if self.A_float is None and A_float is not None:
            state_dict[f"{prefix}A"] = state_dict.pop(f"{prefix}A_float")
        elif self.A_float is not None and A_float is None and A is not None:
            state_dict[f"{prefix}A_float"] = A.to(torch.float32, copy=True)
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def _too_coarse(dtype: torch.dtype) -> bool:
    """Whether a matrix of this dtype would swallow most of what is merged into it."""
    return dtype.itemsize < 4

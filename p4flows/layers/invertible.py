"""P4Inv: an invertible linear layer with O(n²) inverse and log-determinant (Section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from p4flows.checks import Bounds, floating, integer, move
from p4flows.layers.export import FromLinear, as_linear
from p4flows.layers.gradients import forward_map, inverse_map
from p4flows.layers.perturbed import PerturbedInverse
from p4flows.tracking.initial import initial_matrix

__all__ = ["P4Inv"]


class P4Inv(FromLinear, PerturbedInverse):
    r"""Invertible linear layer ``y = (A + U Vᵀ) x + b``, trained through the rank-k perturbation ``U Vᵀ``.

    A, its inverse and its determinant are frozen. With the capacitance ``C = I + Vᵀ A⁻¹ U`` and G = det C,

    .. math::
        \ln|\det(A + U V^T)| &= \ln|G| + \ln|\det A| \\
        (A + U V^T)^{-1} &= A^{-1} - A^{-1} U C^{-1} V^T A^{-1}

    so that both directions and the log-determinant cost O(n²), with gradients for U, V, b and the input. Merging
    (:meth:`merge`, usually called by :class:`p4flows.MergeScheduler`) moves ``U Vᵀ`` into A and starts a new
    perturbation, U = 0 and a random V, without changing the layer's function (Algorithm 2). V is drawn such that
    ``E[V Vᵀ] = I``: V ~ N(0, 1) for k = 1 as in the paper; for more, its columns are orthogonal and of norm √(n/k), and
    V is not trained (see :class:`p4flows.layers.low_rank.LowRank`). So one learning rate serves all ranks, and it is
    that of a dense matrix. ``train()`` and ``eval()`` compute the same function.

    Args:
        features: n, the size of the last dimension of the input.
        rank: k, 1 <= k <= n; by default n, but at most 64. The paper has k = 1. A step costs O(k n²) beside the O(n²)
            a row. The higher the rank, the more a step learns.
        bias: whether there is a trainable b (n,), which starts at zero.
        init: the A to start from: "identity"; "reverse" (A[i, n-1-i] = 1); "orthogonal" (random, from ``seed``);
            a permutation p, an integer tensor (n,), so that ``y = x[..., p]``; or an invertible (n, n) matrix,
            whose inverse and log|det| are computed once, in float64.
        seed: V is a function of the seed and of the number of merges; give layers of one model different seeds.
        bounds_update: (low, high) for ln|G| outside which a merge is skipped, unless forced (Appendix A); for k > 1
            they hold for ln σ of every singular value σ of C, that is for every direction. None for no bound.
        bounds_det: the same for ln|G det A|. There is none by default: what guards the inverse is its measured
            residual, and wide or well-trained layers rightly have large determinants. ``**PAPER_BOUNDS`` has the
            paper's, which suit n ≤ 128 near det = 1.
        bounds_penalty: (low, high) beyond which :meth:`penalty` grows.
        penalty_weight: its factor C_p (0.1 in the paper's linear problems).
        device, dtype: of A, A_inv, U, V and b.

    Attributes: parameters U, V (n, k) and bias (n,) or None; A, A_inv (n, n), rounded from A_double and A_inv_double
    (None in a layer that is in float64 itself), which merges work on; logabsdet_A, sign_A (), float64 whatever the
    layer's dtype, and rounding (), what rounding A adds to logabsdet_A, all buffers of the module ``tracked``; buffers
    seed, merges (), int64.

    Memory: 24 bytes for each entry of A in float32, beside 16 of a dense layer with Adam.

    Weight decay pulls U and V, and so the effective matrix, towards the frozen A, not towards zero: a decay between
    merges is lost at the merge. Give U and V a parameter group with ``weight_decay=0`` if that is not what you want.

    Shapes: input (..., n) to output (..., n) and log|det| (...), both in the input's dtype (log|det| in float32
    for half-precision input).

    To average models over training use :class:`p4flows.AveragedModel`; for a plain ``nn.Linear``, :meth:`to_linear`,
    and to start from one, :meth:`from_linear`.

    Not checked: that A + U Vᵀ is invertible. At G = 0 the forward direction is right, with log|det| = -inf, and
    the inverse is not finite.

    Raises:
        ValueError: for an argument outside what is said here, and by both directions for input of another width,
            dtype or device.

    References:
        Krämer, Köhler, Noé: Training Invertible Linear Layers through Rank-One Perturbations. arXiv:2010.07033.

    >>> layer = P4Inv(3, init="reverse")
    >>> y, logabsdet = layer(torch.tensor([[1.0, 2.0, 3.0]]))
    >>> y.tolist(), logabsdet.tolist()
    ([[3.0, 2.0, 1.0]], [0.0])
    >>> layer.inverse(y)[0].tolist()
    [[1.0, 2.0, 3.0]]
    """

    def __init__(
        self,
        features: int,
        rank: int | None = None,
        bias: bool = True,
        init: str | Tensor = "identity",
        seed: int = 0,
        *,
        bounds_update: Bounds = (-6.0, None),
        bounds_det: Bounds = (None, None),
        bounds_penalty: Bounds = (-2.0, None),
        penalty_weight: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(features, rank, bounds_update, bounds_det, bounds_penalty, penalty_weight)
        dtype = floating(dtype)
        with torch.device("cpu"):
            number = torch.tensor(integer("seed", seed), dtype=torch.int64)
            self._register(initial_matrix(init, self.features, number, dtype), dtype, number, bias)
        move(self, device)

    def to_linear(self, inverse: bool = False) -> nn.Linear:
        """The finished layer's map, or its inverse, as a plain ``nn.Linear`` without gradients, for serving.

        Its log|det| is the constant :attr:`logabsdet`. For the inverse, the effective matrix is inverted in float64.
        """
        return as_linear(self, self.matrix_double, inverse)

    def extra_repr(self) -> str:
        return f"{self.features}, rank={self.rank}, bias={self.bias is not None}"

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(A + U Vᵀ) x + b`` and its log|det|."""
        self._check(x)
        frozen = self.tracked
        return forward_map(frozen.A, frozen.A_inv, frozen.logabsdet, self.U, self.V, self.bias, x)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """``(A + U Vᵀ)⁻¹ (y - b)`` and its log|det|, the negative of the forward direction's."""
        self._check(y)
        frozen = self.tracked
        return inverse_map(frozen.A_inv, frozen.logabsdet, self.U, self.V, self.bias, y)

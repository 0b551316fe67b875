"""P4Inv: an invertible linear layer with O(n²) inverse and log-determinant (Section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from p4flows._autograd import forward_map, inverse_map
from p4flows._checks import Bounds, floating, integer, move
from p4flows.initial import initial_matrix
from p4flows.tracked import TrackedInverse

__all__ = ["P4Inv"]


class P4Inv(TrackedInverse):
    r"""Invertible linear layer ``y = (A + U Vᵀ) x + b``, trained through the rank-k perturbation ``U Vᵀ``.

    A, its inverse and its determinant are frozen. With the capacitance ``C = I + Vᵀ A⁻¹ U`` and G = det C,

    .. math::
        \ln|\det(A + U V^T)| &= \ln|G| + \ln|\det A| \\
        (A + U V^T)^{-1} &= A^{-1} - A^{-1} U C^{-1} V^T A^{-1}

    so that both directions and the log-determinant cost O(n²), with gradients for U, V, b and the input. Merging
    (:meth:`merge`, usually called by :class:`p4flows.MergeScheduler`) moves ``U Vᵀ`` into A and starts a new
    perturbation, U = 0 and a random V, without changing the layer's function (Algorithm 2). V ~ N(0, 1) for k = 1; for
    more, its columns are orthogonal and of norm √n. ``train()`` and ``eval()`` compute the same function.

    Args:
        features: n, the size of the last dimension of the input.
        rank: k, 1 <= k <= n. The paper has k = 1. A step costs O(k n²) beside the O(n²) a row.
        bias: whether there is a trainable b (n,), which starts at zero.
        init: the A to start from: "identity"; "reverse" (A[i, n-1-i] = 1); "orthogonal" (random, from ``seed``);
            a permutation p, an integer tensor (n,), so that ``y = x[..., p]``; or an invertible (n, n) matrix,
            whose inverse and log|det| are computed once, in float64.
        seed: V is a function of the seed and of the number of merges; give layers of one model different seeds.
        bounds_update: (low, high) for ln|G| outside which a merge is skipped, unless forced (Appendix A).
            None for no bound.
        bounds_det: the same for ln|G det A|.
        bounds_penalty: (low, high) beyond which :meth:`penalty` grows.
        penalty_weight: its factor C_p (0.1 in the paper's linear problems).
        device, dtype: of A, A_inv, U, V and b.

    Attributes: parameters U, V (n, k) and bias (n,) or None; buffers A, A_inv (n, n), rounded from A_double and
    A_inv_double (None in a layer that is in float64 itself), which merges work on; logabsdet_A, sign_A (), float64
    whatever the layer's dtype, and rounding (), what rounding A adds to logabsdet_A; seed, merges (), int64.

    Memory: 24 bytes for each entry of A in float32, beside 16 of a dense layer with Adam.

    Weight decay pulls U and V, and so the effective matrix, towards the frozen A, not towards zero: a decay between
    merges is lost at the merge. Give U and V a parameter group with ``weight_decay=0`` if that is not what you want.

    Shapes: input (..., n) to output (..., n) and log|det| (...), both in the input's dtype (log|det| in float32
    for half-precision input).

    To average models over training use :class:`p4flows.AveragedModel`; for a plain ``nn.Linear``, :meth:`to_linear`.

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
        rank: int = 1,
        bias: bool = True,
        init: str | Tensor = "identity",
        seed: int = 0,
        *,
        bounds_update: Bounds = (-6.0, None),
        bounds_det: Bounds = (-2.5, 15.5),
        bounds_penalty: Bounds = (-2.0, 15.0),
        penalty_weight: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(features, rank, bounds_update, bounds_det, bounds_penalty, penalty_weight)
        seed_tensor = torch.tensor(integer("seed", seed), dtype=torch.int64)
        self._register(initial_matrix(init, self.features, seed_tensor, floating(dtype)), seed_tensor, bias)
        move(self, device)

    @torch.no_grad()
    def to_linear(self, inverse: bool = False) -> nn.Linear:
        """The finished layer's map, or its inverse, as a plain ``nn.Linear`` without gradients, for serving.

        Its log|det| is the constant :attr:`logabsdet`. For the inverse, the effective matrix is inverted in float64.
        """
        M = self.matrix_double
        shift = 0 if self.bias is None else self.bias.double()
        if inverse:
            M = torch.linalg.inv(M)
            shift = -(M @ shift) if self.bias is not None else 0
        linear = nn.Linear(self.features, self.features, self.bias is not None, self.A.device, self.A.dtype)
        linear.weight.copy_(M)
        if self.bias is not None:
            linear.bias.copy_(shift)
        return linear.requires_grad_(False).train(self.training)

    def extra_repr(self) -> str:
        return f"{self.features}, rank={self.rank}, bias={self.bias is not None}"

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(A + U Vᵀ) x + b`` and its log|det|."""
        self._check(x)
        return forward_map(self.A, self.A_inv, self.logabsdet_A, self.U, self.V, self.bias, x)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """``(A + U Vᵀ)⁻¹ (y - b)`` and its log|det|, the negative of the forward direction's."""
        self._check(y)
        return inverse_map(self.A_inv, self.logabsdet_A, self.U, self.V, self.bias, y)

"""P4Orthogonal: an orthogonal layer, whose inverse is its transpose (Section 5)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from p4flows.checks import floating, integer, move
from p4flows.layers.autocast import without_autocast
from p4flows.layers.export import as_linear
from p4flows.layers.frozen import Frozen
from p4flows.layers.inputs import require_rows
from p4flows.layers.low_rank import LowRank
from p4flows.outcomes import Correction, MergeOutcome
from p4flows.perturbation import P4Layer
from p4flows.tracking import rotation
from p4flows.tracking.initial import initial_matrix
from p4flows.tracking.noise import redraw_

__all__ = ["P4Orthogonal"]


class P4Orthogonal(Frozen, LowRank, P4Layer):
    r"""Orthogonal layer ``y = R A x + b``, trained through rotations R of low rank.

    A is in O(n), and is perturbed by the Cayley transform of a skew-symmetric matrix of rank 2k,

    .. math:: R = (I - K/2)^{-1} (I + K/2), \qquad K = (U V^T - V U^T) / 2

    which is a rotation whatever U and V are, so that the perturbed matrix is in O(n) too. The inverse is the transpose,
    log|det| is zero, and the sign of the determinant stays that of the first A. For k = 1 the rotation is in one plane,
    and is two Householder reflections that cancel at rest.

    Both directions cost O(n²) a row, and O(k³) for a capacitance of 2k × 2k; merging (:meth:`merge`, usually called by
    :class:`p4flows.MergeScheduler`) is ``A ← R A``, O(k n²), then U = 0 and a random V, with ``E[V Vᵀ] = I``. By SGD it
    descends, on average, as Riemannian gradient descent on O(n) does at the same learning rate; by Adam each entry of
    the generator K moves by about the learning rate. V is trained for k = 1 only. ``train()`` and ``eval()`` compute
    the same function.

    Args:
        features: n, the size of the last dimension of the input. For n = 1 there is nothing to train but b.
        rank: k, 1 <= k <= n; by default n / 2, but at least 1 and at most 64. Up to n = 128 a merge at the default
            rank costs O(n³) therefore, and every row as much as a few matrices of n × n.
        bias: whether there is a trained b (n,), which starts at zero.
        init: the A to start from: "identity"; "reverse" (A[i, n-1-i] = 1); "orthogonal" (random, from ``seed``); a
            permutation p, an integer tensor (n,), so that ``y = x[..., p]``; or an orthogonal (n, n) matrix, of which
            no entry of ``AᵀA - I`` is above 1e-3; the nearest one that is orthogonal in float64 is taken.
        seed: V is a function of the seed and of the number of merges; give layers of one model different seeds.
        device, dtype: of A, U, V and b.

    Attributes: parameters U, V (n, k) and bias (n,) or None; buffers A (n, n), rounded from A_double (None in a layer
    that is in float64 itself), which merges work on; sign_A (), float64; seed, merges (), int64.

    Merges rotate in float64, so that what is left of ``AᵀA - I`` after any number of them is the rounding of the
    entries of A. There is nothing to mend between them; :meth:`correct` is for an A that came from elsewhere.

    Shapes: input (..., n) to output (..., n) and log|det| (...), zero, in the input's dtype (float32 for half-precision
    input).

    Raises:
        ValueError: for an argument outside what is said here, and by both directions for input of another width,
            dtype or device.

    References:
        Krämer, Köhler, Noé: Training Invertible Linear Layers through Rank-One Perturbations. arXiv:2010.07033.
        Lezcano-Casado: Trivializations for Gradient-Based Optimization on Manifolds. arXiv:1909.09501.

    >>> layer = P4Orthogonal(3, init="reverse")
    >>> y, logabsdet = layer(torch.tensor([[1.0, 2.0, 3.0]]))
    >>> y.tolist(), logabsdet.tolist()
    ([[3.0, 2.0, 1.0]], [0.0])
    >>> layer.inverse(y)[0].tolist()
    [[1.0, 2.0, 3.0]]
    """

    exact_name, exact_dtype = "A_double", torch.float64

    sign_A: Tensor

    def __init__(
        self,
        features: int,
        rank: int | None = None,
        bias: bool = True,
        init: str | Tensor = "identity",
        seed: int = 0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.features = integer("features", features, 1)
        default = max(1, min(self.features // 2, 64))
        self.rank = default if rank is None else integer("rank", rank, 1, self.features)
        dtype = floating(dtype)
        with torch.device("cpu"):
            number = torch.tensor(integer("seed", seed), dtype=torch.int64)
            start = initial_matrix(init, self.features, number, torch.float64)
            self.register_frozen(_orthogonal("init", start.A), dtype)
            self.register_buffer("sign_A", start.sign.long())
            self.register_perturbation(self.A, self.rank, number, bias)
            if self.features == 1:  # O(1) has two elements, and no way from one to the other
                self.U.requires_grad_(False)
                self.V.requires_grad_(False)
        move(self, device)

    def extra_repr(self) -> str:
        return f"{self.features}, rank={self.rank}, bias={self.bias is not None}"

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``R A x + b``, and zero for its log|det|."""
        require_rows(x, self.A)
        y = rotation.rotate(linear(x, self.A), *self._factors())
        return (y if self.bias is None else y + self.bias.to(y.dtype)), _zeros(x)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """``Aᵀ Rᵀ (y - b)``, and zero for its log|det|."""
        require_rows(y, self.A)
        x = rotation.rotate(y if self.bias is None else y - self.bias, *self._factors(), inverse=True)
        return linear(x, self.A.mT), _zeros(y)

    def _factors(self) -> tuple[Tensor, Tensor, Tensor]:
        with without_autocast(self.U):
            return rotation.factors(self.U, self.V)

    @property
    def matrix(self) -> Tensor:
        """The effective matrix ``R A``, (n, n), differentiable. For tests, plots and export."""
        return rotation.rotate(self.A.mT, *self._factors()).mT

    @property
    def inverse_matrix(self) -> Tensor:
        """The transpose of :attr:`matrix`."""
        return self.matrix.mT

    @property
    def A_inv(self) -> Tensor:
        """The inverse of A, a view of its transpose, (n, n)."""
        return self.A.mT

    @property
    def trained_matrix(self) -> Tensor:
        """The effective matrix in float64, (n, n), from what A is rounded from; not differentiable."""
        U, V = self.U.detach().double(), self.V.detach().double()
        return rotation.rotate(self.exact.mT, *rotation.factors(U, V)).mT

    @property
    def sign(self) -> Tensor:
        """Sign of the determinant, () in float64, which no perturbation changes."""
        return self.sign_A.double()

    @property
    def logabsdet(self) -> Tensor:
        """ln|det|, zero, () in float64."""
        return torch.zeros_like(self.sign_A, dtype=torch.float64)

    @torch.no_grad()
    def set_matrix(self, M: Tensor) -> None:
        """Make M (n, n) the effective matrix: A = M, U = 0. Of M the nearest orthogonal matrix in float64 is taken.

        Raises ValueError, and changes nothing, if M has another shape, or is not finite, or an entry of ``MᵀM - I`` is
        above 1e-3.
        """
        self._set(_orthogonal("M", self.checked(M).double()))

    @torch.no_grad()
    def set_average(self, M: Tensor) -> None:
        """Make the orthogonal matrix nearest to M (n, n) the effective one, whatever M: for averages over training.

        Raises ValueError, and changes nothing, if M has another shape or is not finite.
        """
        self._set(rotation.nearest_orthogonal(self.checked(M).double()))

    def _set(self, M: Tensor) -> None:
        self.set_frozen(M)
        self.sign_A.copy_(torch.linalg.slogdet(M).sign)
        self.U.zero_()

    def to_linear(self, inverse: bool = False) -> nn.Linear:
        """The finished layer's map, or its inverse, as a plain ``nn.Linear`` without gradients, for serving."""
        return as_linear(self, self.trained_matrix, inverse)

    @property
    def group_key(self) -> Hashable:
        return self.U.shape, self.U.dtype, self.U.device

    def merge(self, force: bool = False) -> Tensor:
        """Merge the rotation into A (``A ← R A``), in place and in float64, O(k n²).

        There are no bounds, so that ``force`` changes nothing. Skipped where U is so large that the rotation would not
        be orthogonal in float64; where U or V is not finite the perturbation is reset instead. Does not wait for the
        device. Returns the :class:`p4flows.MergeOutcome`, an int64 tensor ().
        """
        return MergeOutcome.without_reason(type(self).merge_all([self], force)[0])

    @classmethod
    @torch.no_grad()
    def merge_all(cls, layers: Sequence[Any], force: bool = False) -> Tensor:
        """Merge layers of equal ``group_key``, with one batched call for what is small: U, V and the rotations.

        Returns the :class:`p4flows.MergeOutcome` of each with the reason of a skip, (len(layers),).
        """
        own = [[getattr(layer, name).detach() for layer in layers] for name in ("U", "V", "seed", "merges")]
        U, V, seed, merges = map(torch.stack, own)
        done, finite = rotation.rotate_([layer.exact for layer in layers], U, V)
        redraw_(U, V, seed, merges, done | ~finite)
        for targets, new in zip(own, (U, V, seed, merges), strict=True):
            torch._foreach_copy_(targets, list(new.unbind()))
        for layer in layers:
            layer.round_frozen()
        merged = torch.where(done, int(MergeOutcome.MERGED), int(MergeOutcome.SKIPPED_RANGE))
        return merged.where(finite, int(MergeOutcome.RESET))

    def violation(self) -> Tensor:
        """``max|AᵀA - I|`` of the A that the layer computes with, () in float64."""
        return rotation.defect(self.A)

    @torch.no_grad()
    def correct(self) -> Tensor:
        """Put the nearest orthogonal matrix in place of A, by singular values in float64, where A is not orthogonal.

        Merges keep it orthogonal by themselves: this is for an A that came from elsewhere. O(n³); waits for the device.
        Returns the :class:`p4flows.Correction`, an int64 tensor ().
        """
        off = bool(rotation.defect(self.exact) > rotation.ORTHOGONAL)
        if off:
            self.set_frozen(rotation.nearest_orthogonal(self.exact))
        return torch.full_like(self.merges, int(Correction.INVERTED if off else Correction.NONE))

    def refusal(self, M: Tensor) -> str | None:
        return super().refusal(M) or _not_orthogonal(rotation.defect(M))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        if not self.A.is_meta:
            self.correct()  # an A of little precision
            self.sign_A.copy_(torch.linalg.slogdet(self.exact.double()).sign)


def _orthogonal(name: str, M: Tensor) -> Tensor:
    error = rotation.defect(M)
    wrong = _not_orthogonal(error)
    if wrong is not None:
        raise ValueError(f"{name}: {wrong}")
    return M if error == 0 else rotation.nearest_orthogonal(M)


def _not_orthogonal(error: Tensor) -> str | None:
    return None if error <= 1e-3 else f"expected an orthogonal matrix, got one with max|MᵀM - I| = {error:.2g}"


def _zeros(x: Tensor) -> Tensor:
    return x.new_zeros(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))

"""P4Lipschitz: a linear layer whose spectral norm is bounded (Section 5)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from p4flows.checks import floating, integer, move, number
from p4flows.layers.affine import Affine
from p4flows.layers.low_rank import default_rank
from p4flows.outcomes import Correction, MergeOutcome
from p4flows.tracking.algebra import largest
from p4flows.tracking.matrix import moved
from p4flows.tracking.noise import normal
from p4flows.tracking.spectral import certified_norm, clipped

__all__ = ["P4Lipschitz"]


class P4Lipschitz(Affine):
    r"""Linear layer ``y = (A + U Vᵀ) x + b`` whose A never has a spectral norm above ``bound``.

    So the layer is Lipschitz continuous with this constant, as the blocks of an invertible residual network have to be.
    It is trained through the perturbation ``U Vᵀ`` of rank k, as :class:`p4flows.P4Linear`. At a merge
    ``A + U Vᵀ`` becomes the new A if an upper bound of its norm is at most ``bound``. Otherwise the perturbation is
    scaled back: those of its singular values that are above ``bound``, at most k of them, become ``bound``, which gives
    the nearest matrix in the set. The outcome PARTIAL tells of it. The upper bound is proved, rounding included:

    .. math:: \|A + U V^T\|_2 \le \|A\|_2 + \|U V^T\|_F

    from the bound that is known of A, O(m n k), where that is enough; and where it is not, by a Cholesky factorisation
    of :math:`t^2 I - (A + U V^T)^T (A + U V^T)` in float64, O(m n min(m, n)), for a t that power iteration proposes.
    Power iteration alone gives a lower bound.

    Between merges the perturbation may take the norm above ``bound``, by at most ``‖U Vᵀ‖``; see
    :meth:`effective_bound`. Therefore a :class:`p4flows.MergeScheduler` merges it after every step unless it is told
    otherwise. Before serving call :meth:`merge`.

    Args:
        in_features: n, the size of the last dimension of the input.
        out_features: m, the size of the last dimension of the output.
        bound: what the spectral norm of A may be at most, a number that is positive and not subnormal in the dtype.
        rank: k, 1 <= k <= min(m, n); by default min(m, n), but at most 64.
        bias: whether there is a trained b (m,).
        seed: V is a function of the seed and of the number of merges; give layers of one model different seeds.
        device, dtype: of all floating-point tensors but ``norm_bound``.

    A and b start like those of ``nn.Linear``, from torch's own generator; singular values of A are clipped.

    Attributes: parameters U (m, k), V (n, k) and bias (m,) or None; buffers A (m, n) and A_float as in
    :class:`p4flows.P4Linear`; norm_bound (), float64, a proved upper bound of the norm of A; direction (n,), where
    power iteration starts; seed, merges (), int64.

    Shapes: input (..., n) to output (..., m).

    Raises:
        ValueError: for an argument outside what is said here.

    References:
        Krämer, Köhler, Noé: Training Invertible Linear Layers through Rank-One Perturbations. arXiv:2010.07033.
        Gouk, Frank, Pfahringer, Cree: Regularisation of Neural Networks by Enforcing Lipschitz Continuity.
        arXiv:1804.04368.

    >>> layer = P4Lipschitz(64, 64, bound=0.9)
    >>> bool(torch.linalg.matrix_norm(layer.A, 2) <= layer.norm_bound), bool(layer.norm_bound <= 0.9)
    (True, True)
    """

    merge_every = 1  # a perturbation of many steps goes far beyond the bound, and learns less

    norm_bound: Tensor
    direction: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bound: float = 1.0,
        rank: int | None = None,
        bias: bool = True,
        seed: int = 0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        bound = number("bound", bound, torch.finfo(floating(dtype)).smallest_normal)
        if rank is None:
            rank = default_rank(min(integer("in_features", in_features, 1), integer("out_features", out_features, 1)))
        super().__init__(in_features, out_features, rank, bias, seed, dtype)
        self.bound = bound
        with torch.device("cpu"):
            self.register_buffer("direction", self._start())
            self.register_buffer("norm_bound", torch.zeros((), dtype=torch.float64))
            self.correct()
        move(self, device)

    def _start(self) -> Tensor:
        # Counter -1 is never reached by merges, so that this noise is not that of any V.
        return normal(self.seed, torch.full_like(self.seed, -1), (self.in_features,)).to(self.A.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bound={self.bound:g}, rank={self.rank}"

    @torch.no_grad()
    def merge(self, force: bool = False) -> Tensor:
        """Merge ``U Vᵀ`` into A, in place, and clip singular values that would be above ``bound`` (PARTIAL).

        Skipped where A would not be finite; where U or V is not finite the perturbation is reset instead. ``force``
        changes nothing. Waits for the device. Returns the :class:`p4flows.MergeOutcome`, an int64 tensor ().
        """
        outcome = self._merge()
        if outcome != MergeOutcome.SKIPPED:
            self.reset()
        return torch.full_like(self.merges, int(outcome))

    def _merge(self) -> MergeOutcome:
        if not bool((largest(self.U) * largest(self.V)).isfinite()):
            return MergeOutcome.RESET
        U, V = (M.to(self.exact.dtype) for M in (self.U, self.V))
        new = torch.addmm(self.exact, U, V.mT)
        if not bool(new.to(self.A.dtype).isfinite().all()):
            return MergeOutcome.SKIPPED
        if torch.equal(new, self.exact):  # so that what is known of the norm does not grow by rounding
            return MergeOutcome.MERGED
        gram_U, gram_V = (M.mT.double() @ M.double() for M in (U, V))
        size = float((gram_U * gram_V).sum().clamp(min=0).sqrt()) * (1 + 1e-9)  # the Frobenius norm of U Vᵀ
        magnitude = float(torch.linalg.matrix_norm(self.exact.double())) + size
        return self._store(new, magnitude, float(self.norm_bound) + size)

    def _store(self, new: Tensor, magnitude: float, known: float = math.inf) -> MergeOutcome:
        """Make ``new`` the matrix A, or the nearest one in the set.

        ``known`` bounds its norm but for rounding, and ``magnitude`` the Frobenius norm of what was added up for it.
        """
        # Adding a product of rank k, and rounding the sum twice, errs by less than this in the Frobenius norm.
        rounding = self._rounding(self.rank + 4, magnitude)
        if known + rounding <= self.bound:
            self.set_frozen(new)
            self.norm_bound.fill_(known + rounding)
            return MergeOutcome.MERGED
        t = certified_norm(new.to(self.A.dtype), self.direction, self.bound)
        if t <= self.bound:
            self.set_frozen(new)
            self.norm_bound.fill_(t)
            return MergeOutcome.MERGED
        new = clipped(new, self.bound)
        t = certified_norm(new, self.direction, self.bound * (1 + 1e-6))
        # A little less than the bound, for rounding, and so that the same can be proved of the result again.
        rounding = self._rounding(2, float(torch.linalg.matrix_norm(new)))
        self.set_frozen(new * (self.bound / (t * (1 + 1e-6) + rounding)))
        self.norm_bound.fill_(self.bound)
        return MergeOutcome.PARTIAL

    def _rounding(self, times: int, magnitude: float) -> float:
        limits = torch.finfo(self.A.dtype)
        return times * (limits.eps * magnitude + self.A.numel() ** 0.5 * limits.smallest_normal * limits.eps)

    @torch.no_grad()
    def effective_bound(self) -> Tensor:
        """A proved upper bound of the norm of the effective matrix ``A + U Vᵀ``, () in float64. O(m n min(m, n))."""
        found = certified_norm(self.trained_matrix, self.direction.clone(), self.bound)
        return torch.full_like(self.norm_bound, found)

    def penalty(self) -> Tensor:
        """``relu(‖(A + U Vᵀ) q‖ - bound)²``, a differentiable scalar () in float64, where q is the unit vector at which
        the last power iteration ended. It is zero as long as the norm is not seen to be above ``bound``."""
        q = self.direction
        norm = torch.linalg.vector_norm(self.A @ q + self.U @ (self.V.mT @ q))
        return torch.relu(norm.double() - self.bound).square()

    @torch.no_grad()
    def violation(self) -> Tensor:
        """By which part of ``bound`` the norm of A is above it, () in float64; by singular values."""
        return (_norm(self.A) / self.bound - 1).clamp(min=0)

    @torch.no_grad()
    def correct(self) -> Tensor:
        """Prove the norm of A anew, and clip singular values above ``bound``, for an A that came from elsewhere.

        O(m n min(m, n)); waits for the device. Returns the :class:`p4flows.Correction`, an int64 tensor ().
        """
        A = self.exact.clone()
        same = self._store(A, float(torch.linalg.matrix_norm(A.double()))) == MergeOutcome.MERGED
        return torch.full_like(self.merges, int(Correction.NONE if same else Correction.INVERTED))

    @torch.no_grad()
    def set_matrix(self, M: Tensor) -> None:
        """Make M (m, n) the effective matrix: A = M, U = 0.

        Raises ValueError, and changes nothing, if M has another shape, is not finite in the layer's dtype, or has a
        norm that is above ``bound`` by more than rounding.
        """
        M = self.checked(M)
        if _norm(M) > self.bound * (1 + 1e-6):
            raise ValueError(f"M: expected a spectral norm of at most {self.bound:g}, got {_norm(M):g}")
        self._set(M)

    @torch.no_grad()
    def set_average(self, M: Tensor) -> None:
        """Make the matrix of the set that is nearest to M (m, n) the effective one: for averages over training.

        Raises ValueError, and changes nothing, if M has another shape or is not finite.
        """
        self._set(self.checked(M))

    def _set(self, M: Tensor) -> None:
        self._store(M.to(self.exact), float(torch.linalg.matrix_norm(M.double())))
        self.U.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> P4Lipschitz:
        # Rounding to another dtype may lead out of the set, and a bound must not be rounded down.
        dtype, known = self.A.dtype, self.norm_bound
        super()._apply(fn, recurse)
        if self.norm_bound.dtype != known.dtype:
            self.norm_bound = moved(known, self.A.device)
        if self.A.dtype != dtype and not self.A.is_meta:
            self.correct()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        if self.A.is_meta:
            return
        if not self.direction.isfinite().all():
            self.direction.copy_(self._start())
        # Rounding to another dtype may lead out of the set, and a state may say anything of its norm.
        if not _norm(self.A) * (1 - 1e-12) <= self.norm_bound <= self.bound:
            self.correct()

    def refusal(self, M: Tensor) -> str | None:
        wrong = super().refusal(M)
        rounding = torch.finfo(M.dtype).eps * min(M.shape) ** 0.5
        if wrong is not None or _norm(M) <= self.bound * (1 + rounding):
            return wrong
        return f"expected a spectral norm of at most {self.bound:g}, got {_norm(M):g}"


def _norm(M: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(M.double(), 2)

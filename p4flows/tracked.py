"""Matrices ``A + U Vᵀ`` whose inverse and determinant are tracked through merges: what P4Inv layers share."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence

import torch
from torch import Tensor, nn

from p4flows import algebra
from p4flows._checks import Bounds, bounds, flag, integer, number
from p4flows._random import directions
from p4flows.frozen import FrozenMatrices
from p4flows.initial import InitialMatrix
from p4flows.merging import Group, correct_, drifted_, merge_, redraw_

__all__ = ["TrackedInverse"]


class TrackedInverse(FrozenMatrices):
    """One matrix ``A + U Vᵀ`` (n, n), or many under leading dimensions (*batch, n, n), trained by Algorithm 2.

    Attributes, one or *batch of each: those of :class:`p4flows.frozen.FrozenMatrices`; parameters U, V (n, k); buffers
    seed, merges (), int64. A subclass creates them, and says what the map is.
    """

    U: nn.Parameter
    V: nn.Parameter
    bias: nn.Parameter | None
    seed: Tensor
    merges: Tensor

    def __init__(
        self,
        features: int,
        rank: int,
        bounds_update: Bounds,
        bounds_det: Bounds,
        bounds_penalty: Bounds,
        penalty_weight: float,
    ) -> None:
        super().__init__()
        self.features = integer("features", features, 1)
        self.rank = integer("rank", rank, 1, self.features)
        self.bounds_update = bounds("bounds_update", bounds_update)
        self.bounds_det = bounds("bounds_det", bounds_det)
        self.bounds_penalty = bounds("bounds_penalty", bounds_penalty)
        self.penalty_weight = number("penalty_weight", penalty_weight, 0)

    def _register(self, start: InitialMatrix, seed: Tensor, bias: bool) -> None:
        """Create all tensors: the frozen ones from ``start``, the perturbation zero with the first V of ``seed``."""
        self._register_frozen(start)
        self.register_buffer("seed", seed)
        self.register_buffer("merges", torch.zeros_like(seed))
        V = directions(seed, self.merges, self.features, self.rank).to(start.A.dtype)
        self.U = nn.Parameter(torch.zeros_like(V))
        self.V = nn.Parameter(V)
        zero = torch.zeros_like(start.A[..., 0])
        self.register_parameter("bias", nn.Parameter(zero) if flag("bias", bias) else None)

    @property
    def matrix(self) -> Tensor:
        """The effective matrix ``A + U Vᵀ``, (*batch, n, n), differentiable. For tests, plots and export."""
        return self.A + self.U @ self.V.mT

    @property
    def matrix_double(self) -> Tensor:
        """The effective matrix in float64, (*batch, n, n), from what A is rounded from; not differentiable."""
        A = self.A if self.A_double is None else self.A_double
        return A + self.U.detach().double() @ self.V.detach().mT.double()

    @torch.no_grad()
    def set_matrix(self, M: Tensor) -> None:
        """Make M (*batch, n, n) the effective matrix: A = M, U = 0. Inverted in float64, O(n³).

        Raises ValueError, and changes nothing, if M has another shape, is not finite or is singular.
        """
        if not isinstance(M, Tensor) or M.shape != self.A.shape or M.is_complex() or M.is_meta:
            raise ValueError(f"M: expected a real tensor of shape {tuple(self.A.shape)}, got {M!r}")
        M = M.to(self.A.device, torch.float64)
        sign, logabsdet = torch.linalg.slogdet(M)
        M_inv, info = torch.linalg.inv_ex(M)
        rounded = M.to(self.A.dtype), M_inv.to(self.A.dtype)
        if info.any() or not all(T.isfinite().all() for T in (*rounded, logabsdet)):
            raise ValueError("M: expected invertible matrices whose entries and inverses are finite")
        for state in Group([self]).states():
            for target, value in (("A", M), ("A_inv", M_inv), ("sign_A", sign), ("logabsdet_A", logabsdet)):
                getattr(state, target).copy_(value.view_as(getattr(state, target)))
            state.U.zero_()
            state.rounding.zero_()
            state.round_()

    @property
    def inverse_matrix(self) -> Tensor:
        """The inverse of the effective matrix by equation 1, (*batch, n, n), differentiable."""
        W, C = algebra.capacitance(self.A_inv, self.U, self.V)
        return self.A_inv - W @ algebra.solve_capacitance(C, self.V.mT @ self.A_inv)

    @property
    def sign(self) -> Tensor:
        """Sign of the effective determinant, (*batch) in float64."""
        _, C = algebra.capacitance(self.A_inv, self.U, self.V)
        return algebra.sign_and_logabsdet(C)[0] * self.sign_A

    @property
    def logabsdet(self) -> Tensor:
        """ln|det| of the effective matrix, (*batch) in float64, differentiable."""
        _, C = algebra.capacitance(self.A_inv, self.U, self.V)
        return algebra.sign_and_logabsdet(C)[1] + self.logabsdet_A

    def _check(self, x: Tensor, leading: Sequence[int] = ()) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise ValueError(f"input: expected a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
        if x.device != self.A.device:
            raise ValueError(f"input: expected device {self.A.device} as the layer's, got {x.device}")
        lead = len(leading)
        if x.ndim <= lead or x.shape[-1] != self.features or x.shape[:lead] != torch.Size(leading):
            expected = ", ".join([*map(str, leading), "...", str(self.features)])
            raise ValueError(f"input: expected shape ({expected}), got {tuple(x.shape)}")
        if x.dtype != self.A.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"input: expected dtype {self.A.dtype} as the layer's, got {x.dtype}")

    @property
    def zeroed(self) -> tuple[nn.Parameter, ...]:
        return (self.U,)

    @property
    def redrawn(self) -> tuple[nn.Parameter, ...]:
        return (self.V,)

    @property
    def group_key(self) -> Hashable:
        return self.U.shape, self.U.dtype, self.U.device, self.bounds_update, self.bounds_det

    def merge(self, force: bool = False) -> Tensor:
        """Merge ``U Vᵀ`` into A, A_inv and log|det A| (Algorithm 2), in place, O(k n²).

        Skipped where ln|G| or ln|G det A| is out of bounds, unless forced; where the new A or A_inv would not be
        finite, even if forced; and where U or V is not finite: then the perturbation is reset instead. Does not
        wait for the device. Returns the :class:`MergeOutcome`, an int64 tensor (*batch).
        """
        return type(self).merge_all([self], force)[0]

    @classmethod
    def group(cls, layers: Iterable[TrackedInverse]) -> Group:
        """Layers of equal ``group_key``, to be merged and corrected together. Narrow ones will share their memory."""
        return Group(layers)

    @classmethod
    def merge_all(cls, layers: Sequence[TrackedInverse], force: bool = False) -> Tensor:
        """Merge layers of equal ``group_key``, narrow ones in one batched call. The outcomes, (len(layers), *batch)."""
        first = layers[0]
        options = {"force": force, "bounds_update": first.bounds_update, "bounds_det": first.bounds_det}
        states = (layers if isinstance(layers, Group) else Group(layers)).states()
        return cls._joined([merge_(state, **options) for state in states], layers)

    @staticmethod
    def _joined(outcomes: list[Tensor], layers: Sequence[TrackedInverse]) -> Tensor:
        outcome = outcomes[0] if len(outcomes) == 1 else torch.cat(outcomes)
        return outcome.view(len(layers), *layers[0].merges.shape)

    def reset(self) -> None:
        """Drop the perturbation without merging it: U = 0, a new V; the function becomes that of A."""
        for state in Group([self]).states():
            everywhere = torch.ones_like(state.merges, dtype=torch.bool)
            redraw_(state.U, state.V, state.seed, state.merges, everywhere)

    def correct(self, order: int | None = None) -> Tensor:
        """Correct A_inv by hyperpower iteration, and recompute log|det A| and its sign by LU, all in float64.

        ``order`` is 2, 3 or 7 for one step of that order, see :func:`p4flows.algebra.hyperpower`; by default it takes
        as many steps as get A_inv down to rounding with the fewest products. Where the iteration cannot converge
        (Frobenius norm of ``I - A A_inv`` of 1 or more) A is inverted instead, which is logged. Whatever is not
        finite is not stored. O(n³); waits for the device. Returns the :class:`Correction`, an int64 tensor (*batch).
        """
        if order is not None and (type(order) is not int or order not in (2, 3, 7)):
            raise ValueError(f"order: expected 2, 3, 7 or None, got {order!r}")
        return self._joined([correct_(state, order=order) for state in Group([self]).states()], [self])[0]

    @classmethod
    def correct_all(cls, layers: Sequence[TrackedInverse], where_needed: bool = False) -> Tensor:
        """Correct layers of equal ``group_key``, narrow ones in one batched call; :class:`Correction` (n, *batch).

        With ``where_needed`` only where an O(n²) estimate of the Frobenius norm of ``I - A A_inv``, from four random
        vectors, is above ε of the layer's dtype (1e-10 for float64, or 1000 times what rounding leaves).
        """
        states = (layers if isinstance(layers, Group) else Group(layers)).states()
        return cls._joined([correct_(state, drifted_(state) if where_needed else None) for state in states], layers)

    def penalty(self) -> Tensor:
        r"""The penalty of Appendix A, summed over *batch, a differentiable scalar () in float64:

        .. math:: g = C_p \sum_{l \in \{\ln|G|, \ln|G \det A|\}}
            \mathrm{ReLU}^2(l - C_{max}) + \mathrm{ReLU}^2(C_{min} - l)
        """
        _, C = algebra.capacitance(self.A_inv, self.U, self.V)
        # Where G = 0 the gradient would be infinite: a large constant instead.
        singular = algebra.sign_and_logabsdet(C.detach())[0] == 0
        identity = torch.eye(self.rank, dtype=C.dtype, device=C.device)
        regular = torch.where(singular[..., None, None], identity, C)
        log_G = algebra.sign_and_logabsdet(regular)[1].where(~singular, math.log(torch.finfo(C.dtype).tiny))
        low, high = self.bounds_penalty
        total = torch.zeros_like(log_G)
        for value in (log_G, log_G + self.logabsdet_A):
            if high is not None:
                total = total + torch.relu(value - high) ** 2
            if low is not None:
                total = total + torch.relu(low - value) ** 2
        return self.penalty_weight * total.sum()

    @torch.no_grad()
    def residual(self) -> Tensor:
        """``max|A A_inv - I|`` of the frozen pair, (*batch). A diagnostic, O(n³)."""
        return algebra.residual(self.A, self.A_inv).abs().amax((-2, -1))

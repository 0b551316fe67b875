"""Matrices ``A + U Vᵀ`` whose inverse and determinant are tracked through merges: what P4Inv layers share."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from p4flows import algebra
from p4flows._checks import Bounds, bounds, integer
from p4flows._random import normal
from p4flows.initial import InitialMatrix
from p4flows.merging import Group, correct_, merge_, redraw_
from p4flows.perturbation import P4Layer

__all__ = ["TrackedInverse"]

Self = TypeVar("Self", bound="TrackedInverse")


class TrackedInverse(P4Layer):
    """One matrix ``A + U Vᵀ`` (n, n), or many under leading dimensions (*batch, n, n), trained by Algorithm 2.

    Attributes, one or *batch of each: parameters U, V (n, k); buffers A, A_inv (n, n); logabsdet_A, sign_A (), float64
    whatever the layer's dtype; seed, merges (), int64. A subclass creates them, and says what the map is.
    """

    _version = 1  # of the state dict; see nn.Module._load_from_state_dict

    U: nn.Parameter
    V: nn.Parameter
    bias: nn.Parameter | None
    A: Tensor
    A_inv: Tensor
    sign_A: Tensor
    logabsdet_A: Tensor
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
        if not penalty_weight >= 0:
            raise ValueError(f"penalty_weight: expected a number >= 0, got {penalty_weight!r}")
        self.penalty_weight = float(penalty_weight)

    def _register(self, start: InitialMatrix, seed: Tensor, bias: bool) -> None:
        """Create all tensors: the frozen ones from ``start``, the perturbation zero with the first V of ``seed``."""
        self.register_buffer("A", start.A)
        self.register_buffer("A_inv", start.A_inv)
        self.register_buffer("sign_A", start.sign)
        self.register_buffer("logabsdet_A", start.logabsdet)
        self.register_buffer("seed", seed)
        self.register_buffer("merges", torch.zeros_like(seed))
        V = normal(seed, self.merges, (self.features, self.rank)).to(start.A.dtype)
        self.U = nn.Parameter(torch.zeros_like(V))
        self.V = nn.Parameter(V)
        self.register_parameter("bias", nn.Parameter(torch.zeros_like(start.A[..., 0])) if bias else None)

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # .float(), .half() and .to(dtype) must not round the tracked log-determinant.
        kept = {name: getattr(self, name) for name in ("sign_A", "logabsdet_A")}
        super()._apply(fn, recurse)
        for name, value in kept.items():
            moved = getattr(self, name)
            if moved.dtype != value.dtype:
                setattr(self, name, value.to(moved.device))
        return self

    @property
    def matrix(self) -> Tensor:
        """The effective matrix ``A + U Vᵀ``, (*batch, n, n), differentiable. For tests, plots and export."""
        return self.A + self.U @ self.V.mT

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
        outcomes = [merge_(**state, **options) for state in states]
        return (outcomes[0] if len(outcomes) == 1 else torch.cat(outcomes)).view(len(layers), *first.merges.shape)

    def reset(self) -> None:
        """Drop the perturbation without merging it: U = 0, a new V; the function becomes that of A."""
        for state in Group([self]).states():
            everywhere = torch.ones_like(state["merges"], dtype=torch.bool)
            redraw_(state["U"], state["V"], state["seed"], state["merges"], everywhere)

    def correct(self, order: int = 7) -> None:
        """Correct A_inv by one hyperpower iteration, and recompute log|det A| and its sign by LU in float64.

        ``order`` is 2, 3 or 7, see :func:`p4flows.algebra.hyperpower`. Where the iteration cannot converge
        (Frobenius norm of ``I - A A_inv`` of 1 or more) A is inverted in float64 instead. Whatever is not
        finite is not stored. O(n³), called every few hundred or thousand steps; waits for the device once.
        """
        type(self).correct_all([self], order)

    @classmethod
    def correct_all(cls, layers: Sequence[TrackedInverse], order: int = 7) -> None:
        """Correct layers of equal ``group_key``, narrow ones in one batched call."""
        for state in (layers if isinstance(layers, Group) else Group(layers)).states():
            correct_(state["A"], state["A_inv"], state["sign_A"], state["logabsdet_A"], order)

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

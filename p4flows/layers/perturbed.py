"""Layers that compute with ``A + U Vᵀ``, A with a tracked inverse: what P4Inv and P4InvStack share."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from p4flows.checks import Bounds, bounds, integer, number
from p4flows.layers.low_rank import LowRank, default_rank
from p4flows.layers.tracked import Tracked
from p4flows.outcomes import MergeOutcome
from p4flows.perturbation import P4Layer
from p4flows.tracking import algebra
from p4flows.tracking.initial import InitialMatrix
from p4flows.tracking.matrix import TrackedMatrix
from p4flows.tracking.merging import merge_

__all__ = ["PAPER_BOUNDS", "PerturbedInverse"]

PAPER_BOUNDS: dict[str, Any] = {
    "bounds_update": (-6.0, None),
    "bounds_det": (-2.5, 15.5),
    "bounds_penalty": (-2.0, 15.0),
    "penalty_weight": 0.1,
}
"""The constants of Appendix A, as options of :class:`p4flows.P4Inv`: ``P4Inv(32, rank=1, **PAPER_BOUNDS)``.

They are made for n ≤ 128 near det = 1. The determinant of a wide or well-trained layer leaves them, and then most
merges are skipped.
"""


class PerturbedInverse(Tracked, LowRank, P4Layer):
    """One matrix ``A + U Vᵀ`` (n, n), or many under leading dimensions (*batch, n, n), trained by Algorithm 2.

    Attributes, one or *batch of each: those of :class:`Tracked` and :class:`LowRank`. A subclass says what the map is.
    """

    _version = 3  # of the state dict; 1 had no float64 pair, 2 had the matrices in the layer itself

    additive = True
    gathered = ("U", "V", "seed", "merges")

    def __init__(
        self,
        features: int,
        rank: int | None,
        bounds_update: Bounds = (-6.0, None),
        bounds_det: Bounds = (None, None),
        bounds_penalty: Bounds = (-2.0, None),
        penalty_weight: float = 0.1,
    ) -> None:
        super().__init__()
        self.features = integer("features", features, 1)
        self._rank_given = rank is not None
        self.rank = default_rank(self.features) if rank is None else integer("rank", rank, 1, self.features)
        self.bounds_update = bounds("bounds_update", bounds_update)
        self.bounds_det = bounds("bounds_det", bounds_det)
        self.bounds_penalty = bounds("bounds_penalty", bounds_penalty)
        self.penalty_weight = number("penalty_weight", penalty_weight, 0)

    def _register(self, start: InitialMatrix, dtype: torch.dtype, seed: Tensor, bias: bool) -> None:
        self.tracked = TrackedMatrix(start, dtype)
        self.register_perturbation(self.tracked.A, self.rank, seed, bias)

    @property
    def matrix_double(self) -> Tensor:
        """The effective matrix in float64, (*batch, n, n), from what A is rounded from; not differentiable."""
        return self.tracked.exact[0] + self.U.detach().double() @ self.V.detach().mT.double()

    @property
    def trained_matrix(self) -> Tensor:
        """What an average over training is an average of: :attr:`matrix_double`."""
        return self.matrix_double

    @torch.no_grad()
    def set_matrix(self, M: Tensor) -> None:
        """Make M (*batch, n, n) the effective matrix: A = M, U = 0. Inverted in float64, O(n³).

        Raises ValueError, and changes nothing, if M has another shape, is not finite or is singular.
        """
        self.tracked.set(M)
        self.U.zero_()

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

    @property
    def group_key(self) -> Hashable:
        return self.U.shape, self.U.dtype, self.U.device, self.bounds_update, self.bounds_det

    def merge(self, force: bool = False) -> Tensor:
        """Merge ``U Vᵀ`` into A, A_inv and log|det A| (Algorithm 2), in place, O(k n²).

        Skipped where ln|G| or ln|G det A| is out of bounds, unless forced; where the new A or A_inv would not be
        finite, even if forced; and where U or V is not finite: then the perturbation is reset instead. Does not
        wait for the device. Returns the :class:`p4flows.MergeOutcome`, an int64 tensor (*batch).
        """
        return MergeOutcome.without_reason(type(self).merge_all([self], force)[0])

    @classmethod
    def merge_all(cls, layers: Sequence[Any], force: bool = False) -> Tensor:
        """Merge layers of equal ``group_key``, narrow ones in one batched call.

        Returns the :class:`p4flows.MergeOutcome` of each with the reason of a skip, (len(layers), *batch).
        """
        first = layers[0]
        options: dict[str, Any] = {"force": force, "bounds_update": first.bounds_update, "bounds_det": first.bounds_det}
        states = cls._grouped(layers).states()
        return cls._joined([merge_(state, **options) for state in states], layers)

    def penalty(self) -> Tensor:
        r"""The penalty of Appendix A, summed over *batch, a differentiable scalar () in float64:

        .. math:: g = C_p \sum_l \mathrm{ReLU}^2(l - C_{max}) + \mathrm{ReLU}^2(C_{min} - l)

        over :math:`l = \ln|G|`, and :math:`l = \ln|G \det A|` where ``bounds_det`` bounds it.
        """
        _, C = algebra.capacitance(self.A_inv, self.U, self.V)
        # Where G = 0 the gradient would be infinite: a large constant instead.
        singular = algebra.sign_and_logabsdet(C.detach())[0] == 0
        identity = torch.eye(self.rank, dtype=C.dtype, device=C.device)
        regular = torch.where(singular[..., None, None], identity, C)
        log_G = algebra.sign_and_logabsdet(regular)[1].where(~singular, math.log(torch.finfo(C.dtype).tiny))
        low, high = self.bounds_penalty
        total = torch.zeros_like(log_G)
        for value in (log_G, *([log_G + self.logabsdet_A] if self.bounds_det != (None, None) else [])):
            if high is not None:
                total = total + torch.relu(value - high) ** 2
            if low is not None:
                total = total + torch.relu(low - value) ** 2
        return self.penalty_weight * total.sum()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, metadata: dict, *arguments: Any) -> None:
        stored = state_dict.get(f"{prefix}U")
        if metadata.get("version", 1) < 3 and not self._rank_given and stored is not None:
            # Up to version 2 the rank was 1 unless it was given.
            self._set_rank(stored.shape[-1])
        super()._load_from_state_dict(state_dict, prefix, metadata, *arguments)

    def _set_rank(self, rank: int) -> None:
        self.rank = rank
        for parameter in (self.U, self.V):
            parameter.data = parameter.data.new_zeros(*parameter.shape[:-1], rank)
        self.V.requires_grad_(rank == 1)

"""A tracked matrix that becomes a dense weight at once: following with an update of full rank.

An update of rank n is all of ``E = W - A``, and what Woodbury's formula would make of it is W⁻¹ itself. For narrow
matrices an inversion costs less than the products and decompositions by which :mod:`p4flows.tracking.following` finds
an update of lower rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from p4flows.checks import Bounds
from p4flows.perturbation import MergeOutcome
from p4flows.tracking import algebra
from p4flows.tracking.group import Matrices
from p4flows.tracking.merging import PARTS, Sanity, sanity

__all__ = ["jump_"]


@torch.no_grad()
def jump_(state: Matrices, *, force: bool, bounds_update: Bounds, bounds_det: Bounds) -> Tensor:
    """Make each A (L, n, n) its weight ``state.own["weight"]``, or go a part of the way where the whole is not sane.

    Costs one factorisation in float64, O(n³). Waits for the device. Returns the outcomes (L,).
    """
    W = state.own["weight"].double()
    finite = W.isfinite().flatten(1).all(1)
    if not finite.all():
        W = torch.where(finite[:, None, None], W, state.A)
    part, target = torch.ones_like(state.logabsdet), W
    for smaller in (*PARTS, None):
        inverse, sign, logabsdet = _inverted(target)
        found = _sanity(state, target, inverse, sign, logabsdet, bounds_update, bounds_det)
        sane = found.reason == 0
        accepted = finite & (found.storable if force else sane)
        if smaller is None or (accepted | ~finite).all():
            break
        part = torch.where(accepted, part, smaller)
        target = torch.lerp(state.A, W, part[:, None, None])

    if not accepted.all():
        kept = accepted[:, None, None]
        target, inverse = torch.where(kept, target, state.A), torch.where(kept, inverse, state.A_inv)
        sign, logabsdet = sign.where(accepted, state.sign), logabsdet.where(accepted, state.logabsdet)
    state.set(target, inverse, sign, logabsdet, state.rounding.masked_fill(accepted, 0))
    taken = torch.where(part < 1, int(MergeOutcome.PARTIAL), int(MergeOutcome.MERGED))
    taken = taken.where(sane, int(MergeOutcome.FORCED))
    return taken.where(accepted, found.reason).where(finite, int(MergeOutcome.SKIPPED_NOT_FINITE))


def _inverted(M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """M⁻¹, the sign of det M and ln|det M| for M (L, n, n), by one factorisation; not finite where M is singular."""
    LU, pivots, _ = torch.linalg.lu_factor_ex(M)
    diagonal = LU.diagonal(dim1=-2, dim2=-1)
    exchanges = (pivots != torch.arange(1, M.shape[-1] + 1, device=M.device)).sum(-1)
    sign = diagonal.sign().prod(-1) * (1 - 2 * (exchanges % 2))
    identity = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device).expand_as(M)
    return torch.linalg.lu_solve(LU, pivots, identity), sign, diagonal.abs().log_().sum(-1)


def _sanity(
    state: Matrices,
    target: Tensor,
    inverse: Tensor,
    sign: Tensor,
    logabsdet: Tensor,
    bounds_update: Bounds,
    bounds_det: Bounds,
) -> Sanity:
    """The sanity check of the update ``target - A``; its capacitance is ``target A⁻¹``, see :func:`sanity`."""
    limit = torch.finfo(state.dtype).max / 4
    fits = (algebra.largest(target) < limit) & (algebra.largest(inverse) < limit)
    G = state.sign * sign, logabsdet - state.logabsdet
    low, high = bounds_update
    E = torch.linalg.matrix_norm(target - state.A)
    # Most steps are so small that norms tell enough: ‖target A⁻¹‖ ≤ 1 + ‖E‖ ‖A⁻¹‖, and likewise for its inverse.
    near = low is None or (torch.log1p(E * torch.linalg.matrix_norm(inverse)) <= -low).all()
    near &= high is None or (torch.log1p(E * torch.linalg.matrix_norm(state.A_inv)) <= high).all()
    if near:
        return sanity(state, G, state.A, state.A, fits, (None, None), bounds_det)
    return sanity(state, G, target @ state.A_inv, state.A @ inverse, fits, bounds_update, bounds_det)

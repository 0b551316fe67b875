"""A tracked matrix that becomes a dense weight at once: following with an update of full rank.

An update of rank n is all of ``E = W - A``, and what Woodbury's formula would make of it is W⁻¹ itself. For narrow
matrices an inversion costs less than the products and decompositions by which :mod:`p4flows.tracking.following` finds
an update of lower rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from p4flows.checks import Bounds
from p4flows.outcomes import MergeOutcome
from p4flows.tracking import algebra
from p4flows.tracking.group import Matrices
from p4flows.tracking.merging import PARTS, regular, sanity

__all__ = ["jump_"]


@torch.no_grad()
def jump_(state: Matrices, *, force: bool, bounds_update: Bounds, bounds_det: Bounds) -> Tensor:
    """Make each A (L, n, n) its weight ``state.own["weight"]``, or go a part of the way where the whole is not sane.

    Costs one factorisation in float64, O(n³). Waits for the device. Returns the outcomes (L,).
    """
    W = state.own["weight"].double()
    inverse, sign, logabsdet = algebra.invert(W)
    if bounds_det == (None, None) and _near(state, W, inverse, bounds_update):
        state.set(W, inverse, sign, logabsdet, torch.zeros_like(state.rounding))
        return torch.full_like(logabsdet, int(MergeOutcome.MERGED), dtype=torch.int64)
    return _jump_or_part(state, W, force, bounds_update, bounds_det)


def _near(state: Matrices, target: Tensor, inverse: Tensor, bounds: Bounds) -> bool:
    """Whether norms alone tell that every ``target - A`` is sane, as they do of most steps.

    ``‖target A⁻¹‖ ≤ 1 + ‖E‖ ‖A⁻¹‖`` for ``E = target - A``, and likewise for the inverse, ``A target⁻¹``.
    """
    low, high = bounds
    limit = torch.finfo(state.dtype).max / 8
    distance, size = torch.linalg.matrix_norm(target - state.A), torch.linalg.matrix_norm(inverse)
    near = (distance < limit) & (size < limit) & regular(torch.linalg.matrix_norm(target), size, state.dtype)
    if low is not None:
        near &= torch.log1p(distance * size) <= -low
    if high is not None:
        near &= torch.log1p(distance * torch.linalg.matrix_norm(state.A_inv)) <= high
    return bool(near.all())


def _jump_or_part(state: Matrices, W: Tensor, force: bool, bounds_update: Bounds, bounds_det: Bounds) -> Tensor:
    finite = W.isfinite().flatten(1).all(1)
    W = torch.where(finite[:, None, None], W, state.A)
    limit = torch.finfo(state.dtype).max / 4
    part, target = torch.ones_like(state.logabsdet), W
    for smaller in (*PARTS, None):
        inverse, sign, logabsdet = algebra.invert(target)
        entries, entries_inv = algebra.largest(target), algebra.largest(inverse)
        fits = (entries < limit) & (entries_inv < limit) & regular(entries, entries_inv, state.dtype)
        G = state.sign * sign, logabsdet - state.logabsdet
        # target A⁻¹ is the capacitance of the update Pᵀ E, P = I.
        found = sanity(state, G, target @ state.A_inv, state.A @ inverse, fits, bounds_update, bounds_det)
        sane = found.reason == 0
        accepted = finite & (found.storable if force else sane)
        if smaller is None or (accepted | ~finite).all():
            break
        part = torch.where(accepted, part, smaller)
        target = torch.lerp(state.A, W, part[:, None, None])

    kept = accepted[:, None, None]
    target, inverse = torch.where(kept, target, state.A), torch.where(kept, inverse, state.A_inv)
    sign, logabsdet = sign.where(accepted, state.sign), logabsdet.where(accepted, state.logabsdet)
    state.set(target, inverse, sign, logabsdet, state.rounding.masked_fill(accepted, 0))
    taken = torch.where(part < 1, int(MergeOutcome.PARTIAL), int(MergeOutcome.MERGED))
    taken = taken.where(sane, int(MergeOutcome.FORCED))
    return taken.where(accepted, found.reason).where(finite, int(MergeOutcome.SKIPPED_NOT_FINITE))

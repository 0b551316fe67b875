"""Algorithm 2 on stacked tensors: many perturbations ``U Vᵀ`` of one shape are merged at a time.

Merges work on A and A⁻¹ in float64, and what the layers compute with is rounded from them: rounding A anew at every
merge would move it away from A⁻¹ by rounding errors that add up (at n = 512 in float32, to a residual 200 times that of
the rounded inverse within 20 merges). Refining W and Vᵀ A⁻¹ against A at each merge is no way out: the formula of
Sherman and Morrison moves A⁻¹ along with the error that it has, while refined factors leave that error behind, to grow
with every change of the condition. Merge decisions stay on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from p4flows.checks import Bounds
from p4flows.outcomes import MergeOutcome
from p4flows.tracking import algebra
from p4flows.tracking.group import Matrices
from p4flows.tracking.noise import redraw_

__all__ = ["PARTS", "Sanity", "merge_", "regular", "room", "sanity", "update_"]

# Parts of an update that are tried where the whole is not sane, by layers that can keep the rest for later.
PARTS = (0.5, 0.25, 0.125)

_EPS = torch.finfo(torch.float64).eps
_SMALL = 1e6  # of the product of sizes of an update, far from 1 / _EPS


@torch.no_grad()
def merge_(state: Matrices, *, force: bool, bounds_update: Bounds, bounds_det: Bounds) -> Tensor:
    """Merge each perturbation by Algorithm 2, or skip or reset it; the outcomes (L,), see :meth:`p4flows.P4Inv.merge`.

    ``state.own`` has U, V (L, n, k) and seed, merges (L,).
    """
    U, V, seed, merges = (state.own[name] for name in ("U", "V", "seed", "merges"))
    size_U, size_V = algebra.largest(U), algebra.largest(V)
    finite = size_U.isfinite() & size_V.isfinite()
    U_new, V_new = (torch.where(finite[:, None, None], M, 0).double() for M in (U, V))
    W, C, Z = algebra.merge_products(state.A_inv, U_new, V_new)
    C_inv = algebra.invert_capacitance(C)
    K = C_inv @ Z
    size, size_inv = size_U * size_V, algebra.largest(W) * algebra.largest(K)
    fits = room(state, C, size, size_inv, force)
    found = sanity(state, algebra.sign_and_logabsdet(C), C, C_inv, fits, bounds_update, bounds_det)
    if not force:
        k = C.shape[-1]
        ruinous = (found.reason == 0) & ~_invertible(state, k * size, k * size_inv)
        found.reason = found.reason.masked_fill(ruinous, int(MergeOutcome.SKIPPED_RANGE))
    accepted = finite & (found.storable if force else found.reason == 0)

    if not accepted.is_cpu or accepted.any():  # elsewhere, asking would mean waiting
        update_(state, accepted, U_new, V_new, W, K, found)
    done = accepted | ~finite
    if not done.is_cpu or done.any():
        redraw_(U, V, seed, merges, done)
        state.store("U", "V", "merges")
    forced = torch.where(found.reason == 0, int(MergeOutcome.MERGED), int(MergeOutcome.FORCED))
    return forced.where(accepted, found.reason).where(finite, int(MergeOutcome.RESET))


class Sanity:
    """What an update would do: sign and ln|G| (L,) of its determinant, whether the result can be stored (L,), and
    ``reason`` (L,), zero or the :class:`p4flows.MergeOutcome` of a skip."""

    def __init__(self, sign_G: Tensor, log_G: Tensor, storable: Tensor, reason: Tensor) -> None:
        self.sign_G, self.log_G, self.storable, self.reason = sign_G, log_G, storable, reason


def room(state: Matrices, C: Tensor, size: Tensor, size_inv: Tensor, force: bool) -> Tensor:
    """Whether A and A⁻¹ can hold an update (L,), rank-one terms of which have entries of up to these sizes (L,).

    An update that is to be forced must not lead to a matrix that is singular to rounding, either.
    """
    k, limit = C.shape[-1], torch.finfo(state.dtype).max / 4
    fits = algebra.fits(state.A, k * size, limit) & algebra.fits(state.A_inv, k * size_inv, limit)
    if force:
        fits &= regular(*_sizes(state, k * size, k * size_inv), state.dtype)
    return fits


def _sizes(state: Matrices, update: Tensor, update_inv: Tensor) -> tuple[Tensor, Tensor]:
    """What the entries of A and A⁻¹ may be at most after an update with entries of at most these sizes (L,)."""
    return algebra.largest(state.A) + update, algebra.largest(state.A_inv) + update_inv


def _invertible(state: Matrices, update: Tensor, update_inv: Tensor) -> Tensor:
    """Whether A is not singular to float64 after an update with entries of at most these sizes (L,)."""
    small = update * update_inv < _SMALL
    if small.is_cpu and small.all():
        return small  # without a look at the matrices
    size, size_inv = _sizes(state, update, update_inv)
    return size * size_inv < 1 / _EPS


def regular(size: Tensor, size_inv: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether matrices of this size, with inverses of that size (L,), are not singular to float64, or once rounded."""
    rounding = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    return size * size_inv < min(algebra.SINGULAR / _EPS, 0.5 / rounding)


def sanity(
    state: Matrices,
    G: tuple[Tensor, Tensor],
    C: Tensor,
    C_inv: Tensor,
    fits: Tensor,
    bounds_update: Bounds,
    bounds_det: Bounds,
) -> Sanity:
    """The sanity check of Algorithm 2 for updates of capacitance C (L, k, k), with its inverse, and G = det C.

    ``G`` is the sign and ln|G| (L,), and ``fits`` (L,) says whether the result is within the range of the dtype. The
    bounds on ln|G| hold for every direction of an update of higher rank, that is for all ln σ of the singular values σ
    of C.
    """
    sign_G, log_G = G
    storable = fits & log_G.isfinite()
    reason = torch.zeros_like(state.logabsdet, dtype=torch.int64)
    for outcome, sane in (
        (MergeOutcome.SKIPPED_DETERMINANT, _within(log_G + state.logabsdet, bounds_det)),
        (MergeOutcome.SKIPPED_UPDATE, _directions_within(C, C_inv, log_G, bounds_update)),
        (MergeOutcome.SKIPPED_RANGE, storable),
    ):
        reason = reason.masked_fill(~sane, int(outcome))
    return Sanity(sign_G, log_G, storable, reason)


def update_(state: Matrices, accepted: Tensor, U: Tensor, V: Tensor, W: Tensor, K: Tensor, found: Sanity) -> None:
    """``A += U Vᵀ``, ``A⁻¹ -= W K`` and the determinant, in place, where ``accepted`` (L,)."""
    if not accepted.is_cpu or not accepted.all():
        U, W, K = (torch.where(accepted[:, None, None], M, 0) for M in (U, W, K))
    state.add("A", U, V.mT)
    state.add("A_inv", -W, K)
    state.sign.mul_(torch.where(accepted, found.sign_G, 1))
    state.logabsdet.add_(torch.where(accepted, found.log_G, 0))
    state.store("sign", "logabsdet")


def _directions_within(C: Tensor, C_inv: Tensor, log_G: Tensor, bounds: Bounds) -> Tensor:
    if C.shape[-1] == 1:
        return _within(log_G, bounds)
    low, high = bounds
    inside = torch.ones_like(log_G, dtype=torch.bool)
    if low is not None:
        inside &= _at_most(C_inv, -low)
    if high is not None:
        inside &= _at_most(C, high)
    return inside


def _at_most(M: Tensor, limit: float) -> Tensor:
    """Whether no ln σ of the singular values σ of M (L, k, k) is above the limit, (L,)."""
    sure = torch.linalg.matrix_norm(M).log() <= limit  # the Frobenius norm, too large by a factor of up to √k
    if sure.is_cpu and sure.all():
        return sure
    return sure | (algebra.log_spectral_norm(M) <= limit)


def _within(value: Tensor, bounds: Bounds) -> Tensor:
    low, high = bounds
    inside = torch.ones_like(value, dtype=torch.bool)
    if low is not None:
        inside &= value >= low
    if high is not None:
        inside &= value <= high
    return inside

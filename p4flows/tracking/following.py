"""A tracked matrix that follows a dense weight by low-rank updates, with error feedback.

With E = W - A, a step of subspace iteration from the last directions Q gives ``P = orth(E Q)`` and ``Q ← Eᵀ P``, and
``P Qᵀ`` is nearly the best approximation of E of rank k. A moves by it; what does not fit remains in E and is made up
for later, as in PowerSGD (Vogels, Karimireddy, Jaggi 2019, arXiv:1905.13727).
"""

from __future__ import annotations

import torch
from torch import Tensor

from p4flows.checks import Bounds
from p4flows.perturbation import MergeOutcome
from p4flows.tracking import algebra
from p4flows.tracking.group import Matrices
from p4flows.tracking.merging import sanity, update_

__all__ = ["follow_"]

# Parts of an update that are tried where the whole is not sane; the rest stays in E.
_PARTS = (0.5, 0.25, 0.125)


@torch.no_grad()
def follow_(state: Matrices, *, force: bool, bounds_update: Bounds, bounds_det: Bounds) -> Tensor:
    """Move each A (L, n, n) towards its weight by an update of rank k; the outcomes (L,).

    ``state.own`` has weight (L, n, n), and directions (L, n, k), which become those of the next step. Where the whole
    update is not sane a part of it is taken. Cost O(k n²).
    """
    P, Q = _best_directions(state)
    finite = P.isfinite().all(-1).all(-1) & Q.isfinite().all(-1).all(-1)
    P, Q = (torch.where(finite[:, None, None], M, 0) for M in (P, Q))
    W, C, Z = algebra.merge_products(state.A_inv, P, Q)
    identity = torch.eye(C.shape[-1], dtype=C.dtype, device=C.device)
    M = C - identity
    size, size_W = algebra.largest(P) * algebra.largest(Q), algebra.largest(W)

    part = torch.ones_like(state.logabsdet)
    for smaller in (*_PARTS, None):
        C = identity + part[:, None, None] * M
        K = algebra.solve_capacitance(C, Z)
        found = sanity(state, C, part * size, part * size_W * algebra.largest(K), bounds_update, bounds_det)
        sane = found.reason == 0
        accepted = finite & (found.storable if force else sane)
        if smaller is None or (accepted.is_cpu and (accepted | ~finite).all()):  # elsewhere, asking would mean waiting
            break
        part = torch.where(accepted, part, smaller)

    if not accepted.is_cpu or accepted.any():
        scale = part[:, None, None]
        update_(state, accepted, scale * P, Q, scale * W, K, found)
    directions = state.own["directions"]
    directions.copy_(torch.where(finite[:, None, None], Q, directions))
    state.store("directions")
    taken = torch.where(part < 1, int(MergeOutcome.PARTIAL), int(MergeOutcome.MERGED))
    taken = taken.where(sane, int(MergeOutcome.FORCED))
    return taken.where(accepted, found.reason).where(finite, int(MergeOutcome.SKIPPED_NOT_FINITE))


def _best_directions(state: Matrices) -> tuple[Tensor, Tensor]:
    """P (L, n, k) with orthonormal columns and Q = Eᵀ P (L, n, k), in float64."""
    W, Q = state.own["weight"], state.own["directions"]
    if state.rounded_A is None:
        E = W.double() - state.A
        P = torch.linalg.qr(E @ Q.double()).Q
        return P, E.mT @ P
    # For a wide layer, products in its own precision with the rounded A: the error that this makes remains in E.
    A = state.rounded_A
    P = torch.linalg.qr((W @ Q - A @ Q).double()).Q
    rounded = P.to(W.dtype)
    return P, ((rounded.mT @ W) - (rounded.mT @ A)).mT.double()

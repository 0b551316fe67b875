"""A tracked matrix that follows a dense weight by low-rank updates, with error feedback.

With E = W - A, a step of subspace iteration from the last directions Q gives ``P = orth(E Q)`` and ``Q ← Eᵀ P``, and
``P Qᵀ`` is nearly the best approximation of E of rank k. A moves by it; what does not fit remains in E and is made up
for later, as in PowerSGD (Vogels, Karimireddy, Jaggi 2019, arXiv:1905.13727).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from p4flows.checks import Bounds
from p4flows.outcomes import MergeOutcome
from p4flows.tracking import algebra
from p4flows.tracking.group import Matrices
from p4flows.tracking.jumping import jump_
from p4flows.tracking.merging import PARTS, room, sanity, update_

__all__ = ["follow_"]

# A follows by up to four updates at a time while ‖W - A‖ is more than this part of ‖A‖: 2 % for narrow ones, 10 % for
# wide ones, for which an update is a good part of the step. In between an inversion takes at most the time of a few
# updates, and leaves nothing; so it is made as soon as learning would suffer.
_ROUNDS, _NEAR, _NEAR_INVERTED, _NEAR_WIDE = 4, 0.02, 0.005, 0.1
_INVERTED = range(129, 513)

_BLOCK = 2**20  # entries of a matrix that are subtracted at a time

# A direction with less than this of the largest one is rounding.
_NEGLIGIBLE = 1e-10


@torch.no_grad()
def follow_(state: Matrices, *, force: bool, bounds_update: Bounds, bounds_det: Bounds) -> Tensor:
    """Move each A (L, n, n) towards its weight by updates of rank k; the outcomes (L,) of the first of them.

    ``state.own`` has weight (L, n, n), and directions (L, n, k), which become those of the next step. There is one
    update, O(k n²), and up to three more while a weight is far ahead; or up to n = 512 an inversion, O(n³), instead of
    these. Waits for the device.
    """
    options: dict[str, Any] = {"force": force, "bounds_update": bounds_update, "bounds_det": bounds_det}
    first, lag = _update(state, torch.ones_like(state.logabsdet, dtype=torch.bool), **options)
    n = state.A.shape[-1]
    inverted = n in _INVERTED
    near = _NEAR_INVERTED if inverted else _NEAR if n < _INVERTED.start else _NEAR_WIDE
    for _ in range(1, _ROUNDS):
        # Each by itself, so that no layer depends on those that it is followed together with.
        behind = (lag > near) & (first == MergeOutcome.MERGED)
        if not behind.any():
            break
        if inverted:  # where each layer is by itself
            jump_(state, **options)
            break
        _, lag_now = _update(state, behind, **options)
        lag = lag_now.where(behind, lag)
    state.store("directions")
    return first


def _update(
    state: Matrices, which: Tensor, force: bool, bounds_update: Bounds, bounds_det: Bounds
) -> tuple[Tensor, Tensor]:
    """One update of ``which`` (L,), or a part of it where the whole is not sane.

    Returns the outcomes, and ``‖W - A‖ / ‖A‖`` after it, (L,); they mean nothing for the others.
    """
    P, Q, norm_E, norm_A = _best_directions(state)
    size = torch.linalg.matrix_norm(Q)  # no entry of P Qᵀ is larger, as P has orthonormal columns
    finite = which & size.isfinite()
    if not finite.is_cpu or not finite.all():
        P, Q = (torch.where(finite[:, None, None], M, 0) for M in (P, Q))
    W, C, Z = algebra.merge_products(state.A_inv, P, Q)
    identity = torch.eye(C.shape[-1], dtype=C.dtype, device=C.device)
    M = C - identity
    size_W = algebra.largest(W)

    part = torch.ones_like(state.logabsdet)
    for smaller in (*PARTS, None):
        C = identity + part[:, None, None] * M
        C_inv = algebra.invert_capacitance(C)
        K = C_inv @ Z
        size_inv = part * size_W * algebra.largest(K)
        fits = room(state, C, part * size, size_inv, force)
        found = sanity(state, algebra.sign_and_logabsdet(C), C, C_inv, fits, bounds_update, bounds_det)
        sane = found.reason == 0
        accepted = finite & (found.storable if force else sane)
        if smaller is None or (accepted.is_cpu and (accepted | ~finite).all()):  # elsewhere, asking would mean waiting
            break
        part = torch.where(accepted, part, smaller)

    if not accepted.is_cpu or accepted.any():
        scale = part[:, None, None]
        update_(state, accepted, scale * P, Q, scale * W, K, found)
    # ‖E - t P Pᵀ E‖² = ‖E‖² - (2t - t²) ‖Pᵀ E‖² for the part t that was taken.
    part = torch.where(accepted, part, 0)
    lag = (norm_E.square() - (2 - part) * part * size.square()).clamp(min=0).sqrt() / norm_A
    directions = state.own["directions"]
    # Normalised, since half precision would lose what is small. Where E has fewer than k directions, others are
    # looked for from random ones: zeros would never find anything again.
    norm = torch.linalg.vector_norm(Q, dim=-2, keepdim=True)
    found_some = norm > _NEGLIGIBLE * norm.amax(-1, keepdim=True)
    Q = torch.where(found_some, Q / norm, _probes(*Q.shape[-2:], Q.device))
    directions.copy_(torch.where(finite[:, None, None], Q, directions))
    taken = torch.where(part < 1, int(MergeOutcome.PARTIAL), int(MergeOutcome.MERGED))
    taken = taken.where(sane, int(MergeOutcome.FORCED))
    return taken.where(accepted, found.reason).where(finite, int(MergeOutcome.SKIPPED_NOT_FINITE)), lag


def _best_directions(state: Matrices) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """P (L, n, k) with orthonormal columns, Q = Eᵀ P (L, n, k), ‖E‖ and ‖A‖ (L,), in float64."""
    W, Q = state.own["weight"], state.own["directions"]
    if state.rounded_A is None:
        E = W.double() - state.A
        P = torch.linalg.qr(E @ Q.double()).Q
        return P, E.mT @ P, torch.linalg.matrix_norm(E), torch.linalg.matrix_norm(state.A)
    # For a wide layer in its own precision, with the rounded A: the error that this makes remains in E.
    W, A = W[0], state.rounded_A[0]
    rows = max(1, _BLOCK // len(A)) if W.is_cpu else len(A)
    memory = torch.empty_like(A[:rows])
    EQ, norms = zip(*((E @ Q[0], torch.linalg.vector_norm(E)) for E in _difference(W, A, memory)), strict=True)
    P = torch.linalg.qr(torch.cat(EQ)[None].double()).Q
    QT = torch.zeros_like(Q[0].mT)
    for p, E in zip(P[0].to(W.dtype).split(rows), _difference(W, A, memory), strict=True):
        QT.addmm_(p.mT, E)
    norm_E, norm_A = torch.linalg.vector_norm(torch.stack(norms)), torch.linalg.vector_norm(A)
    return P, QT.mT[None].double(), norm_E[None].double(), norm_A[None].double()


def _difference(W: Tensor, A: Tensor, memory: Tensor) -> Iterator[Tensor]:
    """W - A by blocks of rows, one after the other in ``memory``: while it is in the cache, a product costs less than
    two would with W and with A."""
    for w, a in zip(W.split(len(memory)), A.split(len(memory)), strict=True):
        yield torch.sub(w, a, out=memory[: len(w)])


@lru_cache(maxsize=64)
def _probes(n: int, count: int, device: torch.device) -> Tensor:
    # Always the same ones, so that every process and every resumed run takes the same decision.
    generator = torch.Generator("cpu").manual_seed(n)
    return torch.randn(n, count, dtype=torch.float64, generator=generator, device="cpu").to(device)

"""Correction of tracked inverses: when one is needed, and the iterations or the inversion that mend it."""

from __future__ import annotations

import logging
from functools import lru_cache

import torch
from torch import Tensor

from p4flows.outcomes import Correction
from p4flows.tracking import algebra
from p4flows.tracking.group import Matrices
from p4flows.tracking.hyperpower import cheapest_order, hyperpower

__all__ = ["correct_", "drifted_"]

_log = logging.getLogger(__name__)

_PROBES = 4
# Frobenius norm of I - A A_inv beyond which A_inv is corrected: ε of the layers' dtype, well below what their rounding
# leaves. In float64 itself there is no such room, and ill-conditioned matrices are given 1000 times the rounding floor.
_TOLERANCE = {torch.float64: 1e-10}
# In units of ε: the change of ln|det A| by rounding A beyond which it is taken into account (3e-5 in float32), and the
# change δ of A, as |A⁻¹ δ|, beyond which its first order will not do and A_inv and ln|det A| are computed anew.
_ROUNDING_NOTICED, _ROUNDING_LARGE = 250, 5_000


@lru_cache(maxsize=16)
def _probes(n: int, device: torch.device) -> Tensor:
    # Always the same ones, so that every process and every resumed run takes the same decision.
    generator = torch.Generator("cpu").manual_seed(n)
    return torch.randn(_PROBES, n, dtype=torch.float64, generator=generator, device="cpu").to(device)


@torch.no_grad()
def drifted_(state: Matrices) -> Tensor:
    """Whether A_inv is in need of correction, by O(n²) estimates, (L,).

    On the way, ln|det A| is made that of the rounded A where the difference is worth it. To first order,
    ``ln|det(A + δ)| - ln|det A| = tr(A⁻¹ δ)``, n² terms of random sign, where δ are rounding errors of 0.2 ε A.
    """
    A, A_inv, rounding, dtype = state.A, state.A_inv, state.rounding, state.dtype
    n = A.shape[-1]
    residual, inverse_norm = algebra.residual_estimate(A, A_inv, _probes(n, A.device).expand(len(A), -1, -1))
    large = ~(residual <= _TOLERANCE.get(dtype, torch.finfo(dtype).eps))
    if large.any():
        large &= ~(residual <= 1000 * algebra.rounding_floor(A, A_inv))
    if dtype != torch.float64:
        # ε of the dtype: A is rounded to it, and the norm is that of the rounded matrix as well.
        relative = 0.2 * torch.linalg.matrix_norm(A) * inverse_norm / n**0.5
        large |= ~(relative < _ROUNDING_LARGE)
        noticed = relative / n**0.5 > _ROUNDING_NOTICED
        new = torch.zeros_like(rounding)
        if noticed.any():
            rows = slice(None) if noticed.all() else noticed
            new[rows] = (A_inv[rows].mT * (A[rows].to(dtype).double() - A[rows])).sum((-2, -1))
        if not rounding.is_cpu or noticed.any() or rounding.any():
            state.logabsdet.add_(new - rounding)
            rounding.copy_(new)
            state.store("logabsdet", "rounding")
    return large


@torch.no_grad()
def correct_(state: Matrices, which: Tensor | None = None, order: int | None = None) -> Tensor:
    """Correct each A_inv, or those ``which`` (L,), and recompute log|det| and sign by LU; what was done, (L,).

    Both become those of A as the layers have it, rounded.

    With an ``order`` by one hyperpower step of it, else by as few products as it takes to get down to rounding. Where
    the iteration cannot converge A is inverted. Waits for the device.
    """
    done = torch.zeros_like(state.logabsdet, dtype=torch.int64)
    if which is not None and not which.any():
        return done
    rows = slice(None) if which is None or which.all() else which
    state.A[rows] = state.A[rows].to(state.dtype).double()  # what counts is the matrix that the layers compute with
    A, A_inv = state.A[rows], state.A_inv[rows]
    target = algebra.rounding_floor(A, A_inv)
    inverted = torch.zeros_like(done[rows], dtype=torch.bool)
    for _ in range(5):
        R = algebra.residual(A, A_inv)
        size = torch.linalg.matrix_norm(R)
        converges = size < 1
        hopeless = ~converges & ~inverted
        if hopeless.any():
            inverted |= hopeless
            corrected = torch.where(hopeless[:, None, None], torch.linalg.inv_ex(A).inverse, A_inv)
        else:
            # A matrix next to a singular one stays as it was inverted: iterations would only blow the error up.
            step = order or cheapest_order(size.where(converges, 0).max().item(), target.min().item())
            corrected = torch.where(converges[:, None, None], hyperpower(A_inv, R, step), A_inv)
        kept = corrected.isfinite().all(-1).all(-1)
        A_inv = torch.where(kept[:, None, None], corrected, A_inv)
        if not hopeless.any() and (order is not None or (~converges | (size**step <= target)).all()):
            break
    state.A_inv[rows] = A_inv
    sign, logabsdet = torch.linalg.slogdet(A)
    kept = logabsdet.isfinite()
    state.sign[rows] = torch.where(kept, sign, state.sign[rows])
    state.logabsdet[rows] = torch.where(kept, logabsdet, state.logabsdet[rows])
    state.rounding[rows] = 0
    state.store("A", "A_inv", "sign", "logabsdet", "rounding")
    done[rows] = torch.where(inverted, int(Correction.INVERTED), int(Correction.ITERATED))
    if count := int(inverted.sum()):
        _log.warning("inverted %d of %d matrices anew, as their inverses were beyond correction", count, len(done))
    return done

"""Algorithm 2 on stacked tensors: merge, redraw and correct many P4Inv layers of one shape at a time.

Every function works in place on tensors with a leading dimension L of layers: A, A_inv (L, n, n), U, V (L, n, k),
sign_A, logabsdet_A, seed, merges (L,). Here A and A_inv are in float64, and ``rounded`` is what the layers compute
with, in their own dtype: rounding A anew at every merge would move it away from A_inv by rounding errors that add up
(at n = 512 in float32, to a residual 200 times that of the rounded inverse within 20 merges). Refining W and Vᵀ A⁻¹
against A at each merge is no way out: the formula of Sherman and Morrison moves A⁻¹ along with the error that it has,
while refined factors leave that error behind, to grow with every change of the condition. Merge decisions stay on the
device.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from p4flows import algebra
from p4flows._checks import Bounds
from p4flows._random import directions
from p4flows._stacked import Stacked
from p4flows.perturbation import Correction, MergeOutcome

if TYPE_CHECKING:
    from p4flows.tracked import TrackedInverse

__all__ = ["Group", "Matrices", "correct_", "drifted_", "fits", "largest", "merge_", "redraw_"]

_log = logging.getLogger(__name__)

# Up to this width layers are handled in one batched call, on memory that they share; beyond it each by itself.
_STACKED_WIDTH = 128

_PROBES = 4
# Frobenius norm of I - A A_inv beyond which A_inv is corrected: ε of the layers' dtype, well below what their rounding
# leaves. In float64 itself there is no such room, and ill-conditioned matrices are given 1000 times the rounding floor.
_TOLERANCE = {torch.float64: 1e-10}
# In units of ε: the change of ln|det A| by rounding A beyond which it is taken into account (3e-5 in float32), and the
# change δ of A, as |A⁻¹ δ|, beyond which its first order will not do and A_inv and ln|det A| are computed anew.
_ROUNDING_NOTICED, _ROUNDING_LARGE = 250, 80_000


class Matrices(NamedTuple):
    """The tensors of L layers under a leading dimension: A, A_inv in float64, ``rounded`` as the layers have them."""

    A: Tensor
    A_inv: Tensor
    sign_A: Tensor
    logabsdet_A: Tensor
    U: Tensor
    V: Tensor
    seed: Tensor
    merges: Tensor
    rounding: Tensor
    rounded: tuple[Tensor, Tensor] | None

    def round_(self) -> None:
        """Bring what the layers compute with up to date."""
        if self.rounded is not None:
            self.rounded[0].copy_(self.A)
            self.rounded[1].copy_(self.A_inv)


_BUFFERS = ("A", "A_inv", "A_double", "A_inv_double", "sign_A", "logabsdet_A", "rounding", "seed", "merges")
_PARAMETERS = ("U", "V")
_SAVED = ("A", "A_inv", "logabsdet_A", "U", "V")  # by autograd, which must notice changes


class Group(list):
    """Layers of one shape, whose tensors are kept side by side in memory if they are narrow."""

    def __init__(self, layers: Iterable[TrackedInverse]) -> None:
        super().__init__(layers)
        # A module keeps these dicts for life; looking its attributes up takes much longer.
        buffers, parameters = ([layer.__dict__[kind] for layer in self] for kind in ("_buffers", "_parameters"))
        self._holders = dict.fromkeys(_BUFFERS, buffers) | dict.fromkeys(_PARAMETERS, parameters)
        self._stacks = {name: Stacked() for name in self._holders}

    def states(self) -> Iterator[Matrices]:
        """The layers' tensors under one leading dimension, in order: all at once if narrow, else one by one.

        In-place changes reach the layers at once.
        """
        tensors = {name: [holder[name] for holder in holders] for name, holders in self._holders.items()}
        if tensors["A_double"][0] is None:  # the layers are in float64 themselves
            del tensors["A_double"], tensors["A_inv_double"]
        batch = self[0].merges.ndim
        if len(self) == 1 or batch or self[0].features > _STACKED_WIDTH:
            for i in range(len(self)):
                yield _matrices({k: each[i].detach().view(-1, *each[i].shape[batch:]) for k, each in tensors.items()})
        else:
            torch.autograd.graph.increment_version([t for name in _SAVED for t in tensors[name]])
            yield _matrices({name: self._stacks[name].of(each) for name, each in tensors.items()})


def _matrices(tensors: dict[str, Tensor]) -> Matrices:
    rounded = None
    if "A_double" in tensors:
        rounded = tensors["A"], tensors["A_inv"]
        tensors["A"], tensors["A_inv"] = tensors.pop("A_double"), tensors.pop("A_inv_double")
    return Matrices(**tensors, rounded=rounded)


@torch.no_grad()
def merge_(state: Matrices, *, force: bool, bounds_update: Bounds, bounds_det: Bounds) -> Tensor:
    """Merge each perturbation by Algorithm 2, or skip or reset it; the outcomes (L,), see :meth:`P4Inv.merge`."""
    A, A_inv, sign_A, logabsdet_A, U, V, seed, merges, *_ = state
    size_U, size_V = largest(U), largest(V)
    finite = size_U.isfinite() & size_V.isfinite()
    U_new, V_new = (torch.where(finite[:, None, None], M, 0).double() for M in (U, V))
    W, C, Z = algebra.merge_products(A_inv, U_new, V_new)
    sign_G, log_G = algebra.sign_and_logabsdet(C)
    K = algebra.solve_capacitance(C, Z)

    # Bounds on the entries of both updates, |U Vᵀ| <= k max|U| max|V|, so that nothing infinite is stored.
    k = U.shape[-1]
    storable = log_G.isfinite()
    for matrix, update in ((A, size_U * size_V), (A_inv, largest(W) * largest(K))):
        storable &= fits(matrix, k * update, torch.finfo(U.dtype).max / 4)
    sane = storable & _within(log_G, bounds_update) & _within(log_G + logabsdet_A, bounds_det)
    accepted = finite & (storable if force else sane)

    if not accepted.is_cpu or accepted.any():  # elsewhere, asking would mean waiting
        keep = accepted[:, None, None]
        algebra.low_rank_update_(A, torch.where(keep, U_new, 0), V_new.mT)
        algebra.low_rank_update_(A_inv, torch.where(keep, -W, 0), torch.where(keep, K, 0))
        state.round_()
        sign_A.mul_(torch.where(accepted, sign_G, 1))
        logabsdet_A.add_(torch.where(accepted, log_G, 0))
    redraw_(U, V, seed, merges, accepted | ~finite)
    return (
        torch.where(sane, int(MergeOutcome.MERGED), int(MergeOutcome.FORCED))
        .where(accepted, int(MergeOutcome.SKIPPED))
        .where(finite, int(MergeOutcome.RESET))
    )


@torch.no_grad()
def redraw_(U: Tensor, V: Tensor, seed: Tensor, merges: Tensor, which: Tensor) -> None:
    """Start a new perturbation, U = 0 and the next V of its seed, where ``which`` (L,)."""
    merges.add_(which)
    drawn = directions(seed, merges, *V.shape[1:]).to(V.dtype)
    V.copy_(torch.where(which[:, None, None], drawn, V))
    U.masked_fill_(which[:, None, None], 0)


@lru_cache(maxsize=16)
def _probes(n: int, device: torch.device) -> Tensor:
    # Always the same ones, so that every process and every resumed run takes the same decision.
    return torch.randn(_PROBES, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)).to(device)


@torch.no_grad()
def drifted_(state: Matrices) -> Tensor:
    """Whether A_inv is in need of correction, by O(n²) estimates, (L,).

    On the way, ln|det A| is made that of the rounded A where the difference is worth it. To first order,
    ``ln|det(A + δ)| - ln|det A| = tr(A⁻¹ δ)``, n² terms of random sign, where δ are rounding errors of 0.2 ε A.
    """
    A, A_inv, *_, rounding, rounded = state
    n, dtype = A.shape[-1], state.U.dtype
    residual, inverse_norm = algebra.residual_estimate(A, A_inv, _probes(n, A.device).expand(len(A), -1, -1))
    large = ~(residual <= _TOLERANCE.get(dtype, torch.finfo(dtype).eps))
    if large.any():
        large &= ~(residual <= 1000 * algebra.rounding_floor(A, A_inv))
    if rounded is not None:
        relative = 0.2 * torch.linalg.matrix_norm(rounded[0]).double() * inverse_norm / n**0.5
        large |= ~(relative < _ROUNDING_LARGE)
        noticed = relative / n**0.5 > _ROUNDING_NOTICED
        new = torch.zeros_like(rounding)
        if noticed.any():
            rows = slice(None) if noticed.all() else noticed
            new[rows] = (A_inv[rows].mT * (rounded[0][rows].double() - A[rows])).sum((-2, -1))
        state.logabsdet_A.add_(new - rounding)
        rounding.copy_(new)
    return large


@torch.no_grad()
def correct_(state: Matrices, which: Tensor | None = None, order: int | None = None) -> Tensor:
    """Correct each A_inv, or those ``which`` (L,), and recompute log|det| and sign by LU; what was done, (L,).

    Both become those of A as the layers have it, rounded.

    With an ``order`` by one hyperpower step of it, else by as few products as it takes to get down to rounding. Where
    the iteration cannot converge A is inverted. Waits for the device.
    """
    done = torch.zeros_like(state.merges)
    if which is not None and not which.any():
        return done
    rows = slice(None) if which is None or which.all() else which
    if state.rounded is not None:  # what counts is the matrix that the layers compute with
        state.A[rows] = state.rounded[0][rows].double()
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
            step = order or algebra.cheapest_order(size.where(converges, 0).max().item(), target.min().item())
            corrected = torch.where(converges[:, None, None], algebra.hyperpower(A_inv, R, step), A_inv)
        kept = corrected.isfinite().all(-1).all(-1)
        A_inv = torch.where(kept[:, None, None], corrected, A_inv)
        if not hopeless.any() and (order is not None or (~converges | (size**step <= target)).all()):
            break
    state.A_inv[rows] = A_inv
    state.round_()
    sign, logabsdet = torch.linalg.slogdet(A)
    kept = logabsdet.isfinite()
    state.sign_A[rows] = torch.where(kept, sign, state.sign_A[rows])
    state.logabsdet_A[rows] = torch.where(kept, logabsdet, state.logabsdet_A[rows])
    state.rounding[rows] = 0
    done[rows] = torch.where(inverted, int(Correction.INVERTED), int(Correction.ITERATED))
    if count := int(inverted.sum()):
        _log.warning("inverted %d of %d matrices anew, as their inverses were beyond correction", count, len(done))
    return done


def largest(M: Tensor) -> Tensor:
    """max|M| over the last two dimensions, in float64."""
    return M.abs().amax((-2, -1)).double()


def fits(M: Tensor, update: Tensor, limit: float) -> Tensor:
    """Whether M plus an update with entries of at most ``update`` (L,) stays within the limit."""
    small = update < limit
    if M.is_cpu and (update < limit * 2.0**-20).all():
        return small  # it would take a million such merges, and reading M is a good part of the cost of one
    return small & (torch.linalg.vector_norm(M, torch.inf, (-2, -1)) + update < limit)


def _within(value: Tensor, bounds: Bounds) -> Tensor:
    low, high = bounds
    inside = torch.ones_like(value, dtype=torch.bool)
    if low is not None:
        inside &= value >= low
    if high is not None:
        inside &= value <= high
    return inside

"""Algorithm 2 on stacked tensors: merge, redraw and correct many P4Inv layers of one shape at a time.

Every function works in place on tensors with a leading dimension L of layers: A, A_inv (L, n, n), U, V (L, n, k),
sign_A, logabsdet_A, seed, merges (L,). Decisions stay on the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from p4flows import algebra
from p4flows._checks import Bounds
from p4flows._random import normal
from p4flows._stacked import Stacked
from p4flows.perturbation import MergeOutcome

if TYPE_CHECKING:
    from p4flows.tracked import TrackedInverse

__all__ = ["Group", "correct_", "merge_", "redraw_"]

# Up to this width layers are handled in one batched call, on memory that they share; beyond it each by itself.
_STACKED_WIDTH = 128

_BUFFERS = ("A", "A_inv", "sign_A", "logabsdet_A", "seed", "merges")
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

    def states(self) -> Iterator[dict[str, Tensor]]:
        """The layers' tensors under one leading dimension, in order: all at once if narrow, else one by one.

        In-place changes reach the layers at once.
        """
        tensors = {name: [holder[name] for holder in holders] for name, holders in self._holders.items()}
        batch = self[0].merges.ndim
        if len(self) == 1 or batch or self[0].features > _STACKED_WIDTH:
            for i in range(len(self)):
                yield {name: each[i].detach().view(-1, *each[i].shape[batch:]) for name, each in tensors.items()}
        else:
            torch.autograd.graph.increment_version([t for name in _SAVED for t in tensors[name]])
            yield {name: self._stacks[name].of(each) for name, each in tensors.items()}


@torch.no_grad()
def merge_(
    A: Tensor,
    A_inv: Tensor,
    sign_A: Tensor,
    logabsdet_A: Tensor,
    U: Tensor,
    V: Tensor,
    seed: Tensor,
    merges: Tensor,
    *,
    force: bool,
    bounds_update: Bounds,
    bounds_det: Bounds,
) -> Tensor:
    """Merge each perturbation by Algorithm 2, or skip or reset it; the outcomes (L,), see :meth:`P4Inv.merge`."""
    largest = _largest(U), _largest(V)
    finite = largest[0].isfinite() & largest[1].isfinite()
    U_new, V_new = (torch.where(finite[:, None, None], M, 0) for M in (U, V))
    W, C, Z = algebra.merge_products(A_inv, U_new, V_new)
    sign_G, log_G = algebra.sign_and_logabsdet(C)
    K = algebra.solve_capacitance(C, Z)

    # A bound on the entries of both updates, so that nothing infinite is stored: |U Vᵀ| <= k max|U| max|V|.
    limit = torch.finfo(A.dtype).max / 4 / U.shape[-1]
    small = (largest[0] * largest[1] < limit) & (_largest(W) * _largest(K) < limit)
    storable = log_G.isfinite() & small
    sane = storable & _within(log_G, bounds_update) & _within(log_G + logabsdet_A, bounds_det)
    accepted = finite & (storable if force else sane)

    keep = accepted[:, None, None]
    algebra.low_rank_update_(A, torch.where(keep, U_new, 0), V_new.mT)
    algebra.low_rank_update_(A_inv, torch.where(keep, -W, 0), torch.where(keep, K, 0))
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
    drawn = normal(seed, merges, tuple(V.shape[1:])).to(V.dtype)
    V.copy_(torch.where(which[:, None, None], drawn, V))
    U.masked_fill_(which[:, None, None], 0)


@torch.no_grad()
def correct_(A: Tensor, A_inv: Tensor, sign_A: Tensor, logabsdet_A: Tensor, order: int) -> None:
    """One hyperpower step for each A_inv, or an inversion where that cannot converge; log|det| and sign by LU."""
    R = algebra.residual(A, A_inv)
    hopeless = ~(torch.linalg.matrix_norm(R) < 1)
    corrected = algebra.hyperpower(A_inv, R, order)
    exact = A.double()
    if hopeless.any():
        corrected[hopeless] = torch.linalg.inv_ex(exact[hopeless]).inverse.to(A.dtype)
    stored = corrected.isfinite().all(-1).all(-1)
    A_inv.copy_(torch.where(stored[:, None, None], corrected, A_inv))
    sign, logabsdet = torch.linalg.slogdet(exact)
    stored = logabsdet.isfinite()
    sign_A.copy_(torch.where(stored, sign, sign_A))
    logabsdet_A.copy_(torch.where(stored, logabsdet, logabsdet_A))


def _largest(M: Tensor) -> Tensor:
    return M.abs().amax((-2, -1)).double()


def _within(value: Tensor, bounds: Bounds) -> Tensor:
    low, high = bounds
    inside = torch.ones_like(value, dtype=torch.bool)
    if low is not None:
        inside &= value >= low
    if high is not None:
        inside &= value <= high
    return inside

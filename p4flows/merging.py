"""Algorithm 2 on stacked tensors: merge, redraw and correct many P4Inv layers of one shape at a time.

Every function works in place on tensors with a leading dimension L of layers: A, A_inv (L, n, n), U, V (L, n, k),
sign_A, logabsdet_A, seed, merges (L,). Decisions stay on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from p4flows import algebra
from p4flows._checks import Bounds
from p4flows._random import normal
from p4flows.perturbation import MergeOutcome

if TYPE_CHECKING:
    from p4flows.invertible import P4Inv

__all__ = ["correct_", "merge_", "redraw_", "shared_state"]

# Up to this width layers are stacked and handled in one batched call; beyond it each is handled in place, where a
# copy of the matrix would cost more than the calls that it saves.
_STACKED_WIDTH = 128

_STATE = ("A", "A_inv", "sign_A", "logabsdet_A", "U", "V", "seed", "merges")


def shared_state(layers: Sequence[P4Inv]) -> Iterator[dict[str, Tensor]]:
    """The layers' tensors under a leading dimension, in order: once for all narrow layers, one by one for wide ones.

    What the loop body changes in place has reached the layers when the iterator goes on. A single layer is
    viewed, not copied.
    """
    if len(layers) == 1 or layers[0].features > _STACKED_WIDTH:
        for layer in layers:
            yield {name: getattr(layer, name).detach().unsqueeze(0) for name in _STATE}
        return
    columns = {name: [getattr(layer, name).detach() for layer in layers] for name in _STATE}
    state = {name: torch.stack(column) for name, column in columns.items()}
    yield state
    for name, column in columns.items():
        torch._foreach_copy_(column, state[name].unbind())


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
    finite = (U.isfinite() & V.isfinite()).all(-1).all(-1)
    U_new, V_new = (torch.where(finite[:, None, None], M, 0) for M in (U, V))
    W, C = algebra.capacitance(A_inv, U_new, V_new)
    sign_G, log_G = algebra.sign_and_logabsdet(C)
    K = algebra.solve_capacitance(C, V_new.mT @ A_inv)

    # A bound on the entries of both updates, so that nothing infinite is stored: |U Vᵀ| <= k max|U| max|V|.
    size = torch.stack([_largest(U_new) * _largest(V_new), _largest(W) * _largest(K)])
    storable = log_G.isfinite() & (size * U.shape[-1] < torch.finfo(A.dtype).max / 4).all(0)
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
    merges.add_(which)
    drawn = normal(seed, merges, tuple(V.shape[1:])).to(V.dtype)
    V.copy_(torch.where(which[:, None, None], drawn, V))
    U.masked_fill_(which[:, None, None], 0)


@torch.no_grad()
def correct_(A: Tensor, A_inv: Tensor, sign_A: Tensor, logabsdet_A: Tensor, order: int) -> None:
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
    return M.double().abs().amax((-2, -1))


def _within(value: Tensor, bounds: Bounds) -> Tensor:
    low, high = bounds
    inside = torch.ones_like(value, dtype=torch.bool)
    if low is not None:
        inside &= value >= low
    if high is not None:
        inside &= value <= high
    return inside

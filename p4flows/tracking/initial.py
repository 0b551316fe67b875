"""The matrix that a layer starts from: its entries, inverse, sign and log|det|."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from p4flows.tracking.algebra import SINGULAR
from p4flows.tracking.noise import normal

__all__ = ["InitialMatrix", "initial_matrix"]


class InitialMatrix(NamedTuple):
    """``A`` (n, n) as the layer's dtype can hold it, its inverse, sign and log|det|; all four in float64."""

    A: Tensor
    A_inv: Tensor
    sign: Tensor
    logabsdet: Tensor


def initial_matrix(init: str | Tensor, n: int, seed: Tensor, dtype: torch.dtype) -> InitialMatrix:
    """Resolve the ``init`` argument of :class:`p4flows.P4Inv`.

    Raises ValueError for an unknown name, a vector that is no permutation of 0 ... n-1, and a matrix that is not
    square, not finite, of another size, or singular.
    """
    if isinstance(init, str):
        if init == "identity":
            return _permutation(torch.arange(n))
        if init == "reverse":
            return _permutation(torch.arange(n - 1, -1, -1))
        if init == "orthogonal":
            # Counter -1 is never reached by merges, so this noise is not the noise of any V.
            Q, R = torch.linalg.qr(normal(seed, torch.full_like(seed, -1), (n, n)))
            return _invert(Q * R.diagonal().sign(), dtype)
        raise ValueError(f'init: expected "identity", "reverse", "orthogonal", a permutation or a matrix, got {init!r}')
    try:
        init = torch.as_tensor(init).detach().cpu()
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"init: expected a name, a permutation or a matrix, got {init!r}: {error}") from None
    if init.is_complex() or init.dtype == torch.bool:
        raise ValueError(f"init: expected an integer permutation or a real matrix, got dtype {init.dtype}")
    if init.ndim == 1 and not init.is_floating_point():
        if init.shape[0] != n or not torch.equal(init.sort().values, torch.arange(n, dtype=init.dtype)):
            raise ValueError(f"init: expected a permutation of 0 ... {n - 1}, got {tuple(init.tolist())}")
        return _permutation(init.long())
    if init.shape != (n, n):
        raise ValueError(f"init: expected a permutation of {n} or a ({n}, {n}) matrix, got shape {tuple(init.shape)}")
    if not init.isfinite().all():
        raise ValueError("init: expected a finite matrix, got NaN or infinity")
    return _invert(init, dtype)


def _permutation(p: Tensor) -> InitialMatrix:
    A = torch.eye(len(p), dtype=torch.float64)[p]
    odd, seen = 0, [False] * len(p)
    targets = p.tolist()
    for start in range(len(targets)):
        i, length = start, 0
        while not seen[i]:
            seen[i], i, length = True, targets[i], length + 1
        odd += max(length - 1, 0)
    sign = torch.tensor((-1.0) ** odd, dtype=torch.float64)
    # The transpose of a matrix of one entry shares its memory even where it is made contiguous.
    return InitialMatrix(A, _row_by_row(A.T), sign, torch.zeros((), dtype=torch.float64))


def _invert(M: Tensor, dtype: torch.dtype) -> InitialMatrix:
    A = M.to(dtype).double()
    sign, logabsdet = torch.linalg.slogdet(A)
    A_inv, info = torch.linalg.inv_ex(A)
    storable = A_inv.to(dtype).isfinite().all() and A.isfinite().all()
    if info.item() != 0 or sign == 0 or not (logabsdet.isfinite() and storable):
        raise ValueError("init: expected an invertible matrix, got a singular one")
    if (A @ A_inv - torch.eye(len(A), dtype=torch.float64)).abs().max() > SINGULAR:
        raise ValueError("init: expected an invertible matrix, got one that is numerically singular")
    return InitialMatrix(_row_by_row(A), _row_by_row(A_inv), sign, logabsdet)


def _row_by_row(M: Tensor) -> Tensor:
    """A copy whose memory is that of a plain matrix, as LAPACK's results and transposes are not."""
    return M.clone(memory_format=torch.contiguous_format)

"""Upper bounds of the spectral norm that are proved, rounding included, and close to the norm.

Power iteration gives a lower bound only, however long it runs. A Cholesky factorisation of ``t² I - MᵀM`` proves the
opposite: it ends if the matrix is positive definite, that is, if ‖M‖₂ < t; and in floating-point numbers it ends only
if the matrix is within the errors of rounding of one that is (Higham, Accuracy and Stability of Numerical Algorithms,
Theorem 10.3; Rump 2006, doi:10.1007/s10543-006-0056-1). So the lower bound says where to look, and the factorisation
proves the number that was found.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["certified_norm", "clipped"]

_ITERATIONS = 30
_STEPS = [1e-3 * 4.0**i for i in range(8)]  # how far above the lower bound to look
_EPS = torch.finfo(torch.float64).eps


@torch.no_grad()
def certified_norm(M: Tensor, x: Tensor, wanted: float = math.inf) -> float:
    """A number t with ``‖M‖₂ ≤ t``, for a finite M (m, n) in any precision. O(m n min(m, n)); waits for the device.

    It is 0.1 % above the norm, or ``wanted`` if that can be proved and is less, as soon as power iteration is within
    as much of the norm. x (n) is where power iteration starts, and is changed to where it ends: from one call to the
    next it finds the norm of a matrix that changes slowly.
    """
    M, exponent = _scaled(M.double())
    wanted *= 2.0**-exponent  # infinite rather than an error where it is too large to matter
    wide = M.shape[0] < M.shape[1]
    z = _normalised(M @ x.double() if wide else x.double())
    M = M.mT if wide else M
    G = M.mT @ M
    for _ in range(_ITERATIONS):
        z = _normalised(G @ z)
    x.copy_(_normalised(M @ z) if wide else z)
    low, total = torch.stack([z @ (G @ z), G.diagonal().sum()]).tolist()
    low = max(low, total / len(G))  # the mean of the eigenvalues is not above the largest
    trials = [low * (1 + step) ** 2 for step in _STEPS]
    if low <= wanted * wanted:
        trials.append(wanted * wanted)
    for square in sorted(trials):
        if square >= total:
            break
        # Errors of the products, of Cholesky's method, and twice that to be safe.
        slack = _EPS * ((len(M) + 2) * total + (len(G) + 3) * len(G) * square)
        rest = -G
        rest.diagonal().add_(square - slack)
        if int(torch.linalg.cholesky_ex(rest).info) == 0:
            return math.ldexp(wanted if square == wanted * wanted else math.sqrt(square), exponent)
    return math.ldexp(math.sqrt(total) * (1 + (len(M) + len(G)) * _EPS), exponent)  # the Frobenius norm


@torch.no_grad()
def clipped(M: Tensor, bound: float) -> Tensor:
    """M (m, n) with the bound in place of all singular values above it: the nearest matrix of spectral norm ``bound``.

    In float64, up to rounding, by the eigenvectors of the smaller Gram matrix. O(m n min(m, n)).
    """
    if M.shape[0] < M.shape[1]:
        return clipped(M.mT, bound).mT
    M, exponent = _scaled(M.double())
    bound *= 2.0**-exponent
    values, vectors = torch.linalg.eigh(M.mT @ M)
    shrinkage = (1 - bound / values.clamp(min=0).sqrt().clamp(min=bound)).clamp(min=0)
    return (M - (M @ vectors * shrinkage) @ vectors.mT) * 2.0**exponent


def _scaled(M: Tensor) -> tuple[Tensor, int]:
    """M over a power of two, so that its squares neither over- nor underflow, and the exponent."""
    exponent = max(math.frexp(float(M.abs().max()))[1], -1000)
    return M * 2.0**-exponent, exponent


def _normalised(x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x).clamp(min=torch.finfo(x.dtype).tiny)

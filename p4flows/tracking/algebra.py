"""Low-rank algebra of P4Inv: pure functions of tensors, batched over leading dimensions.

A frozen invertible matrix ``A`` (..., n, n) with a known inverse ``A_inv`` is perturbed to ``A + U Vᵀ`` with
``U, V`` (..., n, k). With ``W = A⁻¹ U`` and the k × k *capacitance* ``C = I + Vᵀ W``::

    det(A + U Vᵀ) = det(C) det(A)                        (matrix determinant lemma, equation 2)
    (A + U Vᵀ)⁻¹  = A⁻¹ - W C⁻¹ Vᵀ A⁻¹                   (Sherman-Morrison-Woodbury, equation 1)

Equation numbers are those of Krämer, Köhler, Noé, "Training Invertible Linear Layers through Rank-One
Perturbations" (arXiv:2010.07033). Batches of vectors are rows, ``x`` (..., n); nothing here forms an n × n
temporary except :func:`invert` and :func:`residual`, which cost O(n³).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "SINGULAR",
    "capacitance",
    "fits",
    "invert",
    "invert_capacitance",
    "largest",
    "log_spectral_norm",
    "low_rank_update_",
    "matrix_vector",
    "merge_products",
    "perturbed_inverse_product",
    "perturbed_product",
    "residual",
    "residual_estimate",
    "rounding_floor",
    "sign_and_logabsdet",
    "solve_capacitance",
    "vector_matrix",
]


_BLOCK = 128

SINGULAR = 1e-3
"""The entry of ``A A⁻¹ - I`` beyond which a matrix is singular, as far as float64 can tell."""


def matrix_vector(M: Tensor, u: Tensor) -> Tensor:
    """``M u`` for M (m, n) and u (n), or of a few vectors as rows u (p, n). Cost one pass over M."""
    parts = _parts(M)
    if parts == 1:
        return torch.mv(M, u) if u.ndim == 1 else u @ M.t()
    rows = u.view(-1, u.shape[-1]).expand(parts, -1, -1)
    return torch.bmm(rows, M.unflatten(0, (parts, -1)).mT).movedim(0, 1).reshape(*u.shape[:-1], -1)


def vector_matrix(v: Tensor, M: Tensor) -> Tensor:
    """``Mᵀ v`` for M (m, n) and v (m). Cost one pass over M."""
    parts = _parts(M)
    if parts == 1:
        return torch.mv(M.t(), v)
    return torch.bmm(v.reshape(parts, 1, -1), M.unflatten(0, (parts, -1))).sum((0, 1))


def _parts(M: Tensor) -> int:
    # On a CPU a matrix-vector product runs on one core; a batch of them, one for each block of rows, on all.
    return math.gcd(len(M), 16) if M.is_cpu and len(M) >= 1024 else 1


def capacitance(A_inv: Tensor, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """``W = A⁻¹ U`` (..., n, k) and the capacitance ``C = I + Vᵀ W`` (..., k, k). Cost O(k n²)."""
    W = A_inv @ U
    return W, _capacitance(V, W)


def merge_products(A_inv: Tensor, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """W and C as :func:`capacitance` has them, and ``Vᵀ A⁻¹``, for A_inv (b, n, n) and U, V (b, n, k)."""
    if len(U) == U.shape[-1] == 1:
        W = matrix_vector(A_inv[0], U[0, :, 0]).view(1, -1, 1)
        Z = vector_matrix(V[0, :, 0], A_inv[0]).view(1, 1, -1)
    elif len(U) == 1 and A_inv.is_cpu and A_inv.shape[-1] >= 2048:
        # A block of rows comes into the cache once for both products.
        Z, parts = torch.zeros_like(V.mT), []
        for block, v in zip(A_inv[0].split(2 * _BLOCK), V[0].split(2 * _BLOCK), strict=True):
            parts.append(U[0].mT @ block.mT)
            Z[0].addmm_(v.mT, block)
        W = torch.cat(parts, -1).mT[None]
    else:
        # A product of a few rows with a large matrix is faster than one of the matrix with a few columns.
        W, Z = (U.mT @ A_inv.mT).mT, V.mT @ A_inv
    return W, _capacitance(V, W), Z


def _capacitance(V: Tensor, W: Tensor) -> Tensor:
    if V.shape[-1] == 1:
        return 1 + (V * W).sum(-2, keepdim=True)
    return torch.eye(V.shape[-1], dtype=W.dtype, device=W.device) + V.mT @ W


def sign_and_logabsdet(C: Tensor) -> tuple[Tensor, Tensor]:
    """Sign and ln|det C| (...) of the capacitance, in float64. A singular C has sign 0 and -inf."""
    C = C.double()
    if C.shape[-1] == 1:
        G = C[..., 0, 0]
        return G.sign(), G.abs().log()
    return torch.linalg.slogdet(C)


def solve_capacitance(C: Tensor, X: Tensor) -> Tensor:
    """``C⁻¹ X`` for X (..., k, m); where C is singular the result is not finite, and nothing is raised."""
    if C.shape[-1] == 1:
        return X / C
    wide = torch.promote_types(C.dtype, torch.float32)  # LAPACK has no half precision
    return torch.linalg.solve_ex(C.to(wide), X.to(wide)).result.to(X.dtype)


def invert(M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """M⁻¹, the sign of det M and ln|det M| for M (..., n, n), by one factorisation; not finite where M is singular."""
    LU, pivots, _ = torch.linalg.lu_factor_ex(M)
    diagonal = LU.diagonal(dim1=-2, dim2=-1)
    exchanges = (pivots != torch.arange(1, M.shape[-1] + 1, device=M.device)).sum(-1)
    sign = diagonal.sign().prod(-1) * (1 - 2 * (exchanges % 2))
    identity = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device).expand_as(M)
    return torch.linalg.lu_solve(LU, pivots, identity), sign, diagonal.abs().log_().sum(-1)


def invert_capacitance(C: Tensor) -> Tensor:
    """``C⁻¹`` (..., k, k); where C is singular the result is not finite, and nothing is raised."""
    return solve_capacitance(C, torch.eye(C.shape[-1], dtype=C.dtype, device=C.device).expand_as(C))


def perturbed_product(A: Tensor, U: Tensor, V: Tensor, x: Tensor) -> Tensor:
    """``(A + U Vᵀ) x`` for rows x (..., n), as ``A x + U (Vᵀ x)``. Cost O(n²) a row."""
    return x @ A.mT + (x @ V) @ U.mT


def perturbed_inverse_product(A_inv: Tensor, V: Tensor, W: Tensor, C: Tensor, y: Tensor) -> Tensor:
    """``(A + U Vᵀ)⁻¹ y`` for rows y (..., n), as ``z - W C⁻¹ Vᵀ z`` with ``z = A⁻¹ y``. Cost O(n²) a row."""
    z = y @ A_inv.mT
    t = z @ V
    t = (
        t / (C[0] if C.ndim == 2 else C)
        if C.shape[-1] == 1
        else t @ solve_capacitance(C, torch.eye(C.shape[-1]).to(C)).mT
    )
    return z - t @ W.mT


def low_rank_update_(M: Tensor, L: Tensor, R: Tensor, rounded: Tensor | None = None) -> Tensor:
    """``M += L R`` in place, for M (b, n, m), L (b, n, k), R (b, k, m), without a temporary of M's size.

    With ``rounded`` (n, m), of lower precision, the one M (b = 1) is copied to it on the way.
    """
    if rounded is not None:
        # On a CPU a block of rows is still in the cache when it is rounded.
        rows = _BLOCK if M.is_cpu else len(rounded)
        for m, l, target in zip(M[0].split(rows), L[0].split(rows), rounded.split(rows), strict=True):
            target.copy_(low_rank_update_(m[None], l[None], R)[0])
        return M
    if L.shape[-1] > 1:
        return M.baddbmm_(L, R) if len(M) > 1 else M[0].addmm_(L[0], R[0])[None]
    return M.addcmul_(L, R) if len(M) > 1 else M[0].addr_(L[0, :, 0], R[0, 0])[None]


def log_spectral_norm(M: Tensor) -> Tensor:
    """ln of the largest singular value of M (..., k, k), too large by at most ln(k) / 256; NaN if M is not finite.

    ``‖(MᵀM)^p‖`` in the Frobenius norm, to the power 1/(2p), for p = 64: a few small products, which can be batched and
    do not wait for the device, where a singular value decomposition takes a hundred times longer.
    """
    S, log_norm, doublings = M, M.new_zeros(()), 7
    for i in range(doublings + 1):
        S = S.mT @ S if i else S
        size = torch.linalg.vector_norm(S, torch.inf if i < doublings else 2, (-2, -1), keepdim=True)
        S, log_norm = S / size, 2 * log_norm + size.log()
    return log_norm[..., 0, 0] / 2**doublings


def residual(A: Tensor, A_inv: Tensor) -> Tensor:
    """``I - A A_inv``, the residual of an approximate inverse. Cost O(n³)."""
    R = (A @ A_inv).neg_()
    R.diagonal(dim1=-2, dim2=-1).add_(1)
    return R


def residual_estimate(A: Tensor, A_inv: Tensor, X: Tensor) -> tuple[Tensor, Tensor]:
    """Frobenius norms of ``I - A A_inv`` and of ``A_inv``, estimated from probes X (b, p, n) as rows; (b). O(p n²).

    ``E |R x|² = |R|²`` for x ~ N(0, I). With p = 4 the estimate is too small by a factor of ten in one of 5,000 cases
    for an R of rank one, where it varies most.
    """
    if len(A) == 1:
        Y = matrix_vector(A_inv[0], X[0])[None]
        R = X - matrix_vector(A[0], Y[0])
    else:
        Y = X @ A_inv.mT
        R = X - Y @ A.mT
    scale = X.shape[-2] ** -0.5
    return torch.linalg.matrix_norm(R) * scale, torch.linalg.matrix_norm(Y) * scale


def rounding_floor(A: Tensor, A_inv: Tensor) -> Tensor:
    r"""Frobenius norm of the residual that rounding the entries of an exact inverse leaves, (...). Cost O(n²).

    ``A δ`` for independent relative errors of the entries of A⁻¹, which for uniformly distributed mantissas are 0.2 ε
    (root mean square): :math:`0.2 ε (\sum_i |A e_i|^2 |e_i^T A^{-1}|^2)^{1/2}`.
    """
    columns, rows = torch.linalg.vector_norm(A, dim=-2), torch.linalg.vector_norm(A_inv, dim=-1)
    return 0.2 * torch.finfo(A.dtype).eps * torch.linalg.vector_norm(columns * rows, dim=-1)


def largest(M: Tensor) -> Tensor:
    """max|M| over the last two dimensions, in float64."""
    return torch.linalg.vector_norm(M, torch.inf, (-2, -1)).double()


def fits(M: Tensor, update: Tensor, limit: float) -> Tensor:
    """Whether M plus an update with entries of at most ``update`` (L,) stays within the limit."""
    small = update < limit
    if M.is_cpu and (update < limit * 2.0**-20).all():
        return small  # it would take a million such merges, and reading M is a good part of the cost of one
    return small & (torch.linalg.vector_norm(M, torch.inf, (-2, -1)) + update < limit)

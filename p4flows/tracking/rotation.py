"""Rotations of low rank: the Cayley transform of ``K = (U Vᵀ - V Uᵀ) / 2``.

The transform ``R = (I - K/2)⁻¹ (I + K/2)`` of a skew-symmetric K is orthogonal with determinant 1, whatever U and V
(n, k). Written as ``K = P Qᵀ`` with P, Q (n, 2k), it takes a capacitance of 2k × 2k only:

    R = I + P C⁻¹ Qᵀ,    C = I - Qᵀ P / 2

With U = 0 it is the identity, and there its derivative is K. For k = 1 it is a rotation in the plane of u and v, that
is, two Householder reflections: of v and of v + |v|² u / 4, if u is at a right angle to v.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from p4flows.tracking.algebra import invert_capacitance

__all__ = ["ORTHOGONAL", "defect", "factors", "in_basis", "nearest_orthogonal", "newton_schulz", "rotate", "rotate_"]

ORTHOGONAL = 1e-9
"""What an entry of AᵀA - I may be in float64."""


def factors(U: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """P, Q (n, 2k) and C⁻¹ (2k, 2k) of the rotation by U, V (n, k). O(n k² + k³), differentiable."""
    # Of equal size the columns of U and V give a C that is best conditioned; K is the same whatever the scale.
    with torch.no_grad():
        size_U, size_V = (torch.linalg.vector_norm(M, dim=-2, keepdim=True) for M in (U, V))
        ratio = size_U / size_V.clamp(min=torch.finfo(V.dtype).tiny)
        scale = ratio.clamp(_SMALLEST, 1 / _SMALLEST).sqrt()
    X, Y = V * scale, U / scale
    P, Q = torch.cat([Y, -X], -1) / 2, torch.cat([X, Y], -1)
    C = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device) - Q.mT @ P / 2
    return P, Q, invert_capacitance(C)


_SMALLEST = 1e-4  # and its inverse, which half precision can hold


def rotate(x: Tensor, P: Tensor, Q: Tensor, C_inv: Tensor, inverse: bool = False) -> Tensor:
    """``R x`` for rows x (..., n), or ``Rᵀ x``. O(n k) a row."""
    if inverse:
        return x + x @ P @ C_inv @ Q.mT
    return x + x @ Q @ C_inv.mT @ P.mT


def in_basis(U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """W (..., n, r) with orthonormal columns and Z (..., r, r) so that ``R = I + W Z Wᵀ``, r = min(n, 2k). O(n k²).

    For merges: R is orthogonal to the accuracy of the dtype, unless U is so large that I - K/2 cannot be inverted with
    half of its digits.
    """
    k = U.shape[-1]
    W, T = torch.linalg.qr(torch.cat([V, U], -1))
    TV, TU = T[..., :k], T[..., k:]
    K = (TU @ TV.mT - TV @ TU.mT) / 2
    identity = torch.eye(K.shape[-1], dtype=K.dtype, device=K.device)
    rotation = torch.linalg.solve_ex(identity - K / 2, identity + K / 2).result
    return W, newton_schulz(rotation) - identity


def newton_schulz(A: Tensor) -> Tensor:
    """``A (3 I - Aᵀ A) / 2`` (..., n, n), which squares the distance of A from the orthogonal matrices. O(n³)."""
    return 1.5 * A - 0.5 * A @ (A.mT @ A)


def nearest_orthogonal(M: Tensor) -> Tensor:
    """The orthogonal matrix nearest to M (n, n) in the Frobenius norm: its polar factor, by singular values. O(n³)."""
    U, _, Vh = torch.linalg.svd(M)
    return U @ Vh


def rotate_(A: Sequence[Tensor], U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate each of L float64 matrices A (n, n) in place by its U, V (L, n, k), ``A ← R A``. O(k n²).

    Returns two bool tensors (L): where it was done, and where U and V are finite. It is not done where they are not, or
    where U is so large that R would not be orthogonal to 1e-9.
    """
    finite = torch.stack([M.isfinite().all(-1).all(-1) for M in (U, V)]).all(0)
    W, Z = in_basis(*(torch.where(finite[:, None, None], M, 0).double() for M in (U, V)))
    error = (Z + Z.mT + Z.mT @ Z).abs().amax((-2, -1))  # of RᵀR - I
    done = finite & (error < ORTHOGONAL)
    W, Z = (torch.where(done[:, None, None], M, 0) for M in (W, Z))
    for a, w, z in zip(A, W, Z, strict=True):
        a.addmm_(w, z @ (w.mT @ a))
    return done, finite


def defect(A: Tensor) -> Tensor:
    """``max|AᵀA - I|`` (...) of A (..., n, n) in float64. O(n³)."""
    G = A.mT.double() @ A.double()
    G.diagonal(dim1=-2, dim2=-1).sub_(1)
    return G.abs().amax((-2, -1))

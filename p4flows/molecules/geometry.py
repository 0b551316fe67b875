"""Bonds, angles and dihedrals of Cartesian coordinates, and back. Plain torch, differentiable, float32-safe."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "angle",
    "dihedral",
    "distance",
    "is_superposed",
    "log_swept_volume",
    "place",
    "superpose",
    "triangle",
]


def distance(a: Tensor, b: Tensor) -> Tensor:
    """|a - b| for points (..., 3)."""
    return torch.linalg.vector_norm(a - b, dim=-1)


def angle(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The angle a-b-c in [0, π], from atan2, accurate where acos is not (near 0 and π)."""
    u, v = a - b, c - b
    return torch.atan2(torch.linalg.vector_norm(torch.linalg.cross(u, v), dim=-1), (u * v).sum(-1))


def dihedral(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """The dihedral a-b-c-d in (-π, π], positive by the right-hand rule about b to c (IUPAC)."""
    u, v, w = b - a, c - b, d - c
    n1, n2 = torch.linalg.cross(u, v), torch.linalg.cross(v, w)
    y = (u * n2).sum(-1) * torch.linalg.vector_norm(v, dim=-1)
    return torch.atan2(y, (n1 * n2).sum(-1))


def place(b: Tensor, c: Tensor, d: Tensor, bond: Tensor, theta: Tensor, phi: Tensor) -> Tensor:
    """The point a with ``|a - b| = bond``, ``angle(a, b, c) = theta`` and ``dihedral(a, b, c, d) = phi``.

    The volume element is ``bond² sin(theta)``.
    """
    axis = torch.nn.functional.normalize(b - c, dim=-1)
    normal = torch.nn.functional.normalize(torch.linalg.cross(c - d, axis), dim=-1)
    inward = torch.linalg.cross(normal, axis)
    bond, theta, phi = bond[..., None], theta[..., None], phi[..., None]
    radial = torch.sin(theta) * (torch.cos(phi) * inward + torch.sin(phi) * normal)
    return b + bond * (radial - torch.cos(theta) * axis)


def superpose(x: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Centre and rotate x (..., m, 3) onto the centred reference (m, 3), by least squares (Kabsch 1976).

    Returns the superposed points and the rotations (..., 3, 3), proper ones, to be applied as ``(x - mean) @ R``.
    """
    centred = x - x.mean(-2, keepdim=True)
    left, _, right = torch.linalg.svd(centred.mT @ reference)
    handedness = torch.linalg.det(left @ right).sign()
    R = torch.cat([left[..., :2], left[..., 2:] * handedness[..., None, None]], -1) @ right
    return centred @ R, R


def is_superposed(x: Tensor, reference: Tensor) -> Tensor:
    """Whether :func:`superpose` would leave points x (..., m, 3) as they are, for x in the Eckart frame; (...).

    Points that satisfy the Eckart conditions, Σ x = 0 and Σ reference × x = 0, make the matrix H = Σ x referenceᵀ
    symmetric. The rotation of least squares is then the identity where tr(H) 1 - H is positive definite. Elsewhere,
    far from the reference, it is a finite rotation, and other points in the Eckart frame have the same shape.
    """
    H = x.mT @ reference
    H = (H + H.mT) / 2
    trace = H.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    M = trace * torch.eye(3, dtype=x.dtype, device=x.device) - H
    # Sylvester's criterion; NaN compares false.
    minor = M[..., 0, 0] * M[..., 1, 1] - M[..., 0, 1] * M[..., 1, 0]
    return (M[..., 0, 0] > 0) & (minor > 0) & (torch.linalg.det(M) > 0)


def log_swept_volume(block: Tensor, complement: Tensor) -> Tensor:
    """ln of the volume that m points (..., m, 3) sweep under translations and rotations; (...).

    ``complement`` (3m, 3) are orthonormal directions that vibrations and translations do not span. Columns e × r for
    the three axes e tell how the points move under rotations; translations contribute √m each.
    """
    axes = torch.eye(3, dtype=block.dtype, device=block.device)[:, None]
    levers = block.unsqueeze(-3).expand(*block.shape[:-2], 3, *block.shape[-2:])
    swept = torch.linalg.cross(axes.expand_as(levers), levers).flatten(-2)
    return torch.linalg.det(swept @ complement).abs().log() + 1.5 * math.log(block.shape[-2])


def triangle(first: Tensor, second: Tensor, theta: Tensor) -> Tensor:
    """Points a, b, c (..., 3, 3), centred, with ``|a - b| = first``, ``|b - c| = second``, ``angle(a, b, c) = theta``.

    The volume element is ``first² second² sin(theta)``, with rotations measured by their axis vector at the identity.
    """
    zero = torch.zeros_like(theta)
    a = torch.stack([first, zero, zero], -1)
    c = torch.stack([second * theta.cos(), second * theta.sin(), zero], -1)
    points = torch.stack([a, torch.zeros_like(a), c], -2)
    return points - points.mean(-2, keepdim=True)

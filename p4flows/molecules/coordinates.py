"""Mixed coordinates of a molecule: internal coordinates around a rigid block in whitened Cartesian ones."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from p4flows.molecules import geometry

__all__ = ["MixedCoordinates"]


class MixedCoordinates(nn.Module):
    r"""Mixed coordinates (Noé, Olsson, Köhler, Wu 2019): what a Boltzmann generator of a molecule sees.

    The m atoms of a rigid block are described by 3m - 6 whitened Cartesian coordinates, after superposition on a
    reference; every other atom by a bond length, an angle and a dihedral with respect to three atoms that are placed
    before it. All are standardised by mean and standard deviation over ``data``; a dihedral is cut where the data
    leave the widest gap, so that no mode is split. 3 n_atoms - 6 coordinates in all (60 for alanine dipeptide):
    overall translation and rotation are left out.

    The log-determinant is that of the full map between ``(z, translation, rotation)`` and Cartesian coordinates,
    with the rotation measured by its axis vector ω at the identity, in nm and radians: for every placed atom
    :math:`\ln r^2 \sin\theta`, and for the rigid block the volume that its points sweep under rotations. So
    ``exp(-u(x) + logabsdet)`` is, up to normalisation, the exact Boltzmann density in z.

    Args:
        z_matrix: (n_atoms - m, 4) integers, rows (atom, bond, angle, dihedral) in any order.
        rigid_block: (m,) integers, m >= 3 atoms.
        data: positions (B, n_atoms, 3) or (B, 3 n_atoms) in nm to take reference, scales and cuts from.

    Shapes: ``forward(x)`` takes (..., n_atoms, 3) or (..., 3 n_atoms) and returns z (..., 3 n_atoms - 6), log|dz/dx|
    (...); ``inverse(z)`` returns x (..., 3 n_atoms), centred and oriented on the block, and log|dx/dz| (...). z is
    ordered: block, bonds, angles, dihedrals, the latter three by the rows of ``z_matrix``.

    Raises:
        ValueError: if z-matrix and block do not name every atom once, the z-matrix is circular, or data and
            atoms do not fit.
    """

    def __init__(self, z_matrix: np.ndarray | Tensor, rigid_block: np.ndarray | Tensor, data: Tensor) -> None:
        super().__init__()
        z_matrix, rigid_block = _integers("z_matrix", z_matrix), _integers("rigid_block", rigid_block)
        if z_matrix.ndim != 2 or z_matrix.shape[1] != 4:
            raise ValueError(f"z_matrix: expected shape (rows, 4), got {tuple(z_matrix.shape)}")
        if rigid_block.ndim != 1 or len(rigid_block) < 3:
            raise ValueError(f"rigid_block: expected at least 3 atoms, got {rigid_block.tolist()}")
        named = torch.cat([rigid_block, z_matrix[:, 0]])
        self.n_atoms = len(named)
        if not torch.equal(named.sort().values, torch.arange(self.n_atoms)):
            raise ValueError(f"z_matrix and rigid_block: expected each atom 0 ... {self.n_atoms - 1} once")
        self._levels = _levels(z_matrix, rigid_block)
        self.register_buffer("z_matrix", z_matrix)
        self.register_buffer("rigid_block", rigid_block)

        x = self._points(data, "data").reshape(-1, self.n_atoms, 3).double()
        if len(x) < 3 * self.n_atoms:
            raise ValueError(f"data: expected at least {3 * self.n_atoms} frames to take scales from, got {len(x)}")
        reference, basis, complement = _fit_block(x[:, rigid_block])
        self.register_buffer("reference", reference)
        self.register_buffer("basis", basis)
        self.register_buffer("complement", complement)
        bonds, angles, dihedrals = self._internal(x)
        cut = _widest_gap(dihedrals)
        raw = torch.cat([bonds, angles, _wrap(dihedrals, cut)], -1)
        for name, value in (("cut", cut), ("mean", raw.mean(0)), ("std", raw.std(0))):
            self.register_buffer(name, value)
        if not (raw.std(0).min() > 0 and torch.linalg.svdvals(basis).min() > 0):
            raise ValueError("data: expected every coordinate to vary over the frames")
        self.to(data.dtype)

    @property
    def n_coordinates(self) -> int:
        """3 n_atoms - 6."""
        return 3 * self.n_atoms - 6

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Positions to coordinates z, and log|dz/dx|."""
        x = self._points(x)
        block, _ = geometry.superpose(x[..., self.rigid_block, :], self.reference)
        q = (block - self.reference).flatten(-2) @ torch.linalg.pinv(self.basis).mT
        bonds, angles, dihedrals = self._internal(x)
        z = (torch.cat([bonds, angles, _wrap(dihedrals, self.cut)], -1) - self.mean) / self.std
        return torch.cat([q, z], -1), -self._logabsdet(block, bonds, angles)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates z to positions, and log|dx/dz|."""
        if not isinstance(z, Tensor) or not z.is_floating_point() or z.shape[-1:] != (self.n_coordinates,):
            raise ValueError(f"z: expected floating-point (..., {self.n_coordinates}), got {_describe(z)}")
        q, z = z.split([self.basis.shape[1], len(self.mean)], -1)
        block = self.reference + (q @ self.basis.mT).unflatten(-1, (-1, 3))
        bonds, angles, dihedrals = (z * self.std + self.mean).chunk(3, -1)
        x = block.new_zeros(*block.shape[:-2], self.n_atoms, 3)
        x = x.index_copy(-2, self.rigid_block, block)
        for rows in self._levels:
            atoms, *around = self.z_matrix[rows].T
            points = geometry.place(
                *(x[..., a, :] for a in around), *(c[..., rows] for c in (bonds, angles, dihedrals))
            )
            x = x.index_copy(-2, atoms, points)
        return x.flatten(-2), self._logabsdet(block, bonds, angles)

    def _internal(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, b, c, d = (x[..., atoms, :] for atoms in self.z_matrix.T)
        return geometry.distance(a, b), geometry.angle(a, b, c), geometry.dihedral(a, b, c, d)

    def _logabsdet(self, block: Tensor, bonds: Tensor, angles: Tensor) -> Tensor:
        """log|dx/dz|."""
        constant = self.std.log().sum() + torch.linalg.svdvals(self.basis).log().sum()
        placed = (2 * bonds.abs().log() + angles.sin().abs().log()).sum(-1)
        # Columns e × r for the three axes e: how the block moves under rotation, in the directions that vibrations
        # (basis) and translations (√m each) do not span.
        axes = torch.eye(3, dtype=block.dtype, device=block.device)[:, None]
        levers = block.unsqueeze(-3).expand(*block.shape[:-2], 3, *block.shape[-2:])
        swept = torch.linalg.cross(axes.expand_as(levers), levers).flatten(-2)
        rotation = torch.linalg.det(swept @ self.complement).abs().log()
        return constant + placed + rotation + 1.5 * math.log(len(self.rigid_block))

    def _points(self, x: Tensor, name: str = "positions") -> Tensor:
        n = self.n_atoms
        if isinstance(x, Tensor) and x.is_floating_point():
            if x.shape[-2:] == (n, 3):
                return x
            if x.shape[-1:] == (3 * n,):
                return x.unflatten(-1, (n, 3))
        raise ValueError(f"{name}: expected floating-point (..., {n}, 3) or (..., {3 * n}), got {_describe(x)}")


def _fit_block(block: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean structure (m, 3); whitened vibrations (3m, 3m - 6); orthonormal directions of rotation (3m, 3)."""
    reference = block[0] - block[0].mean(0)
    for _ in range(10):
        reference = geometry.superpose(block, reference)[0].mean(0)
    m = len(reference)
    axes = torch.eye(3, dtype=block.dtype)
    rotations = torch.linalg.cross(axes[:, None].expand(3, m, 3), reference.expand(3, m, 3)).flatten(1).T
    translations = axes.repeat(m, 1)
    # Superposed points satisfy the Eckart conditions Σ r = 0 and Σ ref × r = 0, so that they vary in the
    # 3m - 6 directions orthogonal to translations and rotations of the reference, and in no other.
    Q, _ = torch.linalg.qr(torch.cat([translations, rotations], 1), mode="complete")
    complement, vibrations = Q[:, 3:6], Q[:, 6:]
    amplitudes = (geometry.superpose(block, reference)[0] - reference).flatten(1) @ vibrations
    _, spread, directions = torch.linalg.svd(amplitudes, full_matrices=False)
    return reference, vibrations @ directions.mT * (spread / math.sqrt(len(block) - 1)), complement


def _levels(z_matrix: Tensor, rigid_block: Tensor) -> list[list[int]]:
    """Rows of the z-matrix in groups that can be placed at once."""
    rows = z_matrix.tolist()
    placed, left, levels = set(rigid_block.tolist()), set(range(len(rows))), []
    while left:
        level = sorted(i for i in left if placed.issuperset(rows[i][1:]))
        if not level or any(len(set(rows[i])) < 4 for i in level):
            raise ValueError(
                f"z_matrix: rows {[rows[i] for i in sorted(left)]} cannot be placed from the atoms before them"
            )
        levels.append(level)
        left -= set(level)
        placed |= {rows[i][0] for i in level}
    return levels


def _widest_gap(dihedrals: Tensor) -> Tensor:
    """For each column, the middle of the widest stretch of the circle with the fewest data."""
    bins = 60
    cuts = []
    for column in dihedrals.T:
        counts = torch.histc(column, bins, -math.pi, math.pi)
        # A window of a tenth of the circle, so that one empty bin within a mode does not win.
        window = counts.repeat(3).unfold(0, 7, 1).sum(-1)[bins - 3 : 2 * bins - 3]
        best = (window == window.min()).nonzero().flatten()
        runs = torch.tensor_split(best, (best.diff() > 1).nonzero().flatten() + 1)
        longest = max(runs, key=len)
        cuts.append(-math.pi + (longest.double().mean() + 0.5) * 2 * math.pi / bins)
    return torch.stack(cuts)


def _wrap(phi: Tensor, cut: Tensor) -> Tensor:
    """phi + 2π k in [cut, cut + 2π)."""
    return cut + torch.remainder(phi - cut, 2 * math.pi)


def _integers(name: str, value: np.ndarray | Tensor) -> Tensor:
    try:
        array = np.asarray(value)
        if array.dtype.kind not in "iu":
            raise TypeError
        return torch.from_numpy(array.astype(np.int64))
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name}: expected integers, got {value!r}") from None


def _describe(x: object) -> str:
    return f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__

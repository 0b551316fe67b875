"""Mixed coordinates of a molecule: internal coordinates around a rigid block in whitened Cartesian ones."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from p4flows.molecules import geometry
from p4flows.molecules.spread import check_spread, fit_block
from p4flows.molecules.spread import widest_gap as _widest_gap
from p4flows.molecules.spread import wrap as _wrap
from p4flows.molecules.units import positions_tensor
from p4flows.molecules.z_matrix import check_atoms, integers, levels

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

    Every structure has exactly one z, the one that ``forward`` returns, but ``inverse`` takes any z. The two are
    inverse to each other only over the range of the coordinates: bond lengths above zero, angles in (0, π), dihedrals
    in [cut, cut + 2π), and a block whose best superposition on the reference is the one that it is in. A flow puts
    some of its samples beyond, where ``inverse`` still returns a valid structure and the log-determinant at the given
    z, but the structure's own z is another one, and so is its density. :meth:`in_range` says which samples these are,
    and :func:`p4flows.molecules.importance_weights` leaves them out.

    Args:
        z_matrix: (n_atoms - m, 4) integers, rows (atom, bond, angle, dihedral) in any order.
        rigid_block: (m,) integers, m >= 3 atoms.
        data: positions (B, n_atoms, 3) or (B, 3 n_atoms) in nm, float32 or float64, to take reference, scales and
            cuts from: a tensor, an array such as :func:`simulate` returns, or OpenMM's own positions with units. The
            coordinates get its type and device; ``.to(...)`` and ``.double()`` change them.

    Shapes: ``forward(x)`` takes (..., n_atoms, 3) or (..., 3 n_atoms) and returns z (..., 3 n_atoms - 6), log|dz/dx|
    (...); ``inverse(z)`` returns x (..., 3 n_atoms), centred and oriented on the block, and log|dx/dz| (...). z is
    ordered: block, bonds, angles, dihedrals, the latter three by the rows of ``z_matrix``.

    Raises:
        ValueError: if z-matrix and block do not name every atom once, the z-matrix is circular, data and atoms do
            not fit, or a coordinate does not vary over the data, as a constrained bond does not. Later on, for
            positions and z of another shape or type.
    """

    z_matrix: Tensor
    rigid_block: Tensor
    reference: Tensor
    basis: Tensor
    complement: Tensor
    cut: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, z_matrix: np.ndarray | Tensor, rigid_block: np.ndarray | Tensor, data: Tensor) -> None:
        super().__init__()
        z_matrix, rigid_block = integers("z_matrix", z_matrix), integers("rigid_block", rigid_block)
        data = positions_tensor("data", data)
        self.n_atoms = check_atoms(z_matrix, rigid_block, _count_atoms(data))
        self._levels = levels(z_matrix, rigid_block)
        self.register_buffer("z_matrix", z_matrix)
        self.register_buffer("rigid_block", rigid_block)

        x = self._points(data, "data").reshape(-1, self.n_atoms, 3).detach().cpu().double()
        if data.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"data: expected float32 or float64, got {data.dtype}")
        if len(x) < 3 * self.n_atoms:
            raise ValueError(f"data: expected at least {3 * self.n_atoms} frames to take scales from, got {len(x)}")
        if not x.isfinite().all():
            raise ValueError(f"data: expected finite positions, got {int((~x.isfinite()).sum())} that are not")
        reference, basis, complement = fit_block(x[:, rigid_block])
        self.register_buffer("reference", reference)
        self.register_buffer("basis", basis)
        self.register_buffer("complement", complement)
        bonds, angles, dihedrals = self._internal(x)
        cut = _widest_gap(dihedrals)
        raw = torch.cat([bonds, angles, _wrap(dihedrals, cut)], -1)
        check_spread(x, z_matrix, rigid_block, raw, basis)
        for name, value in (("cut", cut), ("mean", raw.mean(0)), ("std", raw.std(0))):
            self.register_buffer(name, value)
        self.to(data.device, data.dtype)

    @property
    def n_coordinates(self) -> int:
        """3 n_atoms - 6."""
        return 3 * self.n_atoms - 6

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Positions to coordinates z, and log|dz/dx|."""
        x = self._check_type(self._points(positions_tensor("positions", x)), "positions")
        block, _ = geometry.superpose(x[..., self.rigid_block, :], self.reference)
        q = (block - self.reference).flatten(-2) @ torch.linalg.pinv(self.basis).mT
        bonds, angles, dihedrals = self._internal(x)
        z = (torch.cat([bonds, angles, _wrap(dihedrals, self.cut)], -1) - self.mean) / self.std
        return torch.cat([q, z], -1), -self._logabsdet(block, bonds, angles)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates z to positions, and log|dx/dz|, whether or not z is :meth:`in_range`."""
        block, bonds, angles, dihedrals = self._split(z)
        x = block.new_zeros(*block.shape[:-2], self.n_atoms, 3)
        x = x.index_copy(-2, self.rigid_block, block)
        for rows in self._levels:
            atoms, *around = self.z_matrix[rows].T
            points = geometry.place(
                *(x[..., a, :] for a in around), *(c[..., rows] for c in (bonds, angles, dihedrals))
            )
            x = x.index_copy(-2, atoms, points)
        return x.flatten(-2), self._logabsdet(block, bonds, angles)

    def in_range(self, z: Tensor) -> Tensor:
        """Whether z (..., 3 n_atoms - 6) is what ``forward(inverse(z)[0])`` returns, up to rounding; bool (...).

        Where it is false (also for z that are NaN or infinite), the density of the structure ``inverse(z)[0]`` is not
        the one that a flow has at this z.
        """
        block, bonds, angles, dihedrals = self._split(z)
        inside = (bonds > 0) & (angles > 0) & (angles < math.pi)
        inside &= (dihedrals >= self.cut) & (dihedrals < self.cut + 2 * math.pi)
        return inside.all(-1) & geometry.is_superposed(block, self.reference)

    def _split(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The points of the block, bonds, angles and dihedrals in nm and radians."""
        if not isinstance(z, Tensor) or not z.is_floating_point() or z.shape[-1:] != (self.n_coordinates,):
            raise ValueError(f"z: expected floating-point (..., {self.n_coordinates}), got {_describe(z)}")
        q, z = self._check_type(z, "z").split([self.basis.shape[1], len(self.mean)], -1)
        block = self.reference + (q @ self.basis.mT).unflatten(-1, (-1, 3))
        return block, *(z * self.std + self.mean).chunk(3, -1)

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

    def _check_type(self, x: Tensor, name: str) -> Tensor:
        ours = self.mean
        if x.dtype != ours.dtype or x.device != ours.device:
            raise ValueError(
                f"{name}: expected {ours.dtype} on {ours.device}, the type of these coordinates, got {x.dtype} on "
                f"{x.device}; convert either of them by .to(...)"
            )
        return x


def _count_atoms(data: object) -> int | None:
    """The number of atoms that the shape of data says, or None."""
    if not isinstance(data, Tensor) or data.ndim < 2:
        return None
    if data.ndim > 2 and data.shape[-1] == 3:
        return data.shape[-2]
    return data.shape[-1] // 3 if data.shape[-1] % 3 == 0 else None


def _describe(x: object) -> str:
    return f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor | np.ndarray) else type(x).__name__

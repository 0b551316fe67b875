"""Mixed coordinates of a molecule: internal coordinates around a rigid block in whitened Cartesian ones."""

from __future__ import annotations

import math
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor, nn

from p4flows.checks import describe
from p4flows.molecules import geometry
from p4flows.molecules.constraints import Constraints, fixed_bonds
from p4flows.molecules.molecule import Molecule
from p4flows.molecules.spread import check_spread, deviation, fit_block
from p4flows.molecules.spread import widest_gap as _widest_gap
from p4flows.molecules.spread import wrap as _wrap
from p4flows.molecules.torsions import Torsions
from p4flows.molecules.units import positions_tensor
from p4flows.molecules.z_matrix import bond_and_angle_atoms, check_atoms, integers, levels

__all__ = ["MixedCoordinates"]


class MixedCoordinates(nn.Module):
    r"""Mixed coordinates (Noé, Olsson, Köhler, Wu 2019): what a Boltzmann generator of a molecule sees.

    The m atoms of a rigid block are described by 3m - 6 whitened Cartesian coordinates, after superposition on a
    reference; every other atom by a bond length, an angle and a dihedral with respect to three atoms that are placed
    before it. All are standardised by mean and standard deviation over ``data``; a dihedral is cut where the data
    leave the widest gap, so that no mode is split. 3 n_atoms - 6 coordinates in all (60 for alanine dipeptide):
    overall translation and rotation are left out.

    ``MixedCoordinates(molecule, data)`` takes z-matrix and block from a :class:`Molecule`, and heeds the constraints
    of its system: a constrained bond is a constant, and is left out of z. A block of three atoms of which a bond is
    constrained is described by its two bonds and its angle instead of Cartesian coordinates. Data in which a
    stereocentre has the other handedness than the molecule are refused.

    The log-determinant is that of the full map between ``(z, translation, rotation)`` and Cartesian coordinates,
    with the rotation measured by its axis vector ω at the identity, in nm and radians: for every placed atom
    :math:`\ln r^2 \sin\theta`, and for the rigid block the volume that its points sweep under rotations. So
    ``exp(-u(x) + logabsdet)`` is, up to normalisation, the exact Boltzmann density in z. With constraints it is the
    density that constrained dynamics samples; see :class:`p4flows.molecules.constraints.Constraints`.

    Every structure has exactly one z, the one that ``forward`` returns, but ``inverse`` takes any z. The two are
    inverse to each other only over the range of the coordinates: bond lengths above zero, angles in (0, π), dihedrals
    in [cut, cut + 2π), and a block whose best superposition on the reference is the one that it is in. A flow puts
    some of its samples beyond, where ``inverse`` still returns a valid structure and the log-determinant at the given
    z, but the structure's own z is another one, and so is its density. :meth:`in_range` says which samples these are,
    and :func:`p4flows.molecules.importance_weights` leaves them out.

    Args:
        molecule: a :class:`Molecule`; or, in its place,
        z_matrix: (n_atoms - m, 4) integers, rows (atom, bond, angle, dihedral) in any order, and
        rigid_block: (m,) integers, m >= 3 atoms.
        data: positions (B, n_atoms, 3) or (B, 3 n_atoms) in nm, float32 or float64, to take reference, scales and
            cuts from: a tensor, an array such as :func:`simulate` returns, an ``mdtraj.Trajectory``, or OpenMM's own
            positions with units. The coordinates get its type and device; ``.to(...)`` and ``.double()`` change them.

    Shapes: ``forward(x)`` takes (..., n_atoms, 3) or (..., 3 n_atoms) and returns z (..., n_coordinates), log|dz/dx|
    (...); ``inverse(z)`` returns x (..., 3 n_atoms), centred and oriented on the block, and log|dx/dz| (...). z is
    ordered: block, bonds, angles, dihedrals, the latter three by the rows of ``z_matrix``, without constrained bonds.
    The bonds and the angle of a block with constraints follow those of the rows. :attr:`torsions` says which
    coordinates are periodic, and over which range.

    Raises:
        ValueError: if z-matrix and block do not name every atom once, the z-matrix is circular, data and atoms do
            not fit, constrained bonds are not coordinates, or a coordinate does not vary over the data, as a
            constrained bond does not. Later on, for positions and z of another shape or type.
    """

    z_matrix: Tensor
    rigid_block: Tensor
    reference: Tensor
    basis: Tensor
    complement: Tensor
    cut: Tensor
    mean: Tensor
    std: Tensor
    free_bonds: Tensor
    _bonds: Tensor
    _angles: Tensor
    _lengths: Tensor

    @overload
    def __init__(self, molecule: Molecule, data: Tensor | np.ndarray, /) -> None: ...
    @overload
    def __init__(self, z_matrix: np.ndarray | Tensor, rigid_block: np.ndarray | Tensor, data: Tensor) -> None: ...

    def __init__(self, z_matrix: Any, rigid_block: Any = None, data: Any = None) -> None:
        super().__init__()
        molecule = z_matrix if isinstance(z_matrix, Molecule) else None
        if molecule is not None:
            if rigid_block is not None and data is not None:
                raise ValueError("rigid_block: expected none beside a Molecule, which has its own")
            data = rigid_block if data is None else data
            z_matrix, rigid_block = molecule.z_matrix, molecule.rigid_block
        z_matrix, rigid_block = integers("z_matrix", z_matrix), integers("rigid_block", rigid_block)
        data = positions_tensor("data", data)
        self.n_atoms = check_atoms(z_matrix, rigid_block, _count_atoms(data))
        self._levels = levels(z_matrix, rigid_block)
        self.register_buffer("z_matrix", z_matrix)
        self.register_buffer("rigid_block", rigid_block)
        self._heed_constraints(molecule)
        x = self._frames(data, molecule)
        reference, basis, complement = fit_block(x[:, rigid_block])
        if self._triangle:
            basis = basis[:, :0]
        for name, value in (("reference", reference), ("basis", basis), ("complement", complement)):
            self.register_buffer(name, value)
        bonds, angles, dihedrals = self._internal(x)
        cut = _widest_gap(dihedrals)
        raw = torch.cat([bonds[:, self.free_bonds], angles, _wrap(dihedrals, cut)], -1)
        check_spread(x, rigid_block, self._bonds[self.free_bonds], self._angles, z_matrix, raw, basis)
        for name, value in (("cut", cut), ("mean", raw.mean(0)), ("std", deviation(raw))):
            self.register_buffer(name, value)
        self.to(data.device, data.dtype)

    def _heed_constraints(self, molecule: Molecule | None) -> None:
        """Which distances are coordinates, and which of them are constant."""
        pairs = np.empty((0, 2), dtype=np.int64) if molecule is None else molecule.constraints[0]
        block = set(self.rigid_block.tolist())
        self._triangle = any(block.issuperset(pair) for pair in pairs.tolist())
        triangle = self.rigid_block if self._triangle else None
        for name, atoms in zip(("_bonds", "_angles"), bond_and_angle_atoms(self.z_matrix, triangle), strict=True):
            self.register_buffer(name, atoms, persistent=False)
        fixed = fixed_bonds(self._bonds.tolist(), pairs)
        free = sorted(set(range(len(self._bonds))) - set(fixed))
        self.register_buffer("free_bonds", torch.tensor(free, dtype=torch.int64), persistent=False)
        self.constraints: Constraints | None = None
        if fixed and molecule is not None:
            self.constraints = Constraints(pairs, molecule.constraints[1], molecule.masses)
            lengths = torch.zeros(len(self._bonds), dtype=torch.float64)
            lengths[fixed] = self.constraints.lengths
            self.register_buffer("_lengths", lengths, persistent=False)

    def _frames(self, data: Tensor, molecule: Molecule | None) -> Tensor:
        """The data as float64 (B, n_atoms, 3) on the CPU, checked."""
        x = self._points(data, "data").reshape(-1, self.n_atoms, 3).detach().cpu().double()
        if data.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"data: expected float32 or float64, got {data.dtype}")
        if len(x) < 3 * self.n_atoms:
            raise ValueError(f"data: expected at least {3 * self.n_atoms} frames to take scales from, got {len(x)}")
        if not x.isfinite().all():
            raise ValueError(f"data: expected finite positions, got {int((~x.isfinite()).sum())} that are not")
        if self.constraints is not None:
            self.constraints.check("data", x)
        if molecule is not None:
            molecule.chirality.require("data", x)
        return x

    @property
    def n_coordinates(self) -> int:
        """3 n_atoms - 6, less one for each constrained bond."""
        return self.basis.shape[1] + len(self.mean)

    @property
    def torsions(self) -> Torsions:
        """The coordinates that are dihedrals, the last ones of z, and the range of each in units of z."""
        rows = len(self.z_matrix)
        mean, std = (values[len(values) - rows :] for values in (self.mean, self.std))
        indices = torch.arange(self.n_coordinates - rows, self.n_coordinates, device=mean.device)
        return Torsions(indices, (self.cut - mean) / std, (self.cut + 2 * math.pi - mean) / std, self.z_matrix)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Positions to coordinates z, and log|dz/dx|."""
        x = self._check_type(self._points(positions_tensor("positions", x)), "positions")
        if self.constraints is not None:
            self.constraints.check("positions", x)
        bonds, angles, dihedrals = self._internal(x)
        raw = torch.cat([bonds[..., self.free_bonds], angles, _wrap(dihedrals, self.cut)], -1)
        z, block = (raw - self.mean) / self.std, x[..., self.rigid_block, :]
        if not self._triangle:
            block, _ = geometry.superpose(block, self.reference)
            q = (block - self.reference).flatten(-2) @ torch.linalg.pinv(self.basis).mT
            z = torch.cat([q, z], -1)
        return z, -self._logabsdet(x, block, bonds, angles)

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
        return x.flatten(-2), self._logabsdet(x, block, bonds, angles)

    def in_range(self, z: Tensor) -> Tensor:
        """Whether z (..., n_coordinates) is what ``forward(inverse(z)[0])`` returns, up to rounding; bool (...).

        Where it is false (also for z that are NaN or infinite), the density of the structure ``inverse(z)[0]`` is not
        the one that a flow has at this z.
        """
        block, bonds, angles, dihedrals = self._split(z)
        inside = (bonds > 0).all(-1) & ((angles > 0) & (angles < math.pi)).all(-1)
        inside &= ((dihedrals >= self.cut) & (dihedrals < self.cut + 2 * math.pi)).all(-1)
        return inside if self._triangle else inside & geometry.is_superposed(block, self.reference)

    def _split(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The points of the block, bonds, angles and dihedrals in nm and radians."""
        if not isinstance(z, Tensor) or not z.is_floating_point() or z.shape[-1:] != (self.n_coordinates,):
            raise ValueError(f"z: expected floating-point (..., {self.n_coordinates}), got {describe(z)}")
        q, z = self._check_type(z, "z").split([self.basis.shape[1], len(self.mean)], -1)
        sizes = [len(self.free_bonds), len(self._angles), len(self.z_matrix)]
        bonds, angles, dihedrals = (z * self.std + self.mean).split(sizes, -1)
        if self.constraints is not None:
            lengths = self._lengths.expand(*bonds.shape[:-1], -1)
            bonds = lengths.index_copy(-1, self.free_bonds, bonds)
        if self._triangle:
            block = geometry.triangle(bonds[..., -2], bonds[..., -1], angles[..., -1])
        else:
            block = self.reference + (q @ self.basis.mT).unflatten(-1, (-1, 3))
        return block, bonds, angles, dihedrals

    def _internal(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bonds, angles, dihedrals = (
            [x[..., atoms, :] for atoms in rows.T] for rows in (self._bonds, self._angles, self.z_matrix)
        )
        return geometry.distance(*bonds), geometry.angle(*angles), geometry.dihedral(*dihedrals)

    def _logabsdet(self, x: Tensor, block: Tensor, bonds: Tensor, angles: Tensor) -> Tensor:
        """log|dx/dz|."""
        result = self.std.log().sum() + (2 * bonds.abs().log()).sum(-1) + angles.sin().abs().log().sum(-1)
        if self.constraints is not None:
            result = result + self.constraints.log_metric(x)
        if self._triangle:
            return result
        result = result + torch.linalg.svdvals(self.basis).log().sum()
        return result + geometry.log_swept_volume(block, self.complement)

    def _points(self, x: Tensor, name: str = "positions") -> Tensor:
        n = self.n_atoms
        if isinstance(x, Tensor) and x.is_floating_point():
            if x.shape[-2:] == (n, 3):
                return x
            if x.shape[-1:] == (3 * n,):
                return x.unflatten(-1, (n, 3))
        raise ValueError(f"{name}: expected floating-point (..., {n}, 3) or (..., {3 * n}), got {describe(x)}")

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

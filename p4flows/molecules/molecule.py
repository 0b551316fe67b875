"""A molecule with all that a Boltzmann generator needs to know of it, from a PDB file or from OpenMM's objects."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from openmm import app, unit

from p4flows.molecules.bond_graph import BondGraph, atom_name
from p4flows.molecules.chirality import Chirality
from p4flows.molecules.constraints import constraints_of, fixed_bonds
from p4flows.molecules.construction import build_z_matrix
from p4flows.molecules.peptide import backbone_atoms, ramachandran
from p4flows.molecules.units import positions_array
from p4flows.molecules.z_matrix import bond_and_angle_atoms, check_atoms, integers, levels

__all__ = ["Molecule"]


@dataclass(frozen=True, eq=False)
class Molecule:
    """A molecule with what a Boltzmann generator needs to know of it.

    :meth:`from_pdb` and :meth:`from_openmm` make one of any molecule, and check it.

    Attributes:
        topology: its ``openmm.app.Topology``.
        system: its ``openmm.System``.
        positions: a structure, (n_atoms, 3) in nm.
        z_matrix: (n_atoms - m, 4) atom indices: rows (atom, bond, angle, dihedral).
        rigid_block: (m,) atom indices.
        phi, psi: (4,) atom indices of the backbone dihedrals of the first residue that has both; None without such.
            :attr:`ramachandran` has those of all residues.
    """

    topology: app.Topology
    system: openmm.System
    positions: np.ndarray
    z_matrix: np.ndarray
    rigid_block: np.ndarray
    phi: np.ndarray | None = None
    psi: np.ndarray | None = None

    @classmethod
    def from_pdb(
        cls,
        path: str | os.PathLike,
        forcefield: str | Sequence[str] | app.ForceField = ("amber14-all.xml", "implicit/obc2.xml"),
        *,
        constraints: Any = None,
        z_matrix: np.ndarray | None = None,
        rigid_block: np.ndarray | None = None,
        **options: Any,
    ) -> Molecule:
        """A molecule from a PDB file that has all its atoms, hydrogens included, and no others.

        Args:
            path: the PDB file. Its residues must be known to the force field, and bonds beyond those of standard
                residues must be in its CONECT records.
            forcefield: XML files of ``openmm.app.ForceField``, one or several, or one such object. The files in
                ``implicit/`` are slow on the Reference platform: pass ``platform="CPU"`` to :func:`simulate` and
                :class:`OpenMMEnergy`, or take one of the ``_obc.xml`` files with a force field of the same year.
            constraints: None, ``openmm.app.HBonds``, or, for a molecule without rings, ``openmm.app.AllBonds``.
            z_matrix, rigid_block: as for :meth:`from_openmm`.
            options: further arguments of ``ForceField.createSystem``, such as ``hydrogenMass`` or
                ``implicitSolventSaltConc``. By default there is no cut-off and no remover of centre-of-mass motion.

        Raises:
            ValueError: for a file or an option that OpenMM refuses, and as :meth:`from_openmm`.
        """
        if not isinstance(path, str | os.PathLike) or not Path(path).is_file():
            raise ValueError(f"path: expected a PDB file, got {str(path)!r}, which is no file")
        allowed = None, app.HBonds, app.AllBonds, app.HAngles
        if not any(constraints is kind for kind in allowed):  # OpenMM takes anything else for None
            raise ValueError(f"constraints: expected None, openmm.app.HBonds or AllBonds, got {constraints!r}")
        settings = {"nonbondedMethod": app.NoCutoff, "rigidWater": False, "removeCMMotion": False, **options}
        try:
            files = (forcefield,) if isinstance(forcefield, str | os.PathLike) else forcefield
            field = files if isinstance(files, app.ForceField) else app.ForceField(files[0], *files[1:])
        except Exception as error:  # OpenMM raises plain Exceptions too
            raise ValueError(f"forcefield: expected files of OpenMM, got {forcefield!r}: {error}") from error
        try:
            pdb = app.PDBFile(str(path))
            system = field.createSystem(pdb.topology, constraints=constraints, **settings)
        except Exception as error:
            raise ValueError(
                f"{path}: OpenMM could not make a system of it: {error}. Missing hydrogens are added, and waters and "
                "ions removed, by openmm.app.Modeller; hand its topology and positions to Molecule.from_openmm"
            ) from error
        return cls.from_openmm(pdb.topology, system, pdb.positions, z_matrix=z_matrix, rigid_block=rigid_block)

    @classmethod
    def from_openmm(
        cls,
        topology: app.Topology,
        system: openmm.System,
        positions: Any,
        *,
        z_matrix: np.ndarray | None = None,
        rigid_block: np.ndarray | None = None,
    ) -> Molecule:
        """A molecule from OpenMM's objects, wherever they come from: Amber, CHARMM and GROMACS files as well.

        Args:
            topology: with the bonds of one molecule, without solvent and ions.
            system: with the same particles. Of constraints, those of bonds that the z-matrix has are possible;
                without rings these are all bonds, and always all bonds to hydrogen.
            positions: (n_atoms, 3) in nm, or with units. A reasonable structure: handedness is taken from it.
            z_matrix, rigid_block: both, for coordinates of one's own, or neither. By default they are built from the
                bonds; see :func:`p4flows.molecules.construction.build_z_matrix`. In a block of three atoms with a
                constrained bond, the second atom is in the middle.

        Raises:
            ValueError: for arguments that do not fit together, more than one molecule, virtual sites, constraints of
                other than bonds, structures of the wrong size, and flat stereocentres.
        """
        if not isinstance(topology, app.Topology):
            raise ValueError(f"topology: expected an openmm.app.Topology, got {type(topology).__name__}")
        if not isinstance(system, openmm.System):
            raise ValueError(f"system: expected an openmm.System, got {type(system).__name__}")
        if (z_matrix is None) != (rigid_block is None):
            raise ValueError("z_matrix and rigid_block: expected both or neither, got one of them")
        positions = positions_array("positions", positions)
        graph = BondGraph.from_topology(topology)
        _check_particles(topology, system, positions)
        _check_bonds(graph, topology, positions)
        constraints, _ = constraints_of(system)
        if z_matrix is None or rigid_block is None:
            masses = [system.getParticleMass(i).value_in_unit(unit.dalton) for i in range(len(positions))]
            backbone = backbone_atoms(topology, graph)
            z_matrix, rigid_block = build_z_matrix(graph, masses, positions, constraints.tolist(), backbone)
        rows, block = integers("z_matrix", z_matrix), integers("rigid_block", rigid_block)
        check_atoms(rows, block, len(positions))
        levels(rows, block)
        within = any(set(block.tolist()).issuperset(pair) for pair in constraints.tolist())
        fixed_bonds(bond_and_angle_atoms(rows, block if within else None)[0].tolist(), constraints)
        dihedrals = ramachandran(topology, graph)
        phi, psi = dihedrals[0] if len(dihedrals) else (None, None)
        molecule = cls(topology, system, positions, rows.numpy(), block.numpy(), phi, psi)
        _ = molecule.chirality  # which refuses flat structures
        return molecule

    @property
    def n_atoms(self) -> int:
        """The number of atoms."""
        return len(self.positions)

    @cached_property
    def masses(self) -> np.ndarray:
        """(n_atoms,) in dalton."""
        return np.array([self.system.getParticleMass(i).value_in_unit(unit.dalton) for i in range(self.n_atoms)])

    @cached_property
    def constraints(self) -> tuple[np.ndarray, np.ndarray]:
        """The constrained pairs of atoms (k, 2), and their distances (k,) in nm."""
        return constraints_of(self.system)

    @cached_property
    def chirality(self) -> Chirality:
        """The stereocentres with their handedness, and a filter for structures that have lost it."""
        return Chirality(self.topology, self.positions)

    @cached_property
    def ramachandran(self) -> np.ndarray:
        """(residues, 2, 4) atom indices of φ and ψ of all residues that have both."""
        return ramachandran(self.topology, BondGraph.from_topology(self.topology))


def _check_particles(topology: app.Topology, system: openmm.System, positions: np.ndarray) -> None:
    n = system.getNumParticles()
    if topology.getNumAtoms() != n:
        raise ValueError(f"topology: expected {n} atoms, as the system has, got {topology.getNumAtoms()}")
    if positions.shape != (n, 3) or not np.isfinite(positions).all():
        raise ValueError(f"positions: expected finite ({n}, 3), got shape {positions.shape}")
    if n < 3:
        raise ValueError(f"topology: expected at least 3 atoms, got {n}")
    sites = [i for i in range(n) if system.isVirtualSite(i) or not system.getParticleMass(i)._value > 0]
    if sites:
        raise ValueError(
            f"system: expected particles with a mass, got virtual sites or massless ones: "
            f"{', '.join(map(str, sites))}. They have no density; take a force field without them"
        )


def _check_bonds(graph: BondGraph, topology: app.Topology, positions: np.ndarray) -> None:
    parts = graph.components()
    if len(parts) > 1:
        shown = ", ".join(atom_name(topology, part[0]) for part in parts[:4]) + (" ..." if len(parts) > 4 else "")
        raise ValueError(
            f"topology: expected one molecule, got {len(parts)} parts that no bond connects, with {shown}. Remove "
            "solvent and ions (openmm.app.Modeller.deleteWater), and give bonds of unusual residues as CONECT records "
            "of the PDB file or by Topology.addBond"
        )
    bonds = np.array(graph.bonds)
    lengths = np.linalg.norm(positions[bonds[:, 0]] - positions[bonds[:, 1]], axis=1)
    if not (lengths > 0.03).all() or not 0.06 < np.median(lengths) < 0.3:
        worst = int(np.argmin(lengths)) if (lengths <= 0.03).any() else int(np.argmax(lengths))
        raise ValueError(
            "positions: expected nanometers, with bonds of 0.07 to 0.3 nm, got a median of "
            f"{np.median(lengths):.4g} and {lengths[worst]:.4g} for {'-'.join(map(str, bonds[worst]))}"
        )

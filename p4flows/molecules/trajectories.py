"""Trajectories that were simulated elsewhere, read and checked against the molecule that they are said to be of."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from p4flows.molecules.bond_graph import BondGraph
from p4flows.molecules.dcd import read_dcd
from p4flows.molecules.molecule import Molecule

__all__ = ["load_trajectory"]

_FRAMES = 1_000  # at a time
_LONGEST = 1.5  # times the length in the molecule's own structure; 600 K make no more than 1.3 of it


def load_trajectory(source: Any, molecule: Molecule) -> np.ndarray:
    """Frames of a molecule, (frames, n_atoms, 3) float32 in nm, as :func:`simulate` returns them.

    Args:
        source: the path of a DCD file, such as OpenMM's ``DCDReporter`` writes; an ``mdtraj.Trajectory``, which reads
            all other formats: ``mdtraj.load("run.xtc", top="molecule.pdb")``; or a list of these, which are joined.
        molecule: with atoms in the same order.

    Raises:
        ValueError: if the file is no DCD file, the numbers or the elements of the atoms differ, positions are not
            finite, or bonds have lengths that the molecule cannot have, as with other units or another order of atoms.
    """
    if not isinstance(molecule, Molecule):
        raise ValueError(f"molecule: expected a Molecule, got {type(molecule).__name__}")
    if isinstance(source, list | tuple):
        if not source:
            raise ValueError("source: expected at least one trajectory, got none")
        return np.concatenate([load_trajectory(part, molecule) for part in source])
    if isinstance(source, str | os.PathLike):
        if not Path(source).is_file():
            raise ValueError(f"source: expected a DCD file, got {str(source)!r}, which is no file")
        name, x = os.fspath(source), read_dcd(source)
    elif isinstance(getattr(source, "xyz", None), np.ndarray) and hasattr(source, "topology"):
        name, x = "the mdtraj.Trajectory", np.asarray(source.xyz, dtype=np.float32)
        _check_elements(source.topology, molecule)
    else:
        kind = type(source).__name__
        raise ValueError(f"source: expected the path of a DCD file or an mdtraj.Trajectory, got {kind}")
    if x.shape[1:] != (molecule.n_atoms, 3):
        raise ValueError(f"{name}: expected {molecule.n_atoms} atoms, as the molecule has, got {x.shape[1]}")
    if not np.isfinite(x).all():
        raise ValueError(f"{name}: expected finite positions, got NaN or infinity")
    _check_bonds(name, x, molecule)
    return x


def _check_elements(topology: Any, molecule: Molecule) -> None:
    # Not names, of which several are in use for one atom.
    theirs, ours = ([_symbol(atom) for atom in t] for t in (topology.atoms, molecule.topology.atoms()))
    differ = [i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b]
    if len(theirs) == len(ours) and differ:
        i = differ[0]
        raise ValueError(
            f"the mdtraj.Trajectory: expected the atoms of the molecule in their order, got {theirs[i]} where the "
            f"molecule has {ours[i]} (atom {i}), and {len(differ) - 1} more that differ"
        )


def _symbol(atom: Any) -> str:
    return "none" if atom.element is None else atom.element.symbol


def _check_bonds(name: str, x: np.ndarray, molecule: Molecule) -> None:
    bonds = np.array(BondGraph.from_topology(molecule.topology).bonds)
    usual = np.linalg.norm(np.subtract(*molecule.positions[bonds.T]), axis=-1)
    for start in range(0, len(x), _FRAMES):
        part = x[start : start + _FRAMES]
        ratio = np.linalg.norm(part[:, bonds[:, 0]] - part[:, bonds[:, 1]], axis=-1) / usual
        wrong = np.argwhere((ratio <= 1 / _LONGEST) | (ratio >= _LONGEST))
        if len(wrong):
            frame, worst = wrong[0]
            raise ValueError(
                f"{name}: expected bonds about as long as those of the molecule, got one of "
                f"{ratio[frame, worst] * usual[worst]:.3g} nm for {usual[worst]:.3g} nm "
                f"({'-'.join(map(str, bonds[worst]))}) in frame {start + frame}: "
                "another order of atoms, another unit, or a molecule cut by a periodic boundary"
            )

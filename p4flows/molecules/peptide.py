"""The backbone of a peptide, by the names that its atoms have in the Protein Data Bank."""

from __future__ import annotations

import numpy as np
from openmm import app

from p4flows.molecules.bond_graph import BondGraph

__all__ = ["backbone_atoms", "ramachandran"]


def backbone_atoms(topology: app.Topology, graph: BondGraph) -> list[int]:
    """The atoms N, CA and C of all residues that have the three, bonded in this order."""
    return [atom for residue in _backbones(topology, graph) for atom in residue]


def ramachandran(topology: app.Topology, graph: BondGraph) -> np.ndarray:
    """(residues, 2, 4) atoms of the dihedrals φ = C-N-CA-C and ψ = N-CA-C-N of the residues that have both."""
    names = [atom.name for atom in topology.atoms()]
    residues = [atom.residue.index for atom in topology.atoms()]

    def across(atom: int, name: str) -> list[int]:
        return [j for j in graph.neighbours[atom] if names[j] == name and residues[j] != residues[atom]]

    dihedrals = []
    for n, ca, c in _backbones(topology, graph):
        before, after = across(n, "C"), across(c, "N")
        if before and after:
            dihedrals.append([(before[0], n, ca, c), (n, ca, c, after[0])])
    return np.array(dihedrals, dtype=np.int64).reshape(-1, 2, 4)


def _backbones(topology: app.Topology, graph: BondGraph) -> list[tuple[int, int, int]]:
    found = []
    for residue in topology.residues():
        atoms = {atom.name: atom.index for atom in residue.atoms()}
        if {"N", "CA", "C"} <= atoms.keys():
            n, ca, c = atoms["N"], atoms["CA"], atoms["C"]
            if ca in graph.neighbours[n] and c in graph.neighbours[ca]:
                found.append((n, ca, c))
    return found

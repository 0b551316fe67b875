"""Alanine dipeptide (ACE-ALA-NME) in implicit solvent, the molecule of Section 4.4, from OpenMM's own files."""

from __future__ import annotations

import numpy as np
from openmm import app

from p4flows.molecules.molecule import Molecule

__all__ = ["alanine_dipeptide"]


def alanine_dipeptide() -> Molecule:
    """The L-enantiomer, 22 atoms in the order of amber; amber99sbildn + amber96_obc, no cut-off, no constraints.

    z-matrix and rigid block are those of the authors of the paper. The structure is a minimum of the energy.
    """
    topology = app.Topology()
    chain = topology.addChain()
    atoms = []
    for residue, names in _RESIDUES.items():
        parent = topology.addResidue(residue, chain)
        atoms += [topology.addAtom(name, app.Element.getBySymbol(name[0]), parent) for name in names.split()]
    for i, j in _BONDS:
        topology.addBond(atoms[i], atoms[j])
    # The centre-of-mass motion remover is no force; it would only tie the system to an integrator's time step.
    system = app.ForceField("amber99sbildn.xml", "amber96_obc.xml").createSystem(
        topology, nonbondedMethod=app.NoCutoff, constraints=None, rigidWater=False, removeCMMotion=False
    )
    return Molecule(
        topology,
        system,
        positions=np.array(_POSITIONS),
        z_matrix=np.array(_Z_MATRIX),
        rigid_block=np.array([6, 8, 9, 10, 14]),
        phi=np.array([4, 6, 8, 14]),
        psi=np.array([6, 8, 14, 16]),
    )


_RESIDUES = {
    "ACE": "HH31 CH3 HH32 HH33 C O",
    "ALA": "N H CA HA CB HB1 HB2 HB3 C O",
    "NME": "N H CH3 HH31 HH32 HH33",
}

# fmt: off
_BONDS = [
    (0, 1), (1, 2), (1, 3), (1, 4), (4, 5), (4, 6), (6, 7), (6, 8), (8, 9), (8, 10), (8, 14), (10, 11), (10, 12),
    (10, 13), (14, 15), (14, 16), (16, 17), (16, 18), (18, 19), (18, 20), (18, 21),
]

_Z_MATRIX = [
    (0, 1, 4, 6), (1, 4, 6, 8), (2, 1, 4, 0), (3, 1, 4, 0), (4, 6, 8, 14), (5, 4, 6, 8), (7, 6, 8, 4), (11, 10, 8, 6),
    (12, 10, 8, 11), (13, 10, 8, 11), (15, 14, 8, 16), (16, 14, 8, 6), (17, 16, 14, 15), (18, 16, 14, 8),
    (19, 18, 16, 14), (20, 18, 16, 19), (21, 18, 16, 19),
]

_POSITIONS = [
    (-0.1172, 0.4418, 0.0608), (-0.1192, 0.3630, -0.0144), (-0.0629, 0.3948, -0.1020), (-0.2224, 0.3427, -0.0429),
    (-0.0573, 0.2372, 0.0422), (-0.0140, 0.2360, 0.1574), (-0.0525, 0.1316, -0.0393), (-0.0918, 0.1413, -0.1321),
    (0.0000, 0.0000, 0.0000), (-0.0354, -0.0222, 0.1008), (-0.0601, -0.1049, -0.0945), (-0.0287, -0.2046, -0.0634),
    (-0.1690, -0.0998, -0.0912), (-0.0260, -0.0872, -0.1966), (0.1546, -0.0087, 0.0037), (0.2095, -0.1035, 0.0608),
    (0.2254, 0.0886, -0.0559), (0.1736, 0.1630, -0.1007), (0.3716, 0.0949, -0.0607), (0.4036, 0.1838, -0.1153),
    (0.4121, 0.0992, 0.0406), (0.4111, 0.0064, -0.1108),
]
# fmt: on

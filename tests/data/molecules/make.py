"""Makes the PDB files of this folder: ``python make.py``, with OpenMM and PeptideBuilder (pip install peptidebuilder).

Peptides are built with ideal bonds and angles, get their hydrogens from OpenMM's Modeller, and are relaxed in implicit
solvent. Positions differ a little from run to run, so the files are committed.
"""

import io
import math
import random
from pathlib import Path

import numpy as np
import openmm
import PeptideBuilder
from Bio.PDB import PDBIO
from Bio.PDB.Atom import Atom
from openmm import app, unit
from PeptideBuilder import Geometry

# Name: sequence, and φ and ψ of each residue in degrees. A glycine at either end of a dipeptide becomes its cap.
PEPTIDES = {
    "proline_dipeptide": ("GPG", [(-120, 150), (-70, 150), (-120, 150)]),
    "phenylalanine_dipeptide": ("GFG", [(-120, 150), (-70, 150), (-120, 150)]),
    "chignolin": ("GYDPETGTWG", [(-120, 140), (-110, 130), (-110, 120), (-70, 140)] + [(-120, 140)] * 6),  # unfolded
}


def heavy_atoms(sequence, angles):
    """The lines of a PDB file without hydrogens."""
    structure = None
    for i, letter in enumerate(sequence):
        residue = Geometry.geometry(letter)
        residue.phi = angles[i][0]
        residue.psi_im1 = angles[i - 1][1]
        structure = PeptideBuilder.add_residue(structure, residue) if i else PeptideBuilder.initialize_res(residue)
    if len(sequence) > 3:
        last = list(structure.get_residues())[-1]
        ca, c, o = (last[name].coord for name in ("CA", "C", "O"))
        away = -(ca - c) / np.linalg.norm(ca - c) - (o - c) / np.linalg.norm(o - c)
        oxt = c + 1.25 * away / np.linalg.norm(away)
        last.add(Atom("OXT", oxt, 0.0, 1.0, " ", " OXT", 0, "O"))
    writer, file = PDBIO(), io.StringIO()
    writer.set_structure(structure)
    writer.save(file)
    return file.getvalue().splitlines()


def capped(lines):
    """GLY-X-GLY as ACE-X-NME."""
    kept = {1: ({"CA": "CH3", "C": "C", "O": "O"}, "ACE"), 3: ({"N": "N", "CA": "C"}, "NME")}
    for line in lines:
        if not line.startswith("ATOM"):
            yield line
            continue
        name, number = line[12:16].strip(), int(line[22:26])
        if number not in kept:
            yield line
        elif name in kept[number][0]:
            yield f"{line[:12]} {kept[number][0][name]:<3} {kept[number][1]}{line[20:]}"


def aniline():
    """N,N-dimethylaniline, planar, with the names of residue DMAN of CHARMM's general force field."""
    atoms, bonds = {}, []
    for i in range(1, 7):
        angle = math.radians(60 * i + 90)  # C6 is at the top
        direction = math.cos(angle), math.sin(angle), 0.0
        atoms[f"C{i}"] = [1.4 * c for c in direction]
        bonds.append((f"C{i}", f"C{i % 6 + 1}"))
        if i < 6:
            atoms[f"H{i}"] = [2.48 * c for c in direction]
            bonds.append((f"C{i}", f"H{i}"))
    atoms["N1"] = [2.8 * c for c in direction]
    bonds.append(("C6", "N1"))
    for carbon, side in (("C7", 1), ("C8", -1)):
        atoms[carbon] = [1.24 * side, 3.5, 0.0]
        bonds.append(("N1", carbon))
        hydrogens = [(0.0, 1.08, 0.0), (0.6 * side, -0.3, 0.88), (0.6 * side, -0.3, -0.88)]
        for i, shift in enumerate(hydrogens, 1):
            atoms[f"H{carbon[1]}{i}"] = [a + b for a, b in zip(atoms[carbon], shift, strict=True)]
            bonds.append((carbon, f"H{carbon[1]}{i}"))
    topology = app.Topology()
    residue = topology.addResidue("DMAN", topology.addChain(), "1")
    added = {name: topology.addAtom(name, app.Element.getBySymbol(name[0]), residue) for name in atoms}
    for i, j in bonds:
        topology.addBond(added[i], added[j])
    return topology, [openmm.Vec3(*x) for x in atoms.values()] * unit.angstrom


def peptide(lines):
    """The topology and the positions with hydrogens."""
    random.seed(0)  # Modeller puts hydrogens at random first
    pdb = app.PDBFile(io.StringIO("\n".join(lines)))
    modeller = app.Modeller(pdb.topology, pdb.positions)
    modeller.addHydrogens(PROTEINS, pH=7, platform=REFERENCE)
    return modeller.topology, modeller.positions


def write(name, field, topology, positions):
    """A minimum of the energy, as a PDB file."""
    system = field.createSystem(topology, nonbondedMethod=app.NoCutoff)
    simulation = app.Simulation(topology, system, openmm.VerletIntegrator(0.001), REFERENCE)
    simulation.context.setPositions(positions)
    simulation.minimizeEnergy()
    found = simulation.context.getState(getPositions=True).getPositions()
    with open(Path(__file__).parent / f"{name}.pdb", "w") as file:
        app.PDBFile.writeFile(topology, found, file, keepIds=True)
    print(name, topology.getNumAtoms(), "atoms")


REFERENCE = openmm.Platform.getPlatformByName("Reference")
PROTEINS = app.ForceField("amber14-all.xml", "implicit/obc2.xml")

for name, (sequence, angles) in PEPTIDES.items():
    atoms = heavy_atoms(sequence, angles)
    write(name, PROTEINS, *peptide(list(capped(atoms)) if len(sequence) == 3 else atoms))
write("dimethylaniline", app.ForceField("charmm36.xml"), *aniline())

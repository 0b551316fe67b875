"""Molecules from PDB files and from OpenMM's objects: their z-matrices and blocks, and what is refused."""

import functools
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("openmm")
pytest.importorskip("tqdm")

import openmm
from openmm import app, unit

from p4flows.molecules import Molecule, alanine_dipeptide
from p4flows.molecules.bond_graph import BondGraph
from p4flows.molecules.construction import build_z_matrix

DATA = Path(__file__).parents[1] / "data" / "molecules"
AMBER = ("amber14-all.xml", "implicit/obc2.xml")
CHARMM = ("charmm36.xml",)
MOLECULES = {
    "proline_dipeptide": AMBER,
    "phenylalanine_dipeptide": AMBER,
    "dimethylaniline": CHARMM,
    "chignolin": AMBER,
}


@functools.cache
def read(*files):
    """A force field; reading its files takes a second."""
    return app.ForceField(*files)


def load(name, **options):
    return Molecule.from_pdb(DATA / f"{name}.pdb", read(*MOLECULES[name]), **options)


def angle(x, *atoms):
    u, v = x[atoms[0]] - x[atoms[1]], x[atoms[2]] - x[atoms[1]]
    return np.degrees(np.arctan2(np.linalg.norm(np.cross(u, v)), u @ v))


@pytest.mark.parametrize("constraints", [None, app.HBonds], ids=["free", "HBonds"])
@pytest.mark.parametrize("name", MOLECULES)
def test_coordinates_are_built_from_the_bonds(name, constraints):
    molecule = load(name, constraints=constraints)
    graph = BondGraph.from_topology(molecule.topology)
    rows = molecule.z_matrix.tolist()
    assert sorted([*molecule.rigid_block.tolist(), *(row[0] for row in rows)]) == list(range(molecule.n_atoms))
    placed, first = set(molecule.rigid_block.tolist()), {}
    for a, b, c, d in rows:
        assert placed.issuperset((b, c, d))
        assert b in graph.neighbours[a]
        assert c in graph.neighbours[b]
        # The first branch at an atom hangs on a chain of bonds, the others on the first.
        if b in first:
            assert d == first[b]
        elif b not in molecule.rigid_block or len(molecule.rigid_block) < 2:
            assert d in graph.neighbours[c]
            first[b] = a
        assert 15 < angle(molecule.positions, a, b, c) < 165
        assert 15 < angle(molecule.positions, b, c, d) < 165
        placed.add(a)
    hydrogens = {atom.index for atom in molecule.topology.atoms() if atom.element.symbol == "H"}
    assert bool(hydrogens & set(molecule.rigid_block.tolist())) == (constraints is None and name != "dimethylaniline")
    again = load(name, constraints=constraints)
    assert np.array_equal(again.z_matrix, molecule.z_matrix)
    assert np.array_equal(again.rigid_block, molecule.rigid_block)


def test_backbone_dihedrals_are_coordinates():
    molecule = load("chignolin")
    assert molecule.ramachandran.shape == (8, 2, 4)
    rows = {tuple(row) for row in molecule.z_matrix.tolist()}
    for dihedral in molecule.ramachandran.reshape(-1, 4).tolist():
        assert tuple(dihedral) in rows or tuple(reversed(dihedral)) in rows
    assert np.array_equal(molecule.phi, molecule.ramachandran[0, 0])
    names = [atom.name for atom in molecule.topology.atoms()]
    assert [names[i] for i in molecule.psi] == ["N", "CA", "C", "N"]
    assert load("dimethylaniline").phi is None
    assert load("dimethylaniline").ramachandran.shape == (0, 2, 4)


def test_alanine_dipeptide_gets_the_coordinates_of_the_paper():
    ours = alanine_dipeptide()
    built = Molecule.from_openmm(ours.topology, ours.system, ours.positions * unit.nanometer)
    assert set(built.rigid_block.tolist()) == set(ours.rigid_block.tolist())
    expected = {tuple(row) for row in ours.z_matrix.tolist()}
    # The two atoms that the authors place by another dihedral of the same branching.
    assert {tuple(row) for row in built.z_matrix.tolist()} ^ expected == {
        (5, 4, 6, 8), (5, 4, 6, 1), (17, 16, 14, 15), (17, 16, 14, 18)
    }  # fmt: skip
    assert np.array_equal(built.phi, ours.phi)
    assert np.array_equal(built.psi, ours.psi)
    assert np.array_equal(built.ramachandran[0], [ours.phi, ours.psi])


def hydrocarbon(names, bonds, positions):
    """A topology and a system without forces, of any atoms."""
    topology, system = app.Topology(), openmm.System()
    residue = topology.addResidue("UNK", topology.addChain())
    atoms = []
    for name in names:
        element = app.Element.getBySymbol(name[0])
        atoms.append(topology.addAtom(name, element, residue))
        system.addParticle(element.mass)
    for i, j in bonds:
        topology.addBond(atoms[i], atoms[j])
    return topology, system, np.array(positions)


def propyne():
    names = ["C1", "C2", "C3", "H1", "H2", "H3", "H4"]
    around = [(np.cos(t), np.sin(t)) for t in np.radians([0, 120, 240])]
    x = [(0, 0, 0.146), (0, 0, 0), (0, 0, -0.12), *((0.103 * c, 0.103 * s, 0.182) for c, s in around), (0, 0, -0.226)]
    return hydrocarbon(names, [(0, 1), (1, 2), (0, 3), (0, 4), (0, 5), (2, 6)], x)


def test_linear_groups_are_placed_from_the_side():
    molecule = Molecule.from_openmm(*propyne())
    assert molecule.rigid_block.tolist() == [0, 1, 3, 4, 5]
    for a, b, c, d in molecule.z_matrix.tolist():
        assert 15 < angle(molecule.positions, a, b, c) < 165
        assert 15 < angle(molecule.positions, b, c, d) < 165
    # By the same rule that places the others, the angles of these two would be 180 degrees.
    assert {row[0] for row in molecule.z_matrix.tolist()} == {2, 6}


def test_molecules_on_a_line_are_refused():
    with pytest.raises(ValueError, match="expected a structure that has a bent angle, got all bonds on one line"):
        Molecule.from_openmm(
            *hydrocarbon("HCCH", [(0, 1), (1, 2), (2, 3)], [(0, 0, z) for z in (0, 0.106, 0.226, 0.332)])
        )


def test_a_reference_that_is_hopeless_is_told():
    straight = np.array([[0.0, 0.1, 0], [0, 0, 0], [0.1, 0, 0], [0.2, 0, 0], [0.3, 0, 0], [9.0, 0, 0]])
    straight[0, 1] = 1e-3  # hardly bent
    graph = BondGraph(6, [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)])
    with pytest.raises(ValueError, match=r"on one line"):
        build_z_matrix(graph, [12.0] * 6, straight)


def test_ones_own_coordinates_are_taken_and_checked():
    ours = alanine_dipeptide()
    parts = ours.topology, ours.system, ours.positions
    molecule = Molecule.from_openmm(*parts, z_matrix=ours.z_matrix, rigid_block=ours.rigid_block)
    assert np.array_equal(molecule.z_matrix, ours.z_matrix)
    with pytest.raises(ValueError, match=r"expected both or neither"):
        Molecule.from_openmm(*parts, z_matrix=ours.z_matrix)
    with pytest.raises(ValueError, match=r"each atom 0 ... 21 once of data"):
        Molecule.from_openmm(*parts, z_matrix=ours.z_matrix[1:], rigid_block=ours.rigid_block)
    circular = ours.z_matrix.copy()
    circular[1] = (1, 0, 6, 8)
    with pytest.raises(ValueError, match=r"cannot be placed"):
        Molecule.from_openmm(*parts, z_matrix=circular, rigid_block=ours.rigid_block)


def test_one_molecule_in_nanometers():
    ours = alanine_dipeptide()
    for factor in (10, 0.1):
        with pytest.raises(ValueError, match=r"positions: expected nanometers, with bonds of 0.07 to 0.3 nm"):
            Molecule.from_openmm(ours.topology, ours.system, factor * ours.positions)
    assert Molecule.from_openmm(ours.topology, ours.system, 10 * ours.positions * unit.angstrom).n_atoms == 22
    folded = ours.positions.copy()
    folded[0] = folded[1]
    with pytest.raises(ValueError, match=r"and 0 for 0-1"):
        Molecule.from_openmm(ours.topology, ours.system, folded)
    loose = app.Topology()
    residue = loose.addResidue("ALA", loose.addChain())
    for _ in range(22):
        loose.addAtom("C", app.element.carbon, residue)
    with pytest.raises(ValueError, match=r"expected one molecule, got 22 parts that no bond connects"):
        Molecule.from_openmm(loose, ours.system, ours.positions)


def test_force_fields_are_one_file_or_several_or_an_object():
    path = DATA / "dimethylaniline.pdb"
    first = load("dimethylaniline")
    for forcefield in (CHARMM, "charmm36.xml"):
        other = Molecule.from_pdb(path, forcefield)
        assert openmm.XmlSerializer.serialize(other.system) == openmm.XmlSerializer.serialize(first.system)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topology": None}, "topology: expected an openmm.app.Topology, got NoneType"),
        ({"system": None}, "system: expected an openmm.System, got NoneType"),
        ({"system": openmm.System()}, "topology: expected 0 atoms, as the system has, got 22"),
        ({"positions": np.zeros((21, 3))}, r"positions: expected finite \(22, 3\), got shape \(21, 3\)"),
        ({"positions": np.full((22, 3), np.nan)}, "positions: expected finite"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    ours = alanine_dipeptide()
    given = {"topology": ours.topology, "system": ours.system, "positions": ours.positions, **change}
    with pytest.raises(ValueError, match=message):
        Molecule.from_openmm(**given)


def test_solvent_hydrogens_and_paths(tmp_path):
    water = Path(app.__file__).parent / "data" / "tip3p.pdb"
    with pytest.raises(ValueError, match=r"expected one molecule, got .* parts .* Remove solvent"):
        Molecule.from_pdb(water, ("amber14/tip3p.xml",))
    bare = tmp_path / "bare.pdb"
    lines = (DATA / "chignolin.pdb").read_text().splitlines()
    bare.write_text("\n".join(line for line in lines if not line.startswith("ATOM") or line[76:78].strip() != "H"))
    with pytest.raises(ValueError, match=r"could not make a system of it: .*hydrogen.*Modeller"):
        Molecule.from_pdb(bare)
    with pytest.raises(ValueError, match=r"expected a PDB file, got .*nowhere.pdb', which is no file"):
        Molecule.from_pdb(tmp_path / "nowhere.pdb")
    with pytest.raises(ValueError, match=r"constraints: expected None, openmm.app.HBonds or AllBonds, got .HBonds."):
        load("proline_dipeptide", constraints="HBonds")
    with pytest.raises(ValueError, match=r"could not make a system of it: .*nonsense"):
        load("proline_dipeptide", nonsense=True)


def test_virtual_sites_have_no_coordinates():
    field = app.ForceField("amber14/tip4pew.xml")
    topology = app.Topology()
    residue = topology.addResidue("HOH", topology.addChain())
    atoms = [topology.addAtom(n, app.Element.getBySymbol(n[0]), residue) for n in ("O", "H1", "H2")]
    topology.addBond(atoms[0], atoms[1])
    topology.addBond(atoms[0], atoms[2])
    x = [openmm.Vec3(0, 0, 0), openmm.Vec3(0.09, 0.03, 0), openmm.Vec3(-0.03, 0.09, 0)] * unit.nanometer
    modeller = app.Modeller(topology, x)
    modeller.addExtraParticles(field)
    system = field.createSystem(modeller.topology, constraints=None, rigidWater=False)
    with pytest.raises(ValueError, match=r"expected particles with a mass, got virtual sites or massless ones: 3"):
        Molecule.from_openmm(modeller.topology, system, modeller.positions)


@pytest.mark.parametrize(
    ("name", "constraints", "pairs"),
    [("proline_dipeptide", app.AllBonds, 1), ("phenylalanine_dipeptide", app.HAngles, None)],
)
def test_constraints_that_are_no_coordinates_are_refused(name, constraints, pairs):
    with pytest.raises(ValueError, match=r"constraints: expected those of bonds that are coordinates, got the pairs"):
        load(name, constraints=constraints)

"""The handedness of molecules: found, kept, and told where it is lost."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("openmm")
pytest.importorskip("tqdm")

from p4flows.molecules import MixedCoordinates, Molecule, OpenMMEnergy
from p4flows.molecules.bond_graph import BondGraph
from p4flows.molecules.chirality import stereocentres

DATA = Path(__file__).parents[1] / "data" / "molecules"


def mirrored(x):
    return x * torch.tensor([-1.0, 1.0, 1.0], dtype=x.dtype)


def test_stereocentres_of_peptides(molecule):
    assert molecule.chirality.centres.tolist() == [[8, 6, 9, 10, 14]]
    assert molecule.chirality.names == ["CA of ALA 2 (atom 8)"]
    chignolin = Molecule.from_pdb(DATA / "chignolin.pdb")
    names = [name.split(" (")[0] for name in chignolin.chirality.names]
    # GYDPETGTWG: each residue but glycine, and the second centre of threonine.
    assert names == [
        "CA of TYR 2", "CA of ASP 3", "CA of PRO 4", "CA of GLU 5", "CA of THR 6", "CB of THR 6", "CA of THR 8",
        "CB of THR 8", "CA of TRP 9",
    ]  # fmt: skip
    assert len(Molecule.from_pdb(DATA / "dimethylaniline.pdb", ("charmm36.xml",)).chirality.centres) == 0


def test_neighbours_that_a_symmetry_exchanges_make_no_centre():
    # 2-butanol's C2 is one, C3 with its two hydrogens is not; isopropanol's C2 has two equal methyls.
    butanol = BondGraph(15, [(0, 1), (1, 2), (2, 3), (1, 4), (4, 5), (1, 6), *((0, i) for i in (7, 8, 9)),
                             *((2, i) for i in (10, 11)), *((3, i) for i in (12, 13, 14))])  # fmt: skip
    kinds = ["C"] * 4 + ["O"] + ["H"] * 10
    assert stereocentres(butanol, kinds).tolist() == [[1, 0, 2, 4, 6]]
    propanol = BondGraph(6, [(0, 1), (1, 2), (1, 3), (3, 4), (1, 5)])
    assert len(stereocentres(propanol, ["C", "C", "C", "O", "H", "H"])) == 0


def test_a_flat_structure_has_no_handedness(molecule):
    """As drawing programs write them: every structure of the data would be said to be the other enantiomer."""
    flat = molecule.positions.copy()
    flat[:, 2] *= 1e-3
    with pytest.raises(
        ValueError, match=r"expected a structure in three dimensions, .* got flat stereocentres: CA of ALA 2"
    ):
        Molecule.from_openmm(molecule.topology, molecule.system, flat)
    built = Molecule.from_openmm(molecule.topology, molecule.system, molecule.positions)
    assert (built.chirality._flatness(torch.from_numpy(molecule.positions)) > 0.5).all()


def test_dynamics_keeps_the_handedness_and_a_mirror_does_not(molecule, frames):
    chirality = molecule.chirality
    assert chirality.kept(frames).all()
    assert chirality.kept(frames.flatten(1)).shape == (600,)
    assert not chirality.kept(mirrored(frames)).any()
    both = torch.cat([frames[:30], mirrored(frames[:10])])
    with pytest.warns(UserWarning, match=r"10 of 40 structures have the other handedness: 25.00% at CA of ALA"):
        kept = chirality.check(both)
    assert kept.tolist() == [True] * 30 + [False] * 10
    assert chirality.check(frames).all()  # without a warning, which would be an error here
    nan = frames[:2].clone()
    nan[0, 8] = float("nan")
    nan[0, 9] = float("nan")
    assert chirality.kept(nan).tolist() == [False, True]
    with pytest.raises(ValueError, match=r"positions: expected floating-point \(..., 22, 3\), got \(2, 21, 3\)"):
        chirality.kept(frames[:2, 1:])


def test_coordinates_of_a_molecule_refuse_the_other_enantiomer(molecule, frames):
    MixedCoordinates(molecule, frames)
    data = torch.cat([frames, mirrored(frames[:3])])
    with pytest.raises(ValueError, match=r"data: expected structures of this molecule, got others: 3 of 603 .* at CA"):
        MixedCoordinates(molecule, data)


def test_a_flow_that_generates_the_other_enantiomer_is_told(molecule, frames):
    """The mirror image has the same energy, so that no weight tells; the coordinates of a structure can be turned."""
    built = Molecule.from_openmm(molecule.topology, molecule.system, molecule.positions)
    coordinates = MixedCoordinates(built, frames.double())
    z, _ = coordinates(frames[:100].double())
    x, _ = coordinates.inverse(z)
    assert built.chirality.kept(x).all()
    turned = mirrored(frames[:100].double())
    energy = OpenMMEnergy(built, 600)
    torch.testing.assert_close(energy(turned), energy(frames[:100].double()))
    # In these coordinates as well: a wide flow makes some of them.
    torch.manual_seed(0)
    wide, _ = coordinates.inverse(20 * torch.randn(2_000, 60, dtype=torch.float64))
    kept = built.chirality.kept(wide)
    assert 0 < kept.double().mean() < 1
    with pytest.warns(UserWarning, match="other handedness"):
        built.chirality.check(wide)

"""Trajectories of other programs: DCD files, mdtraj, and what does not fit the molecule."""

import struct
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("openmm")
pytest.importorskip("tqdm")

import openmm
from openmm import app, unit

from p4flows.molecules import MixedCoordinates, OpenMMEnergy, load_trajectory
from p4flows.molecules.dcd import read_dcd


@pytest.fixture(scope="module")
def reported(molecule, tmp_path_factory):
    """A file by OpenMM's own reporter, and the frames that were reported."""
    path = tmp_path_factory.mktemp("dcd") / "run.dcd"
    integrator = openmm.LangevinMiddleIntegrator(300 * unit.kelvin, 1 / unit.picosecond, 1 * unit.femtosecond)
    integrator.setRandomNumberSeed(1)
    platform = openmm.Platform.getPlatformByName("Reference")
    simulation = app.Simulation(molecule.topology, molecule.system, integrator, platform)
    simulation.context.setPositions(molecule.positions)
    simulation.reporters.append(app.DCDReporter(str(path), 5))
    frames = []
    for _ in range(12):
        simulation.step(5)
        frames.append(simulation.context.getState(getPositions=True).getPositions(asNumpy=True)._value)
    simulation.reporters.clear()
    return path, np.array(frames)


def test_dcd_files_of_openmm(molecule, reported):
    path, frames = reported
    x = load_trajectory(path, molecule)
    assert x.dtype == np.float32
    np.testing.assert_allclose(x, frames, atol=1e-7)
    assert np.array_equal(load_trajectory(str(path), molecule), x)
    assert np.array_equal(load_trajectory([path, path], molecule), np.concatenate([x, x]))


def test_dcd_files_with_a_cell_and_of_other_machines(molecule, tmp_path, reported):
    _, frames = reported
    topology = app.Topology()
    residue = topology.addResidue("ALA", topology.addChain())
    for _ in range(22):
        topology.addAtom("C", app.element.carbon, residue)
    topology.setPeriodicBoxVectors(np.eye(3) * 3 * unit.nanometer)
    path = tmp_path / "cell.dcd"
    with open(path, "w+b") as file:
        dcd = app.DCDFile(file, topology, 1 * unit.femtosecond)
        for frame in frames:
            dcd.writeModel(frame * unit.nanometer)
    np.testing.assert_allclose(read_dcd(path), frames, atol=1e-7)
    # Big-endian, as on other machines: a file of two frames, written by hand.
    control = [2, 0, 1, *[0] * 17]
    data = struct.pack(">i4s20ii", 84, b"CORD", *control, 84)
    data += struct.pack(">ii80si", 84, 1, b"by hand", 84) + struct.pack(">3i", 4, 22, 4)
    for frame in frames[:2]:
        for axis in frame.T:
            data += struct.pack(">i22fi", 88, *(10 * axis), 88)
    (tmp_path / "big.dcd").write_bytes(data)
    np.testing.assert_allclose(read_dcd(tmp_path / "big.dcd"), frames[:2], atol=1e-7)


def test_a_cut_frame_is_told_and_left_out(tmp_path, reported):
    path, frames = reported
    cut = tmp_path / "cut.dcd"
    cut.write_bytes(path.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="the last frame is cut off"):
        x = read_dcd(cut)
    np.testing.assert_allclose(x, frames[:-1], atol=1e-7)


def test_other_files_are_refused(molecule, tmp_path, reported):
    path, _ = reported
    other = tmp_path / "other.dcd"
    other.write_bytes(b"PK" * 500)
    with pytest.raises(ValueError, match="expected a DCD file, got one that does not begin as such files do"):
        load_trajectory(other, molecule)
    data = bytearray(path.read_bytes())
    data[8 + 4 * 8] = 3
    other.write_bytes(data)
    with pytest.raises(ValueError, match="got fixed atoms or a fourth dimension"):
        load_trajectory(other, molecule)
    for end in (116, 130, 264):  # within and after the titles
        other.write_bytes(path.read_bytes()[:end])
        with pytest.raises(ValueError, match="expected a number of atoms after the titles of a DCD file, got none"):
            load_trajectory(other, molecule)
    data = bytearray(path.read_bytes())
    data[-4] += 1  # a mark of length
    other.write_bytes(data)
    with pytest.raises(ValueError, match="got another layout"):
        load_trajectory(other, molecule)
    for source, message in ((None, "got NoneType"), ([], "at least one trajectory")):
        with pytest.raises(ValueError, match=message):
            load_trajectory(source, molecule)


def stand_in(x, symbols):
    """What we use of an mdtraj.Trajectory, where mdtraj is not installed."""
    atoms = [SimpleNamespace(element=SimpleNamespace(symbol=symbol)) for symbol in symbols]
    return SimpleNamespace(xyz=x, topology=SimpleNamespace(atoms=atoms))


def test_frames_that_are_not_of_the_molecule(molecule, frames):
    x, symbols = frames[:10].numpy(), [atom.element.symbol for atom in molecule.topology.atoms()]
    assert np.array_equal(load_trajectory(stand_in(x, symbols), molecule), x)
    swapped = [*symbols[:8], symbols[9], symbols[8], *symbols[10:]]
    cases = [
        (stand_in(x, swapped), "got H where the molecule has C .atom 8., and 1 more that differ"),
        (stand_in(x[:, :21], symbols[:21]), "expected 22 atoms, as the molecule has, got 21"),
        (stand_in(10 * x, symbols), "another order of atoms, another unit"),
        (stand_in(np.full_like(x, np.nan), symbols), "expected finite positions"),
    ]
    cut = frames[:3].numpy().copy()
    cut[1, 20:] += 3.0  # as a periodic boundary does, for a while
    cases.append((stand_in(cut, symbols), "got one of .* nm for 0.109 nm .18-20. in frame 1: "))
    order = np.arange(22)
    order[[0, 21]] = 21, 0
    cases.append((stand_in(x[:, order], symbols), "expected bonds about as long as those of the molecule"))
    for source, message in cases:
        with pytest.raises(ValueError, match=message):
            load_trajectory(source, molecule)


def test_mdtraj(molecule, frames, tmp_path):
    mdtraj = pytest.importorskip("mdtraj", reason="mdtraj is not installed (pip install mdtraj)")
    pdb = tmp_path / "alanine.pdb"
    with open(pdb, "w") as file:
        app.PDBFile.writeFile(molecule.topology, molecule.positions * unit.nanometer, file)
    trajectory = mdtraj.Trajectory(frames.numpy(), mdtraj.load(str(pdb)).topology)
    for name in ("run.dcd", "run.xtc"):
        trajectory.save(str(tmp_path / name))
        read = mdtraj.load(str(tmp_path / name), top=str(pdb))
        np.testing.assert_allclose(load_trajectory(read, molecule), frames.numpy(), atol=1e-3)
    np.testing.assert_allclose(load_trajectory(tmp_path / "run.dcd", molecule), frames.numpy(), atol=1e-6)
    coordinates, expected = MixedCoordinates(molecule, trajectory), MixedCoordinates(molecule, frames)
    torch.testing.assert_close(coordinates(trajectory)[0], expected(frames)[0])
    torch.testing.assert_close(OpenMMEnergy(molecule, 600)(trajectory), OpenMMEnergy(molecule, 600)(frames))

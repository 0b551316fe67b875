"""Positions, temperatures and times in all of OpenMM's own forms."""

import io
import math

import numpy as np
import pytest
import torch

pytest.importorskip("openmm")
pytest.importorskip("tqdm")

import openmm
from openmm import Vec3, app, unit

from p4flows.molecules import MixedCoordinates, OpenMMEnergy, sampling, simulate


def forms(x):
    """Positions x, (n, 3) in nm, in every form that OpenMM gives or takes."""
    vectors = [Vec3(*row) for row in x]
    return {
        "array": x,
        "nested lists": x.tolist(),
        "vectors": vectors,
        "tuple of vectors": tuple(vectors),
        "array in angstrom": 10 * x * unit.angstrom,
        "array in nm": unit.Quantity(x, unit.nanometer),
        "lists in angstrom": (10 * x).tolist() * unit.angstrom,
        "vectors in nm": vectors * unit.nanometer,
        "vectors in pm": [1000 * v for v in vectors] * unit.picometer,
        "list of quantities": [v * unit.nanometer for v in vectors],
        "list of mixed quantities": [10 * v * unit.angstrom for v in vectors[:3]]
        + [v * unit.nanometer for v in vectors[3:]],
        "numbers with units": [[a * unit.nanometer for a in row] for row in x.tolist()],
        "array of quantities": np.array([[a * unit.nanometer for a in row] for row in x.tolist()], dtype=object),
    }


@pytest.fixture
def settings(monkeypatch):
    """What would be simulated."""
    asked = []

    def record(settings, frames, workers, place, progress, executor):
        asked.append(settings)
        return np.zeros((frames, 22, 3)), {}

    monkeypatch.setattr(sampling, "_simulate", record)
    return asked


@pytest.mark.parametrize("form", forms(np.zeros((4, 3))))
def test_simulations_start_from_positions_in_any_form(molecule, settings, tmp_path, form):
    simulate(molecule.system, 300, 1, positions=forms(molecule.positions)[form], cache=tmp_path)
    np.testing.assert_allclose(settings[0]["positions"], molecule.positions, atol=1e-12)


def test_simulations_start_from_files_and_states(molecule, settings, tmp_path):
    file = io.StringIO()
    app.PDBFile.writeFile(molecule.topology, molecule.positions * unit.nanometer, file)
    file.seek(0)
    pdb = app.PDBFile(file)
    platform = openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(molecule.system, openmm.VerletIntegrator(0.001), platform)
    context.setPositions(pdb.positions)
    state = context.getState(getPositions=True)
    modeller = app.Modeller(pdb.topology, pdb.positions)
    given = [pdb.positions, pdb.getPositions(asNumpy=True), modeller.positions, state.getPositions()]
    for i, positions in enumerate([*given, state.getPositions(asNumpy=True)]):
        simulate(molecule.system, 300, 1, positions=positions, cache=tmp_path / str(i))
        np.testing.assert_allclose(settings[-1]["positions"], molecule.positions, atol=1e-4)


@pytest.mark.parametrize("form", forms(np.zeros((4, 3))))
def test_energies_take_positions_in_any_form(molecule, energy, form):
    x = molecule.positions
    u = energy(torch.from_numpy(x))
    torch.testing.assert_close(energy(forms(x)[form]), u)


def test_numpy_arrays_keep_their_type(molecule, energy, frames):
    arrays = frames[:5].numpy(), frames[:5].double().numpy()
    for array in arrays:
        array.flags.writeable = False  # as those of a memory-mapped file
        u = energy(array[::-1])
        assert u.dtype == torch.from_numpy(array.copy()).dtype
        torch.testing.assert_close(u.float(), energy(frames[:5]).flip(0), rtol=1e-4, atol=1e-3)
    big = energy(arrays[1].astype(">f8"))
    torch.testing.assert_close(big, energy(frames[:5].double()))
    coordinates = MixedCoordinates(molecule.z_matrix, molecule.rigid_block, frames.numpy())
    expected = MixedCoordinates(molecule.z_matrix, molecule.rigid_block, frames)
    torch.testing.assert_close(coordinates(arrays[0])[0], expected(frames[:5])[0])
    with pytest.raises(ValueError, match=r"positions: expected .*int64"):
        energy(np.zeros((22, 3), dtype=np.int64))


def test_trajectories_with_units_fit_coordinates(molecule, frames):
    expected = MixedCoordinates(molecule.z_matrix, molecule.rigid_block, frames.double())
    quantity = unit.Quantity(10 * frames.double().numpy(), unit.angstrom)
    coordinates = MixedCoordinates(molecule.z_matrix, molecule.rigid_block, quantity)
    torch.testing.assert_close(coordinates.mean, expected.mean)
    torch.testing.assert_close(coordinates(quantity)[0], expected(frames.double())[0])


def test_temperatures_and_times(molecule, settings, tmp_path):
    energy = OpenMMEnergy(molecule.system, 300 * unit.kelvin, workers=0, timeout=2 * unit.minute)
    assert energy.kT == pytest.approx(OpenMMEnergy(molecule.system, 300).kT)
    assert energy.temperature == 300
    assert energy.timeout == 120
    simulate(
        molecule,
        300 * unit.kelvin,
        1,
        0.1 * unit.picosecond,
        equilibration=2 * unit.picoseconds,
        cache=tmp_path,
    )
    assert settings[0]["temperature"] == pytest.approx(300)
    assert settings[0]["stride"] == 100
    assert settings[0]["equilibration"] == 2_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 300 * unit.nanometer}, "temperature: expected a quantity in kelvin, got one in nanometer"),
        ({"temperature": -1 * unit.kelvin}, "temperature: expected a finite number > 0"),
        ({"temperature": math.nan * unit.kelvin}, "temperature: expected a finite number > 0"),
        ({"stride": 100 * unit.kelvin}, "stride: expected a quantity in femtosecond, got one in kelvin"),
        ({"stride": 0.5 * unit.femtosecond}, "stride: expected a whole number of time steps of 1.0 fs, got 0.5 fs"),
        ({"stride": [1.0, 2.0] * unit.femtosecond}, "stride: expected a whole number of time steps"),
        ({"stride": 0 * unit.femtosecond}, "stride: expected an integer >= 1"),
        ({"equilibration": -1.0 * unit.picosecond}, "equilibration: expected an integer >= 0"),
        ({"positions": np.zeros((22, 3)) * unit.kelvin}, "positions: expected a quantity in nanometer, got one in kel"),
        ({"positions": [Vec3(0, 0, 0) * unit.kelvin] * 22}, "positions: expected a quantity in nanometer"),
        ({"positions": [Vec3(0, 0, 0)] * 21}, r"positions: expected finite \(22, 3\), got shape \(21, 3\)"),
        ({"positions": [Vec3(0, 0, 0), 1.0]}, "positions: expected numbers"),
    ],
)
def test_wrong_units(molecule, tmp_path, arguments, message):
    given = {"system": molecule.system, "temperature": 300, "frames": 1, "positions": molecule.positions}
    with pytest.raises(ValueError, match=message):
        simulate(**{**given, "cache": tmp_path, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 300 * unit.nanometer}, "temperature: expected a quantity in kelvin"),
        ({"timeout": 1 * unit.kelvin}, "timeout: expected a quantity in second"),
        ({"e_high": 1 * unit.kilojoule_per_mole, "e_max": 2.0}, "e_high: expected a finite number"),
    ],
)
def test_wrong_units_of_an_energy(molecule, arguments, message):
    with pytest.raises(ValueError, match=message):
        OpenMMEnergy(**{"system": molecule.system, "temperature": 300, **arguments})
    with pytest.raises(ValueError, match="positions: expected a quantity in nanometer"):
        OpenMMEnergy(molecule.system, 300)(molecule.positions * unit.kelvin)

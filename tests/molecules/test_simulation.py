"""Molecular dynamics and its cache."""

import time

import numpy as np
import pytest
import torch

pytest.importorskip("openmm")
pytest.importorskip("tqdm")

import openmm

from p4flows.molecules import alanine_dipeptide, simulate


def md(molecule, cache, **options):
    settings = {"stride": 2, "equilibration": 10, "progress": False, "positions": molecule.positions, **options}
    return simulate(molecule.system, 600, 520, cache=cache, **settings)


def test_simulation_is_cached_by_its_arguments(molecule, tmp_path, in_threads):
    x = md(molecule, tmp_path)
    assert x.shape == (520, 22, 3)
    assert x.dtype == np.float32
    start = time.monotonic()
    assert np.array_equal(md(molecule, tmp_path), x)
    assert time.monotonic() - start < 1
    assert not np.array_equal(md(molecule, tmp_path, seed=1, executor=in_threads)[:100], x[:100])
    assert len([*(tmp_path / "md").iterdir()]) == 2
    assert not np.array_equal(x[:260], x[260:])  # two trajectories


def test_a_molecule_brings_its_positions(molecule, tmp_path, in_threads):
    options = {"stride": 1, "equilibration": 0, "executor": in_threads, "progress": False}
    x = simulate(molecule, 300, 5, cache=tmp_path / "a", **options)
    system, positions = molecule.system, molecule.positions
    assert np.array_equal(x, simulate(system, 300, 5, positions=positions, cache=tmp_path / "b", **options))


def test_an_interrupted_simulation_goes_on_to_the_same_frames(molecule, tmp_path, monkeypatch, in_threads):
    from p4flows.molecules import sampling

    whole = md(molecule, tmp_path / "whole", workers=1, executor=in_threads)

    def interrupted(jobs, bar):
        while not [*(tmp_path / "part").rglob("chain-0-0.npy")]:
            time.sleep(0.01)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sampling, "_follow", interrupted)
        with pytest.raises(KeyboardInterrupt):
            md(molecule, tmp_path / "part", workers=1)
    assert not [*(tmp_path / "part").rglob("frames.npy")]
    assert np.array_equal(md(molecule, tmp_path / "part", workers=1), whole)


def test_kinetic_and_potential_energies_are_those_of_the_temperature(energy, frames):
    u = energy(frames).double()
    # Equipartition: about half a kT for each of the 60 internal degrees of freedom above the minimum.
    minimum = energy(torch.from_numpy(alanine_dipeptide().positions))
    assert 25 < u.mean() - minimum < 37


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frames": 0}, "frames: expected an integer >= 1"),
        ({"stride": 1.5}, "stride"),
        ({"workers": 0}, "workers"),
        ({"temperature": 0}, "temperature"),
        ({"positions": np.zeros((21, 3))}, r"positions: expected finite \(22, 3\)"),
        ({"positions": np.full((22, 3), np.nan)}, "positions: expected finite"),
        ({"system": None}, r"system: expected an openmm.System or a Molecule"),
        ({"positions": None}, "positions: expected .*since a System has none"),
    ],
)
def test_wrong_simulation_arguments(molecule, tmp_path, arguments, message):
    given = {
        "system": molecule.system,
        "temperature": 300,
        "frames": 1,
        "positions": molecule.positions,
        "cache": tmp_path,
        **arguments,
    }
    with pytest.raises(ValueError, match=message):
        simulate(**given)


def test_an_exploding_simulation_is_an_error(molecule, tmp_path):
    system = openmm.System()
    for _ in range(22):
        system.addParticle(1.0)
    force = openmm.CustomExternalForce("sqrt(-1 - x^2)")
    force.addParticle(0, [])
    system.addForce(force)
    with pytest.raises(RuntimeError, match="molecular dynamics failed: "):
        simulate(system, 300, 300, positions=molecule.positions, workers=1, cache=tmp_path, progress=False)

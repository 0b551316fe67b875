"""Simulations at several temperatures, alone and with exchange."""

import json
import math
import time

import numpy as np
import pytest

pytest.importorskip("openmm")
pytest.importorskip("tqdm")

import openmm
from openmm import unit

from p4flows.molecules import simulate
from p4flows.molecules.thermostat import Thermostat

R = 8.31446261815324e-3
OPTIONS = {"stride": 4, "equilibration": 20, "progress": False}


def test_several_temperatures_are_simulations_of_their_own(molecule, tmp_path, in_threads):
    options = {**OPTIONS, "executor": in_threads, "cache": tmp_path}
    x = simulate(molecule, [300, 600], 40, **options)
    assert x.shape == (2, 40, 22, 3)
    assert len([*(tmp_path / "md").iterdir()]) == 2
    for temperature, frames in zip((300.0, 600 * unit.kelvin), x, strict=True):
        start = time.monotonic()
        assert np.array_equal(simulate(molecule, temperature, 40, **options), frames)
        assert time.monotonic() - start < 1
    for given in ([300, 600] * unit.kelvin, np.array([300.0, 600.0]), (300 * unit.kelvin, 600)):
        assert np.array_equal(simulate(molecule, given, 40, **options), x)
    assert simulate(molecule, [300], 40, **options).shape == (1, 40, 22, 3)
    assert len([*(tmp_path / "md").iterdir()]) == 2


def test_exchanges_are_cached_described_and_told(molecule, tmp_path, in_threads, capfd):
    options = {**OPTIONS, "executor": in_threads, "exchange": 10, "cache": tmp_path, "progress": True}
    x = simulate(molecule, [300, 330, 360], 60, **options)
    assert x.shape == (3, 60, 22, 3)
    (folder,) = (tmp_path / "md").iterdir()
    about = json.loads((folder / "about.json").read_text())
    assert about["temperature"] == [300, 330, 360]
    assert (about["exchange"], about["frames"], about["atoms"]) == (10, 60, 22)
    assert len(about["accepted"]) == 2
    assert all(0 < share <= 1 for share in about["accepted"])
    said = capfd.readouterr().err
    assert f"60 frames at 300, 330, 360 K, 0.0 MB, kept in {folder}; accepted swaps: " in said
    assert np.array_equal(simulate(molecule, [300, 330, 360], 60, **options), x)
    assert f"read from {folder}" in capfd.readouterr().err
    assert np.array_equal(simulate(molecule, [300, 330, 360], 60, **{**options, "exchange": 10 * unit.femtosecond}), x)


def test_an_interrupted_exchange_goes_on_to_the_same_frames(molecule, tmp_path, monkeypatch, in_threads):
    from p4flows.molecules import sampling

    options = {**OPTIONS, "exchange": 6, "workers": 1}
    whole = simulate(molecule, [300, 330], 520, cache=tmp_path / "whole", executor=in_threads, **options)

    def interrupted(jobs, bar):
        while not [*(tmp_path / "part").rglob("chain-0-0.npy")]:
            time.sleep(0.01)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sampling, "_follow", interrupted)
        with pytest.raises(KeyboardInterrupt):
            simulate(molecule, [300, 330], 520, cache=tmp_path / "part", **options)
    assert np.array_equal(simulate(molecule, [300, 330], 520, cache=tmp_path / "part", **options), whole)
    about = [json.loads(next((tmp_path / part).rglob("about.json")).read_text()) for part in ("whole", "part")]
    assert about[0] == about[1]


def double_well(barrier, tilt):
    """One particle in x: barrier * (x² - 1)² + tilt * x, in units of 0.1 nm; harmonic in y and z."""
    system = openmm.System()
    system.addParticle(40.0)
    force = openmm.CustomExternalForce(f"{barrier} * ((x / 0.1)^2 - 1)^2 + {tilt} * x / 0.1 + 2000 * (y^2 + z^2)")
    force.addParticle(0, [])
    system.addForce(force)
    return system


def mean_sign(barrier, tilt, temperature):
    s = np.linspace(-2.5, 2.5, 20_001)
    w = np.exp(-(barrier * (s**2 - 1) ** 2 + tilt * s) / (R * temperature))
    return (w * np.sign(s)).sum() / w.sum()


def test_exchange_samples_each_temperature(tmp_path, in_threads):
    """A barrier of 16 kT at 300 K: the cold replica crosses it by way of the hot one, and the populations are right."""
    barrier, tilt = 40.0, 1.2
    temperatures = [300, 500, 900, 1700]
    options = {"positions": [[-0.1, 0, 0]], "stride": 200, "equilibration": 5_000, "cache": tmp_path, "progress": False}
    options["executor"] = in_threads
    system = double_well(barrier, tilt)
    x = simulate(system, temperatures, 6_000, exchange=100, time_step=2.0, **options)
    for temperature, frames in zip(temperatures, x[..., 0, 0], strict=True):
        signs = np.sign(frames).reshape(40, -1).mean(1)
        error = signs.std() / math.sqrt(40)
        assert error < 0.1
        assert signs.mean() == pytest.approx(mean_sign(barrier, tilt, temperature), abs=4 * error)
    alone = simulate(system, 300, 6_000, time_step=2.0, **options)
    assert (alone[:, 0, 0] < 0).all()  # without exchange it never crosses


def test_swaps_follow_metropolis(molecule):
    """A swap scales velocities with the temperature, so that both copies stay at equilibrium."""
    settings = {"system": openmm.XmlSerializer.serialize(molecule.system), "seed": 0}
    copy = Thermostat(settings, 300, [0])
    copy.start(molecule.positions.tolist())
    kinetic = copy.context.getState(getEnergy=True).getKineticEnergy()._value
    copy.heat(600)
    assert copy.context.getState(getEnergy=True).getKineticEnergy()._value == pytest.approx(2 * kinetic, rel=1e-6)
    assert copy.integrator.getTemperature()._value == 600


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": []}, "temperature: expected at least one, got none"),
        ({"temperature": [300, -1]}, "temperature: expected a finite number > 0, got -1"),
        ({"temperature": [300, "hot"]}, "temperature: expected a finite number > 0, got 'hot'"),
        ({"temperature": 300, "exchange": 10}, "temperature: expected several for an exchange, got 300"),
        ({"temperature": [300], "exchange": 10}, "temperature: expected several in ascending order"),
        ({"temperature": [600, 300], "exchange": 10}, "temperature: expected several in ascending order"),
        ({"temperature": [300, 600], "exchange": 0}, "exchange: expected an integer >= 1"),
        (
            {"temperature": [300, 600], "exchange": 30, "stride": 10, "equilibration": 40},
            "exchange: expected two attempts or more in the 50 steps of a trajectory, got one every 30 steps",
        ),
        ({"temperature": [300, 600], "exchange": 0.5 * unit.femtosecond}, "exchange: expected a whole number"),
        ({"temperature": 300, "time_step": 0}, "time_step: expected a finite number > 0"),
        ({"temperature": 300, "time_step": 2 * unit.kelvin}, "time_step: expected a quantity in femtosecond"),
        ({"temperature": 300, "platform": "Abacus"}, "platform: expected one of .*Reference"),
    ],
)
def test_wrong_arguments(molecule, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        simulate(molecule, frames=1, cache=tmp_path, **arguments)

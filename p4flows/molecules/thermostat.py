"""An OpenMM context at constant temperature, started from a minimum of the energy."""

from __future__ import annotations

import math

import numpy as np
import openmm
from openmm import unit

__all__ = ["TIME_STEP", "Thermostat"]

TIME_STEP = 1.0  # fs, by default


class Thermostat:
    """Langevin-middle dynamics of one copy of a system, with friction 1/ps.

    Args:
        settings: those of a simulation; see :func:`p4flows.molecules.simulate`.
        temperature: in kelvin.
        stream: integers that tell this copy from others with the same seed.
    """

    def __init__(self, settings: dict, temperature: float, stream: list[int]) -> None:
        self.temperature = temperature
        step = settings.get("time_step", TIME_STEP) * unit.femtosecond
        self.integrator = openmm.LangevinMiddleIntegrator(temperature, 1 / unit.picosecond, step)
        # OpenMM takes 0 for "choose a random one".
        noise = np.random.SeedSequence([settings["seed"], *stream]).generate_state(1)[0]
        self._noise = int(noise % (2**31 - 2)) + 1
        self.integrator.setRandomNumberSeed(self._noise)
        platform = settings.get("platform", "Reference")
        self.context = openmm.Context(
            openmm.XmlSerializer.deserialize(settings["system"]),
            self.integrator,
            openmm.Platform.getPlatformByName(platform),
            {"Threads": "1"} if platform == "CPU" else {},  # each worker has a core
        )

    def start(self, positions: list) -> None:
        """Minimise the energy, and draw velocities."""
        self.context.setPositions(np.array(positions))
        self.context.computeVirtualSites()
        energy = self.energy()
        if not math.isfinite(energy):  # the minimiser would never return
            raise ValueError(f"the energy of the starting positions is {energy}")
        openmm.LocalEnergyMinimizer.minimize(self.context)
        self.context.setVelocitiesToTemperature(self.temperature, self._noise)

    def step(self, steps: int) -> None:
        self.integrator.step(steps)

    def energy(self) -> float:
        """The potential energy in kJ/mol."""
        return self.context.getState(getEnergy=True).getPotentialEnergy()._value

    def positions(self) -> np.ndarray:
        """(n_atoms, 3) float32 in nm."""
        return self.context.getState(getPositions=True).getPositions(asNumpy=True)._value.astype(np.float32)

    def heat(self, temperature: float) -> None:
        """Go on at another temperature, with velocities scaled to it."""
        velocities = self.context.getState(getVelocities=True).getVelocities(asNumpy=True)._value
        self.context.setVelocities(velocities * math.sqrt(temperature / self.temperature))
        self.set_temperature(temperature)

    def set_temperature(self, temperature: float) -> None:
        self.temperature = temperature
        self.integrator.setTemperature(temperature)

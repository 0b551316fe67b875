"""Replica exchange: copies of a system at several temperatures, which swap them now and then (Sugita, Okamoto 1999)."""

from __future__ import annotations

import math
import pickle

import numpy as np

from p4flows.molecules.thermostat import Thermostat

__all__ = ["Replicas"]

_GAS_CONSTANT = 8.31446261815324e-3  # kJ/mol/K


class Replicas:
    r"""One copy for each temperature; copies of neighbouring temperatures try to swap every ``exchange`` steps.

    A swap of copies with energies :math:`U_i, U_j` is accepted with probability
    :math:`\min(1, \exp((\beta_i - \beta_j)(U_i - U_j)))`, and their velocities are scaled to the new temperatures.
    Even and odd pairs of neighbours take turns.

    Args:
        settings: those of a simulation, with ``temperature``, a list in ascending order, and ``exchange``, in steps.
        chain: which of several runs with the same seed this is.
    """

    def __init__(self, settings: dict, chain: int) -> None:
        self._temperatures = settings["temperature"]
        self._every, self._key = settings["exchange"], [settings["seed"], chain]
        self._copies = [Thermostat(settings, t, [chain, i]) for i, t in enumerate(self._temperatures)]
        self._at = list(range(len(self._copies)))  # the copy that is at each temperature
        self._steps = 0
        self._tried, self._accepted = np.zeros((2, len(self._copies) - 1), dtype=int)

    def start(self, positions: list, equilibration: int) -> None:
        """Minimise and equilibrate, with swaps."""
        for copy in self._copies:
            copy.start(positions)
        self._advance(equilibration)

    def frame(self, stride: int) -> np.ndarray:
        """The positions at each temperature, (temperatures, n_atoms, 3), after another ``stride`` steps."""
        self._advance(stride)
        return np.stack([self._copies[i].positions() for i in self._at])

    def summary(self) -> dict:
        """The accepted share of swaps between neighbouring temperatures, (temperatures - 1,)."""
        return {"accepted": self._accepted / np.maximum(self._tried, 1)}

    def save(self) -> bytes:
        contexts = [copy.context.createCheckpoint() for copy in self._copies]
        return pickle.dumps((contexts, self._at, self._steps, self._tried, self._accepted))

    def load(self, checkpoint: bytes) -> None:
        contexts, self._at, self._steps, self._tried, self._accepted = pickle.loads(checkpoint)
        for temperature, i in zip(self._temperatures, self._at, strict=True):
            self._copies[i].context.loadCheckpoint(contexts[i])
            self._copies[i].set_temperature(temperature)

    def _advance(self, steps: int) -> None:
        end = self._steps + steps
        while self._steps < end:
            now = min(end, (self._steps // self._every + 1) * self._every) - self._steps
            for copy in self._copies:
                copy.step(now)
            self._steps += now
            if self._steps % self._every == 0:
                self._swap(self._steps // self._every)

    def _swap(self, attempt: int) -> None:
        # By the number of the attempt, so that a run that goes on from a checkpoint draws the same numbers.
        draws = np.random.default_rng([*self._key, attempt]).random(len(self._tried))
        energies = [copy.energy() for copy in self._copies]
        for i in range(attempt % 2, len(self._tried), 2):
            cold, hot = self._at[i], self._at[i + 1]
            low, high = self._temperatures[i : i + 2]
            exponent = (1 / low - 1 / high) / _GAS_CONSTANT * (energies[cold] - energies[hot])
            self._tried[i] += 1
            if draws[i] < math.exp(min(0.0, exponent)):
                self._accepted[i] += 1
                self._copies[cold].heat(high)
                self._copies[hot].heat(low)
                self._at[i : i + 2] = [hot, cold]

"""OpenMM energies as bgflow energies."""

from __future__ import annotations

from typing import Any

from bgflow import Energy
from torch import Tensor

__all__ = ["as_bgflow_energy"]


def as_bgflow_energy(energy: Any) -> Energy:
    """An ``OpenMMEnergy`` as a ``bgflow.Energy``: positions (..., 3 n_atoms) in nm to energies (..., 1) in kT.

    Its ``energy(x, temperature=T)`` divides by T, which is in units of the energy's own temperature.
    """
    if not isinstance(getattr(energy, "n_atoms", None), int) or not callable(energy):
        raise ValueError(f"energy: expected a p4flows.molecules.OpenMMEnergy, got {type(energy).__name__}")
    return _BridgedEnergy(energy)


class _BridgedEnergy(Energy):
    def __init__(self, energy: Any) -> None:
        super().__init__(3 * energy.n_atoms)
        self.bridge = energy

    def _energy(self, x: Tensor) -> Tensor:
        return self.bridge(x)[..., None]

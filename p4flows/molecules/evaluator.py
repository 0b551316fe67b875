"""Potential energies and forces of batches of positions, by one OpenMM context in this process."""

from __future__ import annotations

import numpy as np
import openmm

__all__ = ["Evaluator"]


class Evaluator:
    """One OpenMM context; energies in kJ/mol and forces in kJ/mol/nm of positions in nm, frame by frame.

    Virtual sites are put where their parent atoms say before an energy is computed, so that the energy does not
    depend on the given positions of the sites. Their forces act on the parent atoms, and are zero on the sites.

    Not thread safe, and of no use in a forked process: see :class:`p4flows.molecules.ownership.Owner`.
    """

    def __init__(self, system_xml: str, platform: str) -> None:
        system = openmm.XmlSerializer.deserialize(system_xml)
        self._sites = [i for i in range(system.getNumParticles()) if system.isVirtualSite(i)]
        # A single thread: workers share the cores, and for small molecules threads cost more than they save.
        properties = {"Threads": "1"} if platform == "CPU" else {}
        self._integrator = openmm.VerletIntegrator(0.001)
        self._context = openmm.Context(
            system, self._integrator, openmm.Platform.getPlatformByName(platform), properties
        )

    def __call__(self, positions: np.ndarray, energies: np.ndarray, forces: np.ndarray | None) -> None:
        """Fill energies (B,), and forces (B, n, 3) unless None, for finite positions (B, n, 3)."""
        context = self._context
        for i, frame in enumerate(positions):
            context.setPositions(frame)
            if self._sites:
                context.computeVirtualSites()
            state = context.getState(getEnergy=True, getForces=forces is not None)
            # Numbers in kJ/mol and nm: objects with units would cost a third of the time of the forces.
            energies[i] = state.getPotentialEnergy()._value
            if forces is not None:
                state._getVectorAsNumpy(openmm.State.Forces, forces[i])
        if forces is not None and self._sites:
            forces[:, self._sites] = 0

    def close(self) -> None:
        """Delete the context."""
        del self._context, self._integrator

    def abandon(self) -> None:
        """Never delete the context: after a fork, its destructor would wait for threads that are not there."""
        self._context.thisown = self._integrator.thisown = False

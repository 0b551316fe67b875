"""Potential energies and forces of batches of positions: one OpenMM context, in this process or in workers."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
import openmm

__all__ = ["Evaluator", "WorkerPool", "spawn"]


class Evaluator:
    """One OpenMM context; energies in kJ/mol and forces in kJ/mol/nm of positions in nm, frame by frame."""

    def __init__(self, system_xml: str, platform: str) -> None:
        system = openmm.XmlSerializer.deserialize(system_xml)
        # A single thread: workers share the cores, and for small molecules threads cost more than they save.
        properties = {"Threads": "1"} if platform == "CPU" else {}
        self._integrator = openmm.VerletIntegrator(0.001)
        self._context = openmm.Context(
            system, self._integrator, openmm.Platform.getPlatformByName(platform), properties
        )

    def __call__(self, positions: np.ndarray, forces: bool) -> tuple[np.ndarray, np.ndarray | None]:
        """positions (B, n, 3), finite; energies (B,) and forces (B, n, 3) or None."""
        energies = np.empty(len(positions))
        all_forces = np.empty(positions.shape) if forces else None
        context = self._context
        for i, frame in enumerate(positions):
            context.setPositions(frame)
            state = context.getState(getEnergy=True, getForces=forces)
            # Numbers in kJ/mol and nm: objects with units would cost a third of the time of the forces.
            energies[i] = state.getPotentialEnergy()._value
            if all_forces is not None:
                state._getVectorAsNumpy(openmm.State.Forces, all_forces[i])
        return energies, all_forces


def spawn(target: Callable[..., None], *arguments: Any) -> tuple[multiprocessing.Process, Connection]:
    """Start ``target(connection, *arguments)`` in a new interpreter; the process and our end of the connection.

    Spawned, not forked: OpenMM's threads do not survive a fork.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    return process, ours


class WorkerPool:
    """Spawned processes with an :class:`Evaluator` each, which receive whole chunks of a batch."""

    def __init__(self, workers: int, system_xml: str, platform: str) -> None:
        self._workers = [spawn(_serve, system_xml, platform) for _ in range(workers)]

    def __call__(
        self, positions: np.ndarray, forces: bool, timeout: float | None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """As :class:`Evaluator`. Raises RuntimeError for an error in a worker, its death or a time-out."""
        deadline = None if timeout is None else time.monotonic() + timeout
        chunks = np.array_split(positions, len(self._workers))
        try:
            for (_, connection), chunk in zip(self._workers, chunks, strict=True):
                connection.send((chunk, forces))
            results = [self._receive(*worker, deadline, timeout) for worker in self._workers]
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise RuntimeError("an OpenMM worker died") from None
        energies, all_forces = zip(*results, strict=True)
        return np.concatenate(energies), np.concatenate(all_forces) if forces else None

    @staticmethod
    def _receive(
        process: multiprocessing.Process, connection: Connection, deadline: float | None, timeout: float | None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        left = None if deadline is None else max(deadline - time.monotonic(), 0)
        ready = wait([connection, process.sentinel], left)
        if not ready:
            raise RuntimeError(f"an OpenMM worker did not answer within {timeout} s")
        if connection not in ready and not connection.poll():
            raise EOFError
        answer = connection.recv()
        if isinstance(answer, Exception):
            raise RuntimeError(f"an OpenMM worker failed: {answer}") from answer
        return answer

    def close(self) -> None:
        """End the processes and wait for them. Calling it again does nothing."""
        for process, connection in self._workers:
            connection.close()
            process.terminate()
        for process, _ in self._workers:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()
        self._workers = []


def _serve(connection: Connection, system_xml: str, platform: str) -> None:
    evaluator = None
    while True:
        try:
            positions, forces = connection.recv()
        except (EOFError, OSError):
            return
        try:
            evaluator = evaluator or Evaluator(system_xml, platform)
            answer = evaluator(positions, forces)
        except Exception as error:  # whatever it is, the caller gets to see it
            answer = RuntimeError(f"{type(error).__name__}: {error}")
        connection.send(answer)

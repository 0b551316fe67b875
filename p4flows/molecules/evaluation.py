"""Potential energies and forces of batches of positions: one OpenMM context, in this process or in workers."""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
import openmm
import torch

__all__ = ["Evaluator", "WorkerPool", "spawn"]

_SHARED_BYTES = 4_000_000  # with each worker; containers often have 64 MB in all


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

    def __call__(self, positions: np.ndarray, energies: np.ndarray, forces: np.ndarray | None) -> None:
        """Fill energies (B,), and forces (B, n, 3) unless None, for finite positions (B, n, 3)."""
        context = self._context
        for i, frame in enumerate(positions):
            context.setPositions(frame)
            state = context.getState(getEnergy=True, getForces=forces is not None)
            # Numbers in kJ/mol and nm: objects with units would cost a third of the time of the forces.
            energies[i] = state.getPotentialEnergy()._value
            if forces is not None:
                state._getVectorAsNumpy(openmm.State.Forces, forces[i])


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
    """Spawned processes with an :class:`Evaluator` each, to whom chunks of a batch go through shared memory."""

    def __init__(self, workers: int, system_xml: str, platform: str, n_atoms: int) -> None:
        self._workers = [_Worker(system_xml, platform, n_atoms) for _ in range(workers)]

    def __call__(
        self, positions: np.ndarray, energies: np.ndarray, forces: np.ndarray | None, timeout: float | None
    ) -> None:
        """As :class:`Evaluator`. Raises RuntimeError for an error in a worker, its death or a time-out."""
        deadline = None if timeout is None else time.monotonic() + timeout
        size = max(1, min(self._workers[0].frames, math.ceil(len(positions) / len(self._workers))))
        waiting = [slice(start, start + size) for start in range(0, len(positions), size)]
        idle, busy = list(self._workers), {}
        try:
            while waiting or busy:
                while idle and waiting:
                    worker, rows = idle.pop(), waiting.pop()
                    worker.send(positions[rows], forces is not None)
                    busy[worker.connection] = worker, rows
                left = None if deadline is None else max(deadline - time.monotonic(), 0)
                ready = wait(list(busy), left)
                if not ready:
                    raise RuntimeError(f"an OpenMM worker did not answer within {timeout} s")
                for connection in ready:
                    worker, rows = busy.pop(connection)
                    worker.receive(energies[rows], None if forces is None else forces[rows])
                    idle.append(worker)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise RuntimeError("an OpenMM worker died") from None

    def close(self) -> None:
        """End the processes and wait for them. Calling it again does nothing."""
        for worker in self._workers:
            worker.connection.close()
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join(5)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.process.close()
        self._workers = []


class _Worker:
    """A process with an :class:`Evaluator`, and the memory that it shares with this one."""

    def __init__(self, system_xml: str, platform: str, n_atoms: int) -> None:
        self.frames = max(1, _SHARED_BYTES // (8 * (6 * n_atoms + 1)))
        shapes = (self.frames, n_atoms, 3), (self.frames,), (self.frames, n_atoms, 3)
        shared = [torch.empty(shape, dtype=torch.float64).share_memory_() for shape in shapes]
        self._positions, self._energies, self._forces = (t.numpy() for t in shared)
        self.process, self.connection = spawn(_serve, system_xml, platform, *shared)

    def send(self, positions: np.ndarray, forces: bool) -> None:
        self._positions[: len(positions)] = positions
        self.connection.send((len(positions), forces))

    def receive(self, energies: np.ndarray, forces: np.ndarray | None) -> None:
        answer = self.connection.recv()
        if isinstance(answer, Exception):
            raise RuntimeError(f"an OpenMM worker failed: {answer}") from answer
        energies[:] = self._energies[: len(energies)]
        if forces is not None:
            forces[:] = self._forces[: len(forces)]


def _serve(connection: Connection, system_xml: str, platform: str, *shared: torch.Tensor) -> None:
    positions, energies, all_forces = (t.numpy() for t in shared)
    evaluator = None
    while True:
        try:
            count, forces = connection.recv()
        except (EOFError, OSError):
            return
        answer = None
        try:
            evaluator = evaluator or Evaluator(system_xml, platform)
            evaluator(positions[:count], energies[:count], all_forces[:count] if forces else None)
        except Exception as error:  # whatever it is, the caller gets to see it
            answer = RuntimeError(f"{type(error).__name__}: {error}")
        connection.send(answer)

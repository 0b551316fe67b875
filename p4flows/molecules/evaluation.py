"""Potential energies and forces of batches of positions, by worker processes with an OpenMM context each."""

from __future__ import annotations

import math
import zlib
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
import torch

from p4flows.molecules.evaluator import Evaluator
from p4flows.molecules.ownership import Deadline
from p4flows.molecules.processes import disinherit, obituary, spawn

__all__ = ["WorkerPool"]

_SHARED_BYTES = 4_000_000  # with each worker; containers often have 64 MB in all


class WorkerPool:
    """Spawned processes with an :class:`Evaluator` each, to whom chunks of a batch go through shared memory.

    Not thread safe, and of no use in a forked process: see :class:`p4flows.molecules.ownership.Owner`.
    """

    def __init__(self, workers: int, system_xml: str, platform: str, n_atoms: int) -> None:
        # In shared memory too: as an argument, a system of more than 64 kB would keep us waiting for a slow start.
        packed = bytearray(zlib.compress(system_xml.encode(), 1))
        system = torch.frombuffer(packed, dtype=torch.uint8).clone().share_memory_()
        self._workers = [_Worker(system, platform, n_atoms) for _ in range(workers)]

    def __call__(
        self, positions: np.ndarray, energies: np.ndarray, forces: np.ndarray | None, deadline: Deadline
    ) -> None:
        """As :class:`Evaluator`. Raises RuntimeError for an error in a worker, its death or a time-out."""
        size = max(1, min(self._workers[0].frames, math.ceil(len(positions) / len(self._workers))))
        waiting = [slice(start, start + size) for start in range(0, len(positions), size)]
        idle, busy = list(self._workers), dict[Connection, tuple[_Worker, slice]]()
        try:
            while waiting or busy:
                while idle and waiting:
                    worker, rows = idle.pop(), waiting.pop()
                    worker.send(positions[rows], forces is not None)
                    busy[worker.connection] = worker, rows
                ready: list[Any] = wait(list(busy), deadline.left)  # connections, as all that it was given
                if not ready:
                    raise RuntimeError(f"an OpenMM worker did not answer within {deadline.seconds} s")
                for connection in ready:
                    worker, rows = busy.pop(connection)
                    worker.receive(energies[rows], None if forces is None else forces[rows])
                    idle.append(worker)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise obituary("an OpenMM worker", worker.process, worker.started) from None

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

    def abandon(self) -> None:
        """Forget the processes, which belong to the process that this one was forked from."""
        for worker in self._workers:
            disinherit(worker.process)
            worker.connection.close()
        self._workers = []


class _Worker:
    """A process with an :class:`Evaluator`, and the memory that it shares with this one."""

    def __init__(self, system: torch.Tensor, platform: str, n_atoms: int) -> None:
        self.started = False
        self.frames = max(1, _SHARED_BYTES // (8 * (6 * n_atoms + 1)))
        shapes = (self.frames, n_atoms, 3), (self.frames,), (self.frames, n_atoms, 3)
        shared = [torch.empty(shape, dtype=torch.float64).share_memory_() for shape in shapes]
        self._positions, self._energies, self._forces = (t.numpy() for t in shared)
        self.process, self.connection = spawn(_serve, platform, system, *shared)

    def send(self, positions: np.ndarray, forces: bool) -> None:
        self._positions[: len(positions)] = positions
        self.connection.send((len(positions), forces))

    def receive(self, energies: np.ndarray, forces: np.ndarray | None) -> None:
        answer = self.connection.recv()
        self.started = True
        if isinstance(answer, Exception):
            raise RuntimeError(f"an OpenMM worker failed: {answer}") from answer
        energies[:] = self._energies[: len(energies)]
        if forces is not None:
            forces[:] = self._forces[: len(forces)]


def _serve(connection: Connection, platform: str, *shared: torch.Tensor) -> None:
    system, positions, energies, all_forces = (t.numpy() for t in shared)
    evaluator = None
    while True:
        try:
            count, forces = connection.recv()
        except (EOFError, OSError):
            return
        answer = None
        try:
            evaluator = evaluator or Evaluator(zlib.decompress(system.tobytes()).decode(), platform)
            evaluator(positions[:count], energies[:count], all_forces[:count] if forces else None)
        except Exception as error:  # whatever it is, the caller gets to see it
            answer = RuntimeError(f"{type(error).__name__}: {error}")
        connection.send(answer)

"""Energies and forces of batches of positions, by tasks that any executor of concurrent.futures runs."""

from __future__ import annotations

import hashlib
import math
import os
import threading
import zlib
from concurrent.futures import Executor, as_completed
from concurrent.futures import TimeoutError as FutureTimeoutError

import numpy as np

from p4flows.molecules.evaluator import Evaluator
from p4flows.molecules.ownership import Deadline

__all__ = ["TaskPool", "evaluate"]

_STRUCTURES = 256  # in a task, unless told otherwise: enough to pay for its way to another machine
_KEPT = 32  # idle contexts in a process


class TaskPool:
    """An executor, to which a batch goes in tasks; the executor decides where each of them runs.

    A task brings everything along that it needs, the system included, so that it can run anywhere, and again where
    the engine has lost a machine. Processes keep the contexts that they have made for the next task.

    Args:
        executor: belongs to the caller, who also shuts it down.
        tasks: into how many of them each batch is cut; 0 for tasks of 256 structures.
        pid: of the process that has the executor; no executor works in a fork of it.
    """

    def __init__(self, executor: Executor, tasks: int, system_xml: str, platform: str, pid: int) -> None:
        self._executor, self._tasks, self._pid = executor, tasks, pid
        self._system = zlib.compress(system_xml.encode(), 1)
        self._key = hashlib.sha256(self._system + platform.encode()).hexdigest()
        self._platform = platform

    def __call__(
        self, positions: np.ndarray, energies: np.ndarray, forces: np.ndarray | None, deadline: Deadline
    ) -> None:
        """As :class:`Evaluator`. Raises RuntimeError for an error in a task, a lost process or a time-out."""
        if os.getpid() != self._pid:
            raise RuntimeError("an executor cannot be used in a forked process; make an OpenMMEnergy without it there")
        size = math.ceil(len(positions) / self._tasks) if self._tasks else _STRUCTURES
        futures = {}
        try:
            for start in range(0, len(positions), size):
                rows = slice(start, start + size)
                arguments = self._key, self._system, self._platform, positions[rows], forces is not None
                futures[self._executor.submit(evaluate, *arguments)] = rows
            for future in as_completed(futures, timeout=deadline.left):
                rows = futures[future]
                energies[rows], found = future.result()
                if forces is not None:
                    forces[rows] = found
        except Exception as error:  # whatever the engine raises
            late = isinstance(error, FutureTimeoutError) and deadline.left == 0
            if late and not all(future.done() for future in futures):
                raise RuntimeError(f"the executor did not answer within {deadline.seconds} s") from None
            raise RuntimeError(f"a task of the executor failed: {type(error).__name__}: {error}") from error
        finally:
            for future in futures:
                future.cancel()

    def close(self) -> None:
        """Nothing to give back."""

    def abandon(self) -> None:
        """Nothing to forget."""


def evaluate(
    key: str, system: bytes, platform: str, positions: np.ndarray, forces: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """Energies (B,) in kJ/mol, and forces (B, n, 3) or None, by a context of this process that no other thread uses."""
    evaluator = _take(key) or Evaluator(zlib.decompress(system).decode(), platform)
    energies = np.empty(len(positions))
    found = np.empty(positions.shape) if forces else None
    evaluator(positions, energies, found)
    with _lock:
        _idle.append((key, evaluator))
        del _idle[:-_KEPT]
    return energies, found


_idle: list[tuple[str, Evaluator]] = []
_lock = threading.Lock()


def _take(key: str) -> Evaluator | None:
    with _lock:
        for i, (theirs, _) in enumerate(_idle):
            if theirs == key:
                return _idle.pop(i)[1]
    return None


def _after_fork_in_child() -> None:
    """Contexts do not survive a fork, and another thread may have held the lock."""
    global _lock
    _lock = threading.Lock()
    for _, evaluator in _idle:
        evaluator.abandon()
    _idle.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)

"""One trajectory of Langevin dynamics in a process of its own, with checkpoints that a later run goes on from."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import openmm

from p4flows.molecules.cache import save
from p4flows.molecules.replicas import Replicas
from p4flows.molecules.thermostat import Thermostat

__all__ = ["chunks", "run", "trajectory"]

_CHUNK = 250  # frames between checkpoints
# All contexts of the Reference platform in a process draw from one generator of random numbers, which knows no threads.
_turns = threading.Lock()


def chunks(folder: Path, chain: int, count: int) -> list[Path]:
    """The files that ``count`` frames of a chain are kept in until all chains are done."""
    return [folder / f"chain-{chain}-{start}.npy" for start in range(0, count, _CHUNK)]


def run(connection: Connection, chain: int, count: int, folder: str) -> None:
    """Receive settings, simulate, and send the numbers of new frames, then what there is to tell; or the error."""
    try:
        settings = connection.recv()
        simulation = _make(settings, chain)
        for done in _simulate_chain(simulation, settings, chain, count, Path(folder)):
            connection.send(done)
        connection.send(simulation.summary())
    except Exception as error:  # whatever it is, the caller gets to see it
        connection.send(RuntimeError(f"molecular dynamics failed: {type(error).__name__}: {error}"))


def trajectory(settings: dict, chain: int, count: int) -> tuple[np.ndarray, dict]:
    """The same frames in one go, without files: for processes on other machines. Frames (count, ...) and summary.

    In one process, trajectories of the Reference platform take turns.

    Raises:
        RuntimeError: where another version of OpenMM is installed than where the simulation was asked for.
    """
    if settings["openmm"] != openmm.version.version:  # the cache would keep the frames as those of the other one
        raise RuntimeError(f"expected OpenMM {settings['openmm']}, as its caller has, got {openmm.version.version}")
    with contextlib.nullcontext() if settings.get("platform") == "CPU" else _turns:
        simulation = _make(settings, chain)
        simulation.start(settings["positions"], settings["equilibration"])
        frames = np.stack([simulation.frame(settings["stride"]) for _ in range(count)])
        _check(frames)
        return frames, simulation.summary()


def _renew_lock() -> None:
    """In a forked child: a thread that the parent had, and the child does not, may hold it."""
    global _turns
    _turns = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def _make(settings: dict, chain: int) -> _Single | Replicas:
    return (Replicas if "exchange" in settings else _Single)(settings, chain)


def _simulate_chain(
    simulation: _Single | Replicas, settings: dict, chain: int, count: int, folder: Path
) -> Iterator[int]:
    """Yields the numbers of frames that have become available."""
    start = 0
    paths = chunks(folder, chain, count)
    while start < len(paths) and paths[start].exists() and (folder / f"chain-{chain}-{start}.chk").exists():
        start += 1
    if start:
        simulation.load((folder / f"chain-{chain}-{start - 1}.chk").read_bytes())
        yield min(start * _CHUNK, count)
    else:
        simulation.start(settings["positions"], settings["equilibration"])
    for i in range(start, len(paths)):
        size = min(_CHUNK, count - i * _CHUNK)
        frames = []
        for j in range(size):
            frames.append(simulation.frame(settings["stride"]))
            if j % 50 == 49:
                yield 50
        _check(np.stack(frames))
        save(folder / f"chain-{chain}-{i}.chk", simulation.save())
        save(paths[i], np.stack(frames))
        yield size % 50


def _check(frames: np.ndarray) -> None:
    if not np.isfinite(frames).all():
        raise ValueError("positions became NaN or infinite")


class _Single:
    """One copy at one temperature."""

    def __init__(self, settings: dict, chain: int) -> None:
        self._copy = Thermostat(settings, settings["temperature"], [chain])

    def start(self, positions: list, equilibration: int) -> None:
        self._copy.start(positions)
        self._copy.step(equilibration)

    def frame(self, stride: int) -> np.ndarray:
        self._copy.step(stride)
        return self._copy.positions()

    def save(self) -> bytes:
        return self._copy.context.createCheckpoint()

    def load(self, checkpoint: bytes) -> None:
        self._copy.context.loadCheckpoint(checkpoint)

    def summary(self) -> dict:
        return {}

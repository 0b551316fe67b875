"""Molecular dynamics at constant temperature, on all cores, with a cache that an interrupted run goes on from."""

from __future__ import annotations

import hashlib
import json
import os
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from openmm import unit
from tqdm import tqdm

from p4flows.checks import flag, integer, number
from p4flows.molecules.alanine import Molecule
from p4flows.molecules.cache import save, workplace
from p4flows.molecules.dynamics import TIME_STEP, chunks, run
from p4flows.molecules.processes import check_started, obituary, spawn
from p4flows.molecules.units import in_unit, positions_array, steps

__all__ = ["simulate"]


def simulate(
    system: openmm.System | Molecule,
    temperature: float,
    frames: int,
    stride: int = 100,
    seed: int = 0,
    workers: int = 2,
    *,
    positions: np.ndarray | None = None,
    equilibration: int = 10_000,
    cache: str | os.PathLike | None = None,
    progress: bool = True,
) -> np.ndarray:
    """Frames of Langevin-middle dynamics (1 fs, 1/ps, Reference platform), (frames, n_atoms, 3) float32 in nm.

    Args:
        system: an ``openmm.System``, or a :class:`Molecule`, which brings its positions along.
        temperature: in kelvin, or with a unit of OpenMM: ``300 * kelvin``.
        frames: number of frames in all, shared by the workers.
        stride: time steps between frames, or a time: ``0.1 * picosecond`` is 100 steps.
        seed: of velocities and noise; the i-th worker has a stream of its own.
        workers: spawned processes, each with a trajectory of its own, concatenated in order. A script needs the
            usual ``if __name__ == "__main__":`` around the call.
        positions: (n_atoms, 3) in nm to start from, as numbers or as OpenMM has them: with units, lists of ``Vec3``,
            ``pdb.positions``. Their energy is minimised first. Required with a System.
        equilibration: time steps, or a time, that each worker drops at the start.
        cache: folder for finished and interrupted runs; by default the environment variable P4FLOWS_CACHE, or
            ``~/.cache/p4flows``. A run with equal arguments and versions is read from there; an interrupted one goes
            on at its last checkpoint, to the same frames. Of several equal calls at once, one simulates and the
            others wait for its frames.
        progress: show a progress bar.

    Raises:
        ValueError: for wrong arguments.
        RuntimeError: for trouble in a worker.
    """
    if isinstance(system, Molecule):
        positions = system.positions if positions is None else positions
        system = system.system
    if not isinstance(system, openmm.System):
        raise ValueError(f"system: expected an openmm.System or a Molecule, got {type(system).__name__}")
    if positions is None:
        raise ValueError("positions: expected (n_atoms, 3) in nm, since a System has none")
    temperature = number("temperature", in_unit("temperature", temperature, unit.kelvin), 0, strict=True)
    frames, stride = integer("frames", frames, 1), integer("stride", steps("stride", stride, TIME_STEP), 1)
    seed, workers = integer("seed", seed, 0), min(integer("workers", workers, 1), frames)
    equilibration = integer("equilibration", steps("equilibration", equilibration, TIME_STEP), 0)
    flag("progress", progress)
    positions = positions_array("positions", positions)
    if positions.shape != (system.getNumParticles(), 3) or not np.isfinite(positions).all():
        raise ValueError(f"positions: expected finite ({system.getNumParticles()}, 3), got shape {positions.shape}")

    settings = {
        "system": openmm.XmlSerializer.serialize(system),
        "positions": positions.tolist(),
        "temperature": temperature,
        "stride": stride,
        "seed": seed,
        "equilibration": equilibration,
        "openmm": openmm.version.version,
    }
    key = json.dumps({**settings, "frames": frames, "workers": workers, "version": 1}, sort_keys=True)
    root = Path(cache or os.environ.get("P4FLOWS_CACHE") or Path.home() / ".cache" / "p4flows")
    folder = root / "md" / hashlib.sha256(key.encode()).hexdigest()[:24]
    finished = folder / "frames.npy"
    if not finished.exists():
        check_started()  # before the lock: whoever started this process has it
        message = "waiting for another simulation with equal arguments"
        with workplace(folder, lambda: tqdm.write(message) if progress else None) as place:
            if not finished.exists():
                save(finished, _simulate(settings, frames, workers, place, progress))
                for path in [*place.glob("chain-*")]:
                    path.unlink(missing_ok=True)
    return np.load(finished)


def _simulate(settings: dict, frames: int, workers: int, place: Path, progress: bool) -> np.ndarray:
    counts = [len(part) for part in np.array_split(np.arange(frames), workers)]
    jobs: list = []
    try:
        for i, count in enumerate(counts):
            jobs.append(spawn(run, settings, i, count, str(place)))
        _follow(jobs, tqdm(total=frames, desc=f"MD {settings['temperature']:g} K", unit="frame", disable=not progress))
    finally:
        for process, connection in jobs:
            connection.close()
            process.terminate()
            process.join()
    return np.concatenate([np.load(path) for i, count in enumerate(counts) for path in chunks(place, i, count)])


def _follow(jobs: list, bar: tqdm) -> None:
    running = {connection: process for process, connection in jobs}
    started = set()
    with bar:
        while running:
            ready: list[Any] = wait(list(running))  # connections, as all that it was given
            for connection in ready:
                try:
                    message = connection.recv()
                except (EOFError, ConnectionResetError):
                    who = "a molecular dynamics worker"
                    raise obituary(who, running[connection], connection in started) from None
                started.add(connection)
                if isinstance(message, Exception):
                    raise message
                if message is None:
                    del running[connection]
                else:
                    bar.update(message)

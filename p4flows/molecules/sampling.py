"""Molecular dynamics at constant temperature, on all cores, with a cache that an interrupted run goes on from."""

from __future__ import annotations

import hashlib
import json
import math
import os
from multiprocessing.connection import Connection, wait
from pathlib import Path

import numpy as np
import openmm
from openmm import unit
from tqdm import tqdm

from p4flows.checks import flag, integer, number
from p4flows.molecules.alanine import Molecule
from p4flows.molecules.evaluation import spawn

__all__ = ["simulate"]

_CHUNK = 250  # frames between checkpoints


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
        temperature: in kelvin.
        frames: number of frames in all, shared by the workers.
        stride: time steps between frames.
        seed: of velocities and noise; the i-th worker has a stream of its own.
        workers: spawned processes, each with a trajectory of its own, concatenated in order.
        positions: (n_atoms, 3) in nm to start from; their energy is minimised first. Required with a System.
        equilibration: time steps that each worker drops at the start.
        cache: folder for finished and interrupted runs; by default the environment variable P4FLOWS_CACHE, or
            ``~/.cache/p4flows``. A run with equal arguments and versions is read from there; an interrupted one goes
            on at its last checkpoint, to the same frames.
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
    temperature = number("temperature", temperature, 0, strict=True)
    frames, stride = integer("frames", frames, 1), integer("stride", stride, 1)
    seed, workers = integer("seed", seed, 0), min(integer("workers", workers, 1), frames)
    equilibration = integer("equilibration", equilibration, 0)
    try:
        positions = np.asarray(positions).astype(np.float64, casting="same_kind")
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"positions: expected numbers (n_atoms, 3) in nm, got {positions!r}") from None
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
        folder.mkdir(parents=True, exist_ok=True)
        counts = [len(part) for part in np.array_split(np.arange(frames), workers)]
        jobs = [spawn(_run, settings, i, count, str(folder)) for i, count in enumerate(counts)]
        try:
            _follow(
                jobs,
                tqdm(total=frames, desc=f"MD {temperature:g} K", unit="frame", disable=not flag("progress", progress)),
            )
        finally:
            for process, connection in jobs:
                connection.close()
                process.terminate()
                process.join()
        parts = [np.load(path) for i, count in enumerate(counts) for path in _chunks(folder, i, count)]
        _save(finished, np.concatenate(parts))
        for path in [*folder.glob("chain-*")]:
            path.unlink()
    return np.load(finished)


def _follow(jobs: list, bar: tqdm) -> None:
    running = {connection: process for process, connection in jobs}
    with bar:
        while running:
            for connection in wait(list(running)):
                try:
                    message = connection.recv()
                except (EOFError, ConnectionResetError):
                    raise RuntimeError("a molecular dynamics worker died") from None
                if isinstance(message, Exception):
                    raise message
                if message is None:
                    del running[connection]
                else:
                    bar.update(message)


def _chunks(folder: Path, chain: int, count: int) -> list[Path]:
    return [folder / f"chain-{chain}-{start}.npy" for start in range(0, count, _CHUNK)]


def _save(path: Path, array: np.ndarray | bytes) -> None:
    """Write a file that is either whole or not there."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        if isinstance(array, bytes):
            file.write(array)
        else:
            np.save(file, array)
    part.replace(path)


def _run(connection: Connection, settings: dict, chain: int, count: int, folder: str) -> None:
    try:
        for done in _simulate_chain(settings, chain, count, Path(folder)):
            connection.send(done)
        connection.send(None)
    except Exception as error:  # whatever it is, the caller gets to see it
        connection.send(RuntimeError(f"molecular dynamics failed: {type(error).__name__}: {error}"))


def _simulate_chain(settings: dict, chain: int, count: int, folder: Path):
    """Yields the numbers of frames that have become available."""
    integrator = openmm.LangevinMiddleIntegrator(settings["temperature"], 1 / unit.picosecond, 1 * unit.femtosecond)
    # OpenMM takes 0 for "choose a random one".
    noise = int(np.random.SeedSequence([settings["seed"], chain]).generate_state(1)[0] % (2**31 - 2)) + 1
    integrator.setRandomNumberSeed(noise)
    context = openmm.Context(
        openmm.XmlSerializer.deserialize(settings["system"]),
        integrator,
        openmm.Platform.getPlatformByName("Reference"),
    )
    start = 0
    chunks = _chunks(folder, chain, count)
    while start < len(chunks) and chunks[start].exists() and (folder / f"chain-{chain}-{start}.chk").exists():
        start += 1
    if start:
        context.loadCheckpoint((folder / f"chain-{chain}-{start - 1}.chk").read_bytes())
        yield min(start * _CHUNK, count)
    else:
        context.setPositions(np.array(settings["positions"]))
        start_energy = context.getState(getEnergy=True).getPotentialEnergy()._value
        if not math.isfinite(start_energy):  # the minimiser would never return
            raise ValueError(f"the energy of the starting positions is {start_energy}")
        openmm.LocalEnergyMinimizer.minimize(context)
        context.setVelocitiesToTemperature(settings["temperature"], noise)
        integrator.step(settings["equilibration"])
    for i in range(start, len(chunks)):
        size = min(_CHUNK, count - i * _CHUNK)
        frames = np.empty((size, context.getSystem().getNumParticles(), 3), dtype=np.float32)
        for j in range(size):
            integrator.step(settings["stride"])
            frames[j] = context.getState(getPositions=True).getPositions(asNumpy=True)._value
            if j % 50 == 49:
                yield 50
        if not np.isfinite(frames).all():
            raise ValueError("positions became NaN or infinite")
        _save(folder / f"chain-{chain}-{i}.chk", context.createCheckpoint())
        _save(chunks[i], frames)
        yield size % 50

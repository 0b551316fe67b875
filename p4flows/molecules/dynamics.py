"""One trajectory of Langevin dynamics in a process of its own, with checkpoints that a later run goes on from."""

from __future__ import annotations

import math
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import openmm
from openmm import unit

from p4flows.molecules.cache import save

__all__ = ["TIME_STEP", "chunks", "run"]

TIME_STEP = 1 * unit.femtosecond
_CHUNK = 250  # frames between checkpoints


def chunks(folder: Path, chain: int, count: int) -> list[Path]:
    """The files that ``count`` frames of a chain are kept in until all chains are done."""
    return [folder / f"chain-{chain}-{start}.npy" for start in range(0, count, _CHUNK)]


def run(connection: Connection, settings: dict, chain: int, count: int, folder: str) -> None:
    """Simulate, and send the numbers of new frames, then None; or the error."""
    try:
        for done in _simulate_chain(settings, chain, count, Path(folder)):
            connection.send(done)
        connection.send(None)
    except Exception as error:  # whatever it is, the caller gets to see it
        connection.send(RuntimeError(f"molecular dynamics failed: {type(error).__name__}: {error}"))


def _simulate_chain(settings: dict, chain: int, count: int, folder: Path) -> Iterator[int]:
    """Yields the numbers of frames that have become available."""
    integrator = openmm.LangevinMiddleIntegrator(settings["temperature"], 1 / unit.picosecond, TIME_STEP)
    # OpenMM takes 0 for "choose a random one".
    noise = int(np.random.SeedSequence([settings["seed"], chain]).generate_state(1)[0] % (2**31 - 2)) + 1
    integrator.setRandomNumberSeed(noise)
    context = openmm.Context(
        openmm.XmlSerializer.deserialize(settings["system"]),
        integrator,
        openmm.Platform.getPlatformByName("Reference"),
    )
    start = 0
    paths = chunks(folder, chain, count)
    while start < len(paths) and paths[start].exists() and (folder / f"chain-{chain}-{start}.chk").exists():
        start += 1
    if start:
        context.loadCheckpoint((folder / f"chain-{chain}-{start - 1}.chk").read_bytes())
        yield min(start * _CHUNK, count)
    else:
        context.setPositions(np.array(settings["positions"]))
        context.computeVirtualSites()
        start_energy = context.getState(getEnergy=True).getPotentialEnergy()._value
        if not math.isfinite(start_energy):  # the minimiser would never return
            raise ValueError(f"the energy of the starting positions is {start_energy}")
        openmm.LocalEnergyMinimizer.minimize(context)
        context.setVelocitiesToTemperature(settings["temperature"], noise)
        integrator.step(settings["equilibration"])
    for i in range(start, len(paths)):
        size = min(_CHUNK, count - i * _CHUNK)
        frames = np.empty((size, context.getSystem().getNumParticles(), 3), dtype=np.float32)
        for j in range(size):
            integrator.step(settings["stride"])
            frames[j] = context.getState(getPositions=True).getPositions(asNumpy=True)._value
            if j % 50 == 49:
                yield 50
        if not np.isfinite(frames).all():
            raise ValueError("positions became NaN or infinite")
        save(folder / f"chain-{chain}-{i}.chk", context.createCheckpoint())
        save(paths[i], frames)
        yield size % 50

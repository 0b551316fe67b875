"""Molecular dynamics at constant temperature, on all cores, with a cache that an interrupted run goes on from."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from concurrent.futures import Executor
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from tqdm import tqdm

from p4flows.checks import flag
from p4flows.molecules.cache import root, save, workplace
from p4flows.molecules.dynamics import chunks, run
from p4flows.molecules.molecule import Molecule
from p4flows.molecules.processes import check_started, obituary, spawn
from p4flows.molecules.simulation_settings import settings_of, temperatures_of
from p4flows.molecules.submission import submit_trajectories

__all__ = ["simulate"]

_WORKER = "a molecular dynamics worker"


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
    time_step: float = 1.0,
    exchange: int | None = None,
    platform: str = "Reference",
    executor: Executor | None = None,
    cache: str | os.PathLike | None = None,
    progress: bool = True,
) -> np.ndarray:
    """Frames of Langevin-middle dynamics (friction 1/ps), (frames, n_atoms, 3) float32 in nm.

    Of several temperatures, the result is (temperatures, frames, n_atoms, 3). Without ``exchange`` each of them is a
    simulation of its own, in the cache too; with it they are replicas that exchange their temperatures, which brings
    a cold one over barriers that it would not cross. Choose temperatures of which neighbours swap in 20 to 50 % of
    the attempts; the shares are told with the progress.

    Args:
        system: an ``openmm.System``, or a :class:`Molecule`, which brings its positions along.
        temperature: in kelvin, or with a unit of OpenMM: ``300 * kelvin``; or several: ``[300, 420, 600]``.
        frames: number of frames in all, or at each temperature, shared by the workers.
        stride: time steps between frames, or a time: ``0.1 * picosecond`` is 100 steps of 1 fs.
        seed: of velocities and noise; the i-th worker has a stream of its own.
        workers: spawned processes, each with a trajectory of its own, concatenated in order. A script needs the
            usual ``if __name__ == "__main__":`` around the call. With an executor, the number of trajectories.
        positions: (n_atoms, 3) in nm to start from, as numbers or as OpenMM has them: with units, lists of ``Vec3``,
            ``pdb.positions``. Their energy is minimised first. Required with a System.
        equilibration: time steps, or a time, that each worker drops at the start.
        time_step: in fs, or a time. With constrained bonds to hydrogen, 2 fs are usual.
        exchange: time steps, or a time, between attempts to swap neighbouring temperatures.
        platform: of OpenMM. "Reference" is the fastest for some tens of atoms, "CPU" for hundreds.
        executor: a ``concurrent.futures.Executor`` that runs the trajectories, for many short ones on other machines:
            that of dask.distributed, ``Client.get_executor()``, for example. They are the same as with local
            processes. Only whole trajectories are kept when a run is interrupted.
        cache: folder for finished and interrupted runs; by default the environment variable P4FLOWS_CACHE, or
            ``~/.cache/p4flows``. A run with equal arguments and versions is read from there; an interrupted one goes
            on at its last checkpoint, to the same frames. Of several equal calls at once, one simulates and the
            others wait for its frames. :func:`cached_simulations` lists what is there.
        progress: show a progress bar, and say on the standard error stream where the frames are kept.

    Raises:
        ValueError: for wrong arguments.
        RuntimeError: for trouble in a worker.
    """
    flag("progress", progress)
    if executor is not None and not isinstance(executor, Executor):
        raise ValueError(f"executor: expected a concurrent.futures.Executor, got {type(executor).__name__}")
    if isinstance(system, Molecule):
        positions = system.positions if positions is None else positions
        system = system.system
    kelvin = temperatures_of(temperature, exchange)
    options: dict[str, Any] = {
        "positions": positions,
        "equilibration": equilibration,
        "time_step": time_step,
        "platform": platform,
    }
    settings, frames, workers = settings_of(system, kelvin, frames, stride, seed, workers, exchange, **options)
    if isinstance(kelvin, list) and exchange is None:
        each = ({**settings, "temperature": t} for t in kelvin)
        return np.stack([_cached(s, frames, workers, executor, root(cache), progress) for s in each])
    result = _cached(settings, frames, workers, executor, root(cache), progress)
    return np.moveaxis(result, 1, 0) if result.ndim == 4 else result


def _cached(
    settings: dict, frames: int, workers: int, executor: Executor | None, cache: Path, progress: bool
) -> np.ndarray:
    key = json.dumps({**settings, "frames": frames, "workers": workers, "version": 1}, sort_keys=True)
    folder = cache / "md" / hashlib.sha256(key.encode()).hexdigest()[:24]
    finished = folder / "frames.npy"
    said = "read from"
    if not finished.exists():
        if executor is None:
            check_started()  # before the lock: whoever started this process has it
        message = "waiting for another simulation with equal arguments"
        with workplace(folder, lambda: _say(message, progress)) as place:
            if not finished.exists():
                said = "kept in"
                _describe(folder, settings, frames, workers)
                found, summary = _simulate(settings, frames, workers, place, progress, executor)
                _describe(folder, settings, frames, workers, **summary)
                save(finished, found)
                for path in [*place.glob("chain-*")]:
                    path.unlink(missing_ok=True)
    size = finished.stat().st_size / 1e6
    _say(f"{frames:,} frames at {_kelvin(settings)}, {size:.1f} MB, {said} {folder}{_swaps(folder)}", progress)
    return np.load(finished)


def _simulate(
    settings: dict, frames: int, workers: int, place: Path, progress: bool, executor: Executor | None = None
) -> tuple[np.ndarray, dict[str, Any]]:
    """The frames, and what there is to tell of the simulation."""
    counts = [len(part) for part in np.array_split(np.arange(frames), workers)]
    bar = tqdm(total=frames, desc=f"MD {_kelvin(settings)}", unit="frame", disable=not progress)
    if executor is not None:
        found, summaries = submit_trajectories(executor, settings, counts, place, bar)
    else:
        jobs: list = []
        try:
            for i, count in enumerate(counts):
                jobs.append(spawn(run, i, count, str(place)))
            for process, connection in jobs:
                _send(settings, process, connection)
            summaries = _follow(jobs, bar)
        finally:
            for process, connection in jobs:
                connection.close()
                process.terminate()
                process.join()
        found = np.concatenate([np.load(path) for i, count in enumerate(counts) for path in chunks(place, i, count)])
    return found, {name: np.mean([s[name] for s in summaries], 0).round(3).tolist() for name in summaries[0]}


def _send(settings: dict, process: BaseProcess, connection: Connection) -> None:
    # Not as an argument of the process: the system alone may be larger than what can be passed in that way.
    try:
        connection.send(settings)
    except (BrokenPipeError, ConnectionResetError):
        raise obituary(_WORKER, process, started=False) from None


def _follow(jobs: list, bar: tqdm) -> list[dict[str, Any]]:
    running = {connection: process for process, connection in jobs}
    started, summaries = set(), []
    with bar:
        while running:
            ready: list[Any] = wait(list(running))  # connections, as all that it was given
            for connection in ready:
                try:
                    message = connection.recv()
                except (EOFError, ConnectionResetError):
                    raise obituary(_WORKER, running[connection], connection in started) from None
                started.add(connection)
                if isinstance(message, Exception):
                    raise message
                if isinstance(message, dict):
                    del running[connection]
                    summaries.append(message)
                else:
                    bar.update(message)
    return summaries


def _describe(folder: Path, settings: dict, frames: int, workers: int, **more: Any) -> None:
    """Say in the folder what is simulated there, for those who list the cache."""
    long = ("system", "positions")
    about = {name: value for name, value in settings.items() if name not in long}
    about |= {"atoms": len(settings["positions"]), "frames": frames, "workers": workers, **more}
    save(folder / "about.json", json.dumps(about).encode())


def _swaps(folder: Path) -> str:
    about = folder / "about.json"
    accepted = json.loads(about.read_text()).get("accepted") if about.exists() else None
    return f"; accepted swaps: {', '.join(f'{share:.0%}' for share in accepted)}" if accepted else ""


def _kelvin(settings: dict) -> str:
    temperature = settings["temperature"]
    return f"{', '.join(f'{t:g}' for t in (temperature if isinstance(temperature, list) else [temperature]))} K"


def _say(message: str, progress: bool) -> None:
    if progress:
        tqdm.write(message, file=sys.stderr)

"""What the cache of simulations holds, and how to get rid of it."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from p4flows.molecules.cache import is_in_use, remove, root

__all__ = ["CachedSimulation", "cached_simulations", "clear_cache"]

_KEY = re.compile(r"[0-9a-f]{24}")


@dataclass(frozen=True)
class CachedSimulation:
    """A finished or interrupted run of :func:`simulate`.

    Attributes:
        key: its name in the cache, made of its arguments.
        folder: where its files are.
        size: of its files, in bytes.
        finished: whether its frames are complete; otherwise the same call goes on from here.
        running: whether some process or thread is at it now.
        description: what was simulated, as far as is known: atoms, temperature in kelvin, frames, stride, ...
    """

    key: str
    folder: Path
    size: int
    finished: bool
    running: bool
    description: dict

    def __str__(self) -> str:
        about = self.description
        temperatures = about.get("temperature", [])
        kelvin = ", ".join(f"{t:g}" for t in (temperatures if isinstance(temperatures, list) else [temperatures]))
        text = f"{about['frames']:,} frames of {about['atoms']} atoms at {kelvin} K" if about else "no description"
        state = ", running" if self.running else "" if self.finished else ", interrupted"
        return f"{self.key}  {self.size / 1e6:8.1f} MB  {text}{state}"


def cached_simulations(cache: str | os.PathLike | None = None) -> list[CachedSimulation]:
    """What :func:`simulate` keeps, newest first, in a folder: by default P4FLOWS_CACHE or ``~/.cache/p4flows``."""
    folders = [path for path in (root(cache) / "md").glob("*") if path.is_dir() and _KEY.fullmatch(path.name)]
    # Simulations may be running in them, or be removed, while we look.
    changed = {path: _stat(path, "st_mtime") for path in folders}
    return [_look_at(folder) for folder in sorted(folders, key=lambda path: (-changed[path], path.name))]


def clear_cache(
    cache: str | os.PathLike | None = None, keys: Iterable[str] | None = None
) -> tuple[list[CachedSimulation], list[CachedSimulation]]:
    """Remove simulations from the cache: all, or those of the ``keys`` that :func:`cached_simulations` lists.

    Returns:
        those that were removed, and those that were left because a simulation is running in them.

    Raises:
        ValueError: for a key that is not there, or keys that are no collection; then nothing is removed.
        OSError: for files that cannot be removed.
    """
    found = {simulation.key: simulation for simulation in cached_simulations(cache)}
    try:
        chosen = list(found) if keys is None else list(keys)
        unknown = [key for key in chosen if key not in found]
    except TypeError:
        raise ValueError(f"keys: expected a list of keys, got {keys!r}") from None
    if unknown:
        raise ValueError(f"keys: expected some that cached_simulations lists, got {', '.join(map(repr, unknown))}")
    removed: list[CachedSimulation] = []
    left: list[CachedSimulation] = []
    for simulation in (found[key] for key in dict.fromkeys(chosen)):
        (removed if remove(simulation.folder) else left).append(simulation)
    for folder in (root(cache) / "md").glob("removed-*"):  # by a call that was killed
        shutil.rmtree(folder, ignore_errors=True)
    return removed, left


def _look_at(folder: Path) -> CachedSimulation:
    paths = (Path(place, name) for place, _, names in os.walk(folder) for name in names)
    size = sum(int(_stat(path, "st_size")) for path in paths)
    try:
        description = json.loads((folder / "about.json").read_text())
    except (OSError, ValueError):  # written before there were descriptions
        description = {}
    return CachedSimulation(folder.name, folder, size, (folder / "frames.npy").exists(), is_in_use(folder), description)


def _stat(path: Path, name: str) -> float:
    """A number that the system has about a path; 0 if it has vanished, as temporary files do."""
    try:
        return getattr(path.stat(), name)
    except FileNotFoundError:
        return 0

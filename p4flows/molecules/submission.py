"""Trajectories that an executor of concurrent.futures runs, on this machine or on others."""

from __future__ import annotations

from concurrent.futures import Executor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from p4flows.molecules.cache import save
from p4flows.molecules.dynamics import trajectory

__all__ = ["submit_trajectories"]


def submit_trajectories(
    executor: Executor, settings: dict, counts: list[int], place: Path, bar: tqdm
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """The frames of trajectories of ``counts`` frames, one after the other, and what there is to tell of them.

    Those that are done are kept in the folder ``place``, and are not computed again when an interrupted run goes on.

    Raises:
        RuntimeError: for trouble in a trajectory, or with the process that it ran in, as soon as the executor tells.
    """
    paths = [place / f"chain-{i}-whole.npz" for i in range(len(counts))]
    futures = {}
    try:
        with bar:
            for i, path in enumerate(paths):
                if not path.exists():
                    futures[executor.submit(trajectory, settings, i, counts[i])] = i
            bar.update(sum(counts) - sum(counts[i] for i in futures.values()))
            for future in as_completed(futures):
                i = futures[future]
                frames, summary = future.result()
                save(paths[i], {"frames": frames, **summary})
                bar.update(counts[i])
    except Exception as error:
        raise RuntimeError(f"molecular dynamics failed: {type(error).__name__}: {error}") from error
    finally:
        for future in futures:
            future.cancel()
    parts = [_load(path) for path in paths]
    return np.concatenate([part.pop("frames") for part in parts]), parts


def _load(path: Path) -> dict[str, Any]:
    with np.load(path) as file:
        return dict(file)

"""DCD trajectory files, as OpenMM's DCDReporter, CHARMM and NAMD write them."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np

__all__ = ["read_dcd"]

_HEADER = 92  # bytes: a record of "CORD", twenty integers of four bytes, and the marks of its length around it


def read_dcd(path: str | os.PathLike) -> np.ndarray:
    """All frames of a DCD file, (frames, n_atoms, 3) float32 in nm; the file has ångström.

    A last frame that is cut off, as a killed simulation leaves it, is left out with a warning.

    Raises:
        ValueError: if it is no DCD file, or one with fixed atoms or a fourth dimension.
    """
    data = Path(path).read_bytes()
    order = next((o for o in "<>" if data[:8] == np.array(84, f"{o}i4").tobytes() + b"CORD"), "")
    if not order or len(data) < _HEADER + 24:
        raise ValueError(f"{path}: expected a DCD file, got one that does not begin as such files do")
    integer = np.dtype(f"{order}i4")
    control = np.frombuffer(data, integer, 20, 8)
    # By CHARMM's numbering from 1: 9 is the number of fixed atoms, 11 says if there is a cell, 12 a fourth dimension.
    if control[8] or control[11]:
        raise ValueError(f"{path}: expected free atoms in three dimensions, got fixed atoms or a fourth dimension")
    titles = int(np.frombuffer(data, integer, 1, _HEADER)[0])
    start = _HEADER + titles + 8
    whole = 0 <= titles <= len(data) - _HEADER - 20
    mark, n_atoms, _ = (int(i) for i in np.frombuffer(data, integer, 3, start)) if whole else (0, 0, 0)
    if mark != 4 or n_atoms < 1:
        raise ValueError(f"{path}: expected a number of atoms after the titles of a DCD file, got none")
    marks = ("before", integer), ("values", np.dtype(f"{order}f4"), (n_atoms,)), ("after", integer)
    cell = [("cell", "V56")] if control[10] else []
    frame = np.dtype([*cell, *((axis, list(marks)) for axis in "xyz")])
    count, rest = divmod(len(data) - start - 12, frame.itemsize)
    frames = np.frombuffer(data, frame, count, start + 12)
    if any((frames[axis][side] != 4 * n_atoms).any() for axis in "xyz" for side in ("before", "after")):
        raise ValueError(f"{path}: expected frames of {n_atoms} atoms of equal size, got another layout")
    if rest:
        warnings.warn(f"{path}: the last frame is cut off, and is left out", stacklevel=2)
    return np.stack([frames[axis]["values"] for axis in "xyz"], -1).astype(np.float32) / np.float32(10)

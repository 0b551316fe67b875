"""Quantities with units, as OpenMM has them, turned into the plain numbers that this package computes with."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import numpy as np
import torch
from openmm import unit
from torch import Tensor

__all__ = ["in_unit", "positions_array", "positions_tensor", "steps"]


def in_unit(name: str, value: Any, target: unit.Unit) -> Any:
    """The value without its unit, converted to ``target``; a value without a unit is returned as it is.

    Raises:
        ValueError: for a unit of another dimension, for example a temperature in nanometers.
    """
    if not unit.is_quantity(value):
        return value
    try:
        return value.value_in_unit(target)
    except (TypeError, AttributeError):
        raise ValueError(f"{name}: expected a quantity in {target}, got one in {value.unit}") from None


def steps(name: str, value: Any, step: unit.Quantity) -> Any:
    """A number of time steps; a time, such as ``0.1 * picosecond``, is converted to the steps that it takes.

    Raises:
        ValueError: for a time that is not a whole number of steps, and for a unit that is not one of time.
    """
    if not unit.is_quantity(value):
        return value
    count = in_unit(name, value, unit.femtosecond)
    found = float(count) / step.value_in_unit(unit.femtosecond) if isinstance(count, Real) else math.nan
    if not math.isfinite(found) or abs(found - round(found)) > 1e-6 * max(1.0, abs(found)):
        raise ValueError(f"{name}: expected a whole number of time steps of {step}, got {value}")
    return round(found)


def positions_array(name: str, value: Any) -> np.ndarray:
    """Positions in nm as a float64 array, from all that OpenMM calls positions.

    These are arrays and nested lists of numbers, lists of ``Vec3``, a ``Quantity`` of any of them
    (``pdb.positions``, ``state.getPositions(asNumpy=True)``), and lists of quantities. Numbers without a unit are nm.
    """
    try:
        return np.asarray(_plain(name, value)).astype(np.float64, casting="same_kind")
    except (TypeError, ValueError, RuntimeError) as error:
        if str(error).startswith(f"{name}: "):
            raise
        raise ValueError(f"{name}: expected numbers (n_atoms, 3) in nm, got {_short(value)}") from None


def positions_tensor(name: str, value: Any) -> Any:
    """Positions as a tensor in nm; what cannot be one is returned as it is, for the caller to refuse.

    A tensor stays the same object. A NumPy array, also that of an ``mdtraj.Trajectory``, keeps its floating-point
    type; everything else that :func:`positions_array` takes becomes float64.
    """
    if isinstance(value, Tensor):
        return value
    if isinstance(getattr(value, "xyz", None), np.ndarray):  # an mdtraj.Trajectory
        value = value.xyz
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        kind = value.dtype.type if value.dtype.itemsize <= 8 else np.float64
        return torch.from_numpy(np.array(value, dtype=kind, order="C"))
    objects = isinstance(value, np.ndarray) and value.dtype == object
    if unit.is_quantity(value) or objects or (isinstance(value, list | tuple) and len(value)):
        return torch.from_numpy(positions_array(name, value))
    return value


def _plain(name: str, value: Any) -> Any:
    if unit.is_quantity(value):
        return in_unit(name, value, unit.nanometer)
    if isinstance(value, np.ndarray) and value.dtype == object:
        value = value.tolist()
    # A Vec3 is a tuple of three floats, and so is left alone.
    if isinstance(value, list | tuple) and len(value) and not isinstance(value[0], float | int):
        return [_plain(name, item) for item in value]
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 200 else f"{text[:200]}..."

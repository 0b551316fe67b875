"""The arguments of a simulation, checked and as plain numbers, of which its key in the cache is made."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import openmm
from openmm import unit

from p4flows.checks import choice, integer, number
from p4flows.molecules.thermostat import TIME_STEP
from p4flows.molecules.units import in_unit, positions_array, steps

__all__ = ["settings_of", "temperatures_of"]


def temperatures_of(temperature: Any, exchange: Any) -> float | list[float]:
    """One temperature in kelvin, or a list of several; those of an exchange in ascending order."""
    value: Any = in_unit("temperature", temperature, unit.kelvin)
    if not isinstance(value, list | tuple | np.ndarray) or (isinstance(value, np.ndarray) and not value.ndim):
        if exchange is not None:
            raise ValueError(f"temperature: expected several for an exchange, got {temperature!r}")
        return number("temperature", float(value) if isinstance(value, np.ndarray) else value, 0, strict=True)
    result = [number("temperature", in_unit("temperature", t, unit.kelvin), 0, strict=True) for t in value]
    if not result:
        raise ValueError("temperature: expected at least one, got none")
    if exchange is not None and (len(result) < 2 or any(a >= b for a, b in pairwise(result))):
        raise ValueError(f"temperature: expected several in ascending order for an exchange, got {result}")
    return result


def settings_of(
    system: openmm.System,
    temperature: float | list[float],
    frames: int,
    stride: Any,
    seed: int,
    workers: int,
    exchange: Any,
    *,
    positions: Any,
    equilibration: Any,
    time_step: Any,
    platform: str,
) -> tuple[dict[str, Any], int, int]:
    """The settings of a simulation, the number of its frames and that of its trajectories.

    What is as it always was is not among the settings, so that the keys of simulations in a cache stay valid.
    """
    if not isinstance(system, openmm.System):
        raise ValueError(f"system: expected an openmm.System or a Molecule, got {type(system).__name__}")
    if positions is None:
        raise ValueError("positions: expected (n_atoms, 3) in nm, since a System has none")
    time_step = number("time_step", in_unit("time_step", time_step, unit.femtosecond), 0, strict=True)
    step = time_step * unit.femtosecond
    names = [openmm.Platform.getPlatform(i).getName() for i in range(openmm.Platform.getNumPlatforms())]
    platform = choice("platform", platform, names)
    frames = integer("frames", frames, 1)
    stride = integer("stride", steps("stride", stride, step), 1)
    seed, workers = integer("seed", seed, 0), min(integer("workers", workers, 1), frames)
    equilibration = integer("equilibration", steps("equilibration", equilibration, step), 0)
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
    if time_step != TIME_STEP:
        settings["time_step"] = time_step
    if platform != "Reference":
        settings["platform"] = platform
    if exchange is not None:
        settings["exchange"] = exchange = integer("exchange", steps("exchange", exchange, step), 1)
        shortest = equilibration + stride * (frames // workers)
        if 2 * exchange > shortest:  # even and odd pairs take turns
            raise ValueError(
                f"exchange: expected two attempts or more in the {shortest} steps of a trajectory, got one every "
                f"{exchange} steps"
            )
    return settings, frames, workers

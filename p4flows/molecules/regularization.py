"""High energies cut down to their logarithm, for training."""

from __future__ import annotations

import torch
from torch import Tensor

from p4flows.checks import number

__all__ = ["ordered", "regularize_energy"]


def regularize_energy(u: Tensor, e_high: float, e_max: float) -> Tensor:
    r"""Energies (...) that grow only logarithmically above ``e_high`` and not at all above ``e_max``, in kT.

    .. math:: u \mapsto u \;(u \le e_{high}), \quad
        e_{high} + \ln(1 + \min(u, e_{max}) - e_{high}) \;(u > e_{high})

    Continuous with a continuous derivative at ``e_high``; the gradient above ``e_max`` is zero. Keeps the atoms that
    overlap in an untrained generator's samples from dominating the loss (Noé, Olsson, Köhler, Wu 2019).
    """
    if not isinstance(u, Tensor) or not u.is_floating_point():
        raise ValueError(f"u: expected a floating-point tensor, got {getattr(u, 'dtype', type(u).__name__)}")
    e_high, e_max = ordered(e_high, e_max)
    excess = (u.clamp(max=e_max) - e_high).clamp(min=0)
    return torch.where(u > e_high, e_high + torch.log1p(excess), u)


def ordered(e_high: float, e_max: float) -> tuple[float, float]:
    """Both as numbers; ValueError unless e_high < e_max."""
    low, high = number("e_high", e_high), number("e_max", e_max)
    if not low < high:
        raise ValueError(f"e_high and e_max: expected e_high < e_max, got {e_high!r} and {e_max!r}")
    return low, high

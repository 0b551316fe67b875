"""Validation of constructor arguments: a ValueError names the argument, what was expected and what was given."""

from __future__ import annotations

import math

import torch

__all__ = ["Bounds", "bounds", "floating", "integer"]

Bounds = tuple[float | None, float | None]


def integer(name: str, value: int, low: int | None = None, high: int | None = None) -> int:
    expected = (
        "an integer" + (f" >= {low}" if low is not None else "") + (f" and <= {high}" if high is not None else "")
    )
    wrong = isinstance(value, bool) or not hasattr(value, "__index__")
    if wrong or (low is not None and value < low) or (high is not None and value > high):
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    return int(value)


def bounds(name: str, given: Bounds) -> Bounds:
    try:
        low, high = (None if b is None or math.isinf(b) else float(b) for b in given)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: expected a pair (low, high) of numbers or None, got {given!r}") from None
    if any(b is not None and math.isnan(b) for b in (low, high)) or (None not in (low, high) and low >= high):
        raise ValueError(f"{name}: expected low < high, got {given!r}")
    return low, high


def floating(dtype: torch.dtype | None) -> torch.dtype:
    """The dtype, or torch's default for None; ValueError unless it is a floating-point one."""
    dtype = dtype or torch.get_default_dtype()
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype: expected a floating-point type, got {dtype}")
    return dtype

"""Validation of constructor arguments: a ValueError names the argument, what was expected and what was given."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import nn

__all__ = ["Bounds", "bounds", "choice", "describe", "flag", "floating", "integer", "items", "move", "number"]

Bounds = tuple[float | None, float | None]
_INT64 = 2**63


def integer(name: str, value: int, low: int | None = None, high: int | None = None) -> int:
    expected = (
        "an integer" + (f" >= {low}" if low is not None else "") + (f" and <= {high}" if high is not None else "")
    )
    try:
        result = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}: expected {expected}, got {value!r}") from None
    wrong = isinstance(value, bool) or not -_INT64 <= result < _INT64
    if wrong or (low is not None and result < low) or (high is not None and result > high):
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    return result


def number(name: str, value: float, low: float = -math.inf, strict: bool = False) -> float:
    """A finite real number, at least ``low``, or more than that if ``strict``."""
    wrong = isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value)
    if wrong or value < low or (strict and value == low):
        bound = "" if low == -math.inf else f" {'>' if strict else '>='} {low:g}"
        raise ValueError(f"{name}: expected a finite number{bound}, got {value!r}")
    return float(value)


def flag(name: str, value: bool) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected True or False, got {value!r}")
    return value


def choice(name: str, value: str, options: Iterable[str]) -> str:
    options = list(options)
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, options))}, got {value!r}")
    return value


def bounds(name: str, given: Bounds) -> Bounds:
    try:
        low, high = (None if b is None or math.isinf(b) else float(b) for b in given)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise ValueError(f"{name}: expected a pair (low, high) of numbers or None, got {given!r}") from None
    unordered = any(b is not None and math.isnan(b) for b in (low, high))
    if unordered or (low is not None and high is not None and low >= high):
        raise ValueError(f"{name}: expected low < high, got {given!r}")
    return low, high


def items(name: str, values: Iterable, expected: str, valid: Callable[[Any], bool]) -> list:
    """At least one value, each of them valid."""
    try:
        result = list(values)
    except TypeError:
        result = []
    if not result or not all(map(valid, result)):
        raise ValueError(f"{name}: expected {expected}, got {values!r}")
    return result


def floating(dtype: torch.dtype | None) -> torch.dtype:
    """The dtype, or torch's default for None; ValueError unless it is a floating-point one that torch computes with."""
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(f"dtype: expected a floating-point type of 16 bits or more, got {dtype}")
    return dtype


def describe(x: object) -> str:
    """What a message says of an argument: dtype and shape of a tensor or an array, of anything else the type."""
    return f"{x.dtype} {tuple(x.shape)}" if isinstance(x, torch.Tensor | np.ndarray) else type(x).__name__


def move(module: nn.Module, device: torch.device | str | int | None) -> None:
    """Move a new module from the CPU to the argument ``device``, or to torch's default device if there is none."""
    if device is None:
        device = torch.empty(0).device  # torch.get_default_device fails where a default was taken back, in torch 2.7
        if device.type == "cpu":
            return
    if isinstance(device, bool) or not isinstance(device, torch.device | str | int):
        raise ValueError(f"device: expected a torch.device or what makes one, got {device!r}")
    try:
        module.to(torch.device(device))
    except (ValueError, RuntimeError, AssertionError) as error:  # unknown, or not there
        raise ValueError(f"device: expected one that can be used here, got {device!r}: {error}") from None

"""The memory that a piece of work allocates."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["Memory", "allocated"]


class Memory(NamedTuple):
    """Bytes on top of what was there before."""

    peak: int
    """The most that there was at one time."""

    kept: int
    """What is left."""


def allocated(work: Callable[[], object], device: torch.device) -> Memory:
    """What torch allocates during ``work()``, by its profiler on a processor and by its allocator on a GPU.

    The profiler keeps a record of every operation. What LAPACK allocates for itself is in neither.
    """
    with _no_collection():
        return _on_gpu(work, device) if device.type == "cuda" else _on_processor(work)


def _on_gpu(work: Callable[[], object], device: torch.device) -> Memory:
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    kept = torch.cuda.memory_allocated(device) - before
    return Memory(torch.cuda.max_memory_allocated(device) - before, kept)


def _on_processor(work: Callable[[], object]) -> Memory:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells every start and stop otherwise
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return Memory(peak, held)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Without Python's search for cycles, which could free now what was left before."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()

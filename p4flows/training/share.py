"""How much of a training goes into merging."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator

import torch

__all__ = ["Share"]


class Share:
    """The part of the time between optimizer steps that is spent on merging each layer.

    It is known on a CPU only: elsewhere work is not done when a call returns. Layers that are merged together get equal
    parts of the time that this takes.
    """

    def __init__(self) -> None:
        self._first: float | None = None
        self._last = 0.0
        self._spent: dict[tuple[str, ...], float] = defaultdict(float)

    def tick(self) -> None:
        """An optimizer step is done, and what follows it."""
        self._last = time.perf_counter()
        if self._first is None:
            self._first = self._last

    @contextlib.contextmanager
    def measure(self, names: tuple[str, ...], device: torch.device) -> Iterator[None]:
        """Count the time that this takes for the layers of these names."""
        start = time.perf_counter()
        yield
        if self._first is not None and device.type == "cpu":
            self._spent[names] += (time.perf_counter() - start) / len(names)

    def of(self, name: str) -> float | None:
        """The part that the layer of this name takes; None where it is not known."""
        spent = [seconds for names, seconds in self._spent.items() if name in names]
        elapsed = 0.0 if self._first is None else self._last - self._first
        return sum(spent) / elapsed if spent and elapsed else None

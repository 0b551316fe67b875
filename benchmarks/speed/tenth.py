"""bgflow's scheduler, called as often as the paper merges."""

from __future__ import annotations

from typing import Any

__all__ = ["EveryTenth"]


class EveryTenth:
    """Every tenth step is one of ``scheduler``, which itself merges at every step."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler, self._count = scheduler, 0

    def step(self) -> None:
        self._count += 1
        if self._count % 10 == 0:
            self._scheduler.step()

"""Checkpoints of a training loop, so that an interrupted run goes on where it was."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

__all__ = ["Checkpoint"]

_SECONDS_BETWEEN = 10


class Checkpoint:
    """The state of some parts (model, optimizer, ...; None for one that is not there) and numbers, in one file.

    ``path`` None keeps nothing. A file of other settings is a ValueError.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any], **parts: Any) -> None:
        self.path, self.settings = path, settings
        self.parts = {name: part for name, part in parts.items() if part is not None}
        self._last = time.monotonic()

    def restore(self) -> dict[str, Any]:
        """Load the parts, and return the numbers; an empty dict where there is no checkpoint."""
        if self.path is None or not self.path.exists():
            return {}
        state = torch.load(self.path, weights_only=True)
        if state["settings"] != self.settings:
            raise ValueError(f"{self.path}: expected a checkpoint of {self.settings}, got one of {state['settings']}")
        for name, part in self.parts.items():
            if isinstance(part, torch.Generator):
                part.set_state(state["parts"][name])
            else:
                part.load_state_dict(state["parts"][name])
        return state["numbers"]

    def save(self, **numbers: Any) -> None:
        """Write the file, which is either whole or not there."""
        if self.path is None:
            return
        parts = {
            name: part.get_state() if isinstance(part, torch.Generator) else part.state_dict()
            for name, part in self.parts.items()
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".part")
        torch.save({"settings": self.settings, "parts": parts, "numbers": numbers}, unfinished)
        unfinished.replace(self.path)
        self._last = time.monotonic()

    def save_if_due(self, **numbers: Any) -> None:
        """Save, if the last time was ten seconds ago or more."""
        if time.monotonic() - self._last > _SECONDS_BETWEEN:
            self.save(**numbers)

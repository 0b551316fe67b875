"""What keeps attached schedulers alive for as long as their model."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["tie", "untie"]


class Tie:
    """Things that live as long as a model. Copies of the model, and pickles, start without."""

    def __init__(self) -> None:
        self.things: list[Any] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Tie:
        return Tie()

    def __reduce__(self) -> tuple[type, tuple]:
        return Tie, ()


def tie(model: nn.Module, thing: Any) -> None:
    """Let the thing live as long as the model."""
    model.__dict__.setdefault("_p4flows", Tie()).things.append(thing)


def untie(model: nn.Module, thing: Any) -> None:
    """Undo :func:`tie`."""
    found = model.__dict__.get("_p4flows")
    if found is not None:
        found.things = [each for each in found.things if each is not thing]

"""Merging in a training whose optimizer is made where nobody can reach it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from p4flows.training.finding import Layers
from p4flows.training.scheduler import MergeScheduler

__all__ = ["attach_on_first_step"]


def attach_on_first_step(model: nn.Module, **options: Any) -> Callable[[], MergeScheduler | None]:
    """Merge the model's P4 layers in whatever training comes, by whichever optimizer steps on them.

    For libraries that make the optimizer and run the loop inside one call, such as ``sbi``'s ``NPE.train``: call it
    where the model is built. A new optimizer, in a second training, takes the place of the first. ``options`` are those
    of :class:`MergeScheduler`. Returns a function that gives the scheduler, or None before the first step.

    >>> import torch
    >>> from p4flows import P4Inv
    >>> layer = P4Inv(4)
    >>> scheduler = attach_on_first_step(layer, every=1)
    >>> optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    >>> layer(torch.randn(8, 4))[0].square().mean().backward()
    >>> optimizer.step()
    >>> scheduler().counters["merged"]
    1
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not Layers(model)():
        raise ValueError("model: expected one with a P4 layer")
    scheduler = weakref.ref(MergeScheduler(model, None, **options).attach())

    def current() -> MergeScheduler | None:
        found = scheduler()
        return found if found is not None and found.steps else None

    return current

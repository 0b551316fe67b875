"""One process-wide pair of optimizer hooks, which tells every scheduler of the steps that concern it.

torch calls these hooks for every optimizer, whoever made it. So a scheduler is told of a step on its layers also when a
library makes a new optimizer in every training, or when an optimizer is wrapped in another. They are registered when
the first scheduler is made, and hold weak references only.
"""

from __future__ import annotations

import threading
import weakref
from typing import Protocol

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

__all__ = ["Watcher", "watch", "watchers"]


class Watcher(Protocol):
    """Whoever wants to be told of optimizer steps."""

    def concerns(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the optimizer steps on anything that this watcher cares for."""

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Called before each such step."""

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Called after each such step: once, and by the innermost, where an optimizer calls another's step."""


_watchers: weakref.WeakSet[Watcher] = weakref.WeakSet()
_lock = threading.Lock()
_running = threading.local()  # the optimizers that are stepping in this thread, the outermost first
_registered = False


def watch(watcher: Watcher) -> None:
    """Tell this watcher of optimizer steps, for as long as it lives."""
    global _registered
    with _lock:
        _watchers.add(watcher)
        if not _registered:
            register_optimizer_step_pre_hook(_before)
            register_optimizer_step_post_hook(_after)
            _registered = True


def watchers() -> list[Watcher]:
    """All watchers that are alive."""
    with _lock:
        return list(_watchers)


# Merges must not be traced: they change what the graph was made of.
@torch.compiler.disable
def _before(optimizer: torch.optim.Optimizer, *_: object) -> None:
    stack = _running.__dict__.setdefault("stack", [])
    # A step that raised has left its entry behind.
    del stack[next((i for i, (other, _) in enumerate(stack) if other is optimizer), len(stack)) :]
    concerned = [watcher for watcher in watchers() if watcher.concerns(optimizer)]
    for watcher in concerned:
        if not stack:
            watcher.before_step(optimizer)
    stack.append((optimizer, concerned))


@torch.compiler.disable
def _after(optimizer: torch.optim.Optimizer, *_: object) -> None:
    stack = _running.__dict__.setdefault("stack", [])
    concerned = []
    while stack:
        other, concerned = stack.pop()
        if other is optimizer:
            break
    for watcher in concerned:
        watcher.after_step(optimizer)
        for _, outer in stack:
            if watcher in outer:
                outer.remove(watcher)  # it has been told of this step

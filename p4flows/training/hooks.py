"""One process-wide pair of optimizer hooks, which tells every scheduler of the steps that concern it.

torch calls these hooks for every optimizer, whoever made it. So a scheduler is told of a step on its layers also when a
library makes a new optimizer in every training, or when an optimizer is wrapped in another. They are registered when
the first scheduler is made, and hold weak references only.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any, Protocol

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from p4flows.training.optimizers import inside

__all__ = ["Watcher", "watch", "watchers"]


class Watcher(Protocol):
    """Whoever wants to be told of optimizer steps."""

    def concerns(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer steps on anything that this watcher cares for."""

    def before_step(self, optimizer: Optimizer) -> None:
        """Called once in each such step, when the gradients are there that the innermost optimizer will use."""

    def after_step(self, optimizers: list[Optimizer]) -> None:
        """Called once after each such step, when all is done.

        Where optimizers call the steps of others, these are all that stepped, the outermost first.
        """


class _Step:
    """A step that is being taken, and what it means to whom."""

    def __init__(self, optimizer: Optimizer, concerned: Iterable[Watcher]) -> None:
        # Weak, as a step that raises leaves its entry behind until the thread's next step.
        self.optimizer = weakref.ref(optimizer)
        self.concerned = weakref.WeakSet(concerned)
        self.told: weakref.WeakSet[Watcher] = weakref.WeakSet()
        self.inner: list[tuple[weakref.ref[Optimizer], weakref.WeakSet[Watcher]]] = []


_watchers: weakref.WeakSet[Watcher] = weakref.WeakSet()
_lock = threading.Lock()
_thread = threading.local()  # its ``steps`` are those that are being taken in this thread, the outermost first
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
def _before(optimizer: Optimizer, arguments: tuple, options: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    outer = _enclosing(optimizer)
    step = _Step(optimizer, (watcher for watcher in watchers() if watcher.concerns(optimizer)))
    _thread.steps = [*outer, step]
    if inside(optimizer):  # it will call the step of that one
        return None
    step.told.update(watcher for watcher in step.concerned if not any(watcher in each.told for each in outer))
    if not step.told:
        return None
    closure = arguments[1] if len(arguments) > 1 else options.get("closure")
    if not callable(closure):
        _tell(step, optimizer)
        return None
    closure = _telling(step, optimizer, closure)
    if len(arguments) > 1:
        return (arguments[0], closure, *arguments[2:]), options
    return arguments, {**options, "closure": closure}


def _telling(step: _Step, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
    # The gradients of this step are made by the closure.
    def closure_and_tell() -> Any:
        loss = closure()
        _tell(step, optimizer)
        return loss

    return closure_and_tell


@torch.compiler.disable
def _tell(step: _Step, optimizer: Optimizer) -> None:
    for watcher in list(step.told):
        watcher.before_step(optimizer)


@torch.compiler.disable
def _after(optimizer: Optimizer, *_: object) -> None:
    step = next((each for each in reversed(_steps()) if each.optimizer() is optimizer), None)
    outer = _thread.steps = _enclosing(optimizer)
    if step is None:
        return
    stepped = [*step.inner, (step.optimizer, step.concerned)]
    if outer:
        outer[-1].inner += stepped
    for watcher in list(step.concerned):
        if not any(watcher in each.concerned for each in outer):
            found = [reference() for reference, concerned in stepped if watcher in concerned]
            watcher.after_step([each for each in reversed(found) if each is not None])


def _steps() -> list[_Step]:
    return _thread.__dict__.get("steps", [])


def _enclosing(optimizer: Optimizer) -> list[_Step]:
    """The steps of other optimizers that this thread is in, without those that have raised and so never ended."""
    steps = _steps()
    own = next((i for i, step in enumerate(steps) if step.optimizer() is optimizer), len(steps))
    steps = steps[:own]
    if not steps:
        return []
    running = set()
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if "self" in frame.f_code.co_varnames and isinstance(found := frame.f_locals.get("self"), Optimizer):
            running.add(id(found))
        frame = frame.f_back
    return [step for step in steps if id(step.optimizer()) in running]

"""A warning where P4 layers are trained and nobody merges them, so that they hardly learn.

Nothing is looked at but a few of an optimizer's steps: those of :data:`_LOOKS`. A layer counts as merged where a living
scheduler has it, or where one of its buffers has changed since the look before. torch calls the hook for every
optimizer, so it is registered only when the first P4 layer is made.
"""

from __future__ import annotations

import itertools
import warnings
import weakref

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from p4flows.perturbation import P4Layer, observers
from p4flows.training.finding import held
from p4flows.training.hooks import watchers
from p4flows.training.rounds import Rounds

__all__: list[str] = []

_INTERVALS = 20  # merges that were due, and were not made
_LOOKS = frozenset(1 + _INTERVALS * 10**i for i in range(7)) | {1}
_Seen = tuple[int, tuple[int, ...]]  # the step of a look, and the versions of the layer's buffers

_alive: weakref.WeakSet[P4Layer] = weakref.WeakSet()
_warned: weakref.WeakSet[P4Layer] = weakref.WeakSet()
_steps: weakref.WeakKeyDictionary[Optimizer, itertools.count] = weakref.WeakKeyDictionary()
_seen: weakref.WeakKeyDictionary[Optimizer, weakref.WeakKeyDictionary[P4Layer, _Seen]] = weakref.WeakKeyDictionary()
_registered = False


def _notice(layer: P4Layer) -> None:
    global _registered
    _alive.add(layer)
    if not _registered:
        _registered = True
        register_optimizer_step_post_hook(_after)


observers.append(_notice)


@torch.compiler.disable
def _after(optimizer: Optimizer, *_: object) -> None:
    step = next(_steps.setdefault(optimizer, itertools.count(1)))
    if step in _LOOKS:
        _look(optimizer, step)


def _look(optimizer: Optimizer, step: int) -> None:
    ids = held(optimizer)
    try:
        trained = [layer for layer in _alive if layer.training and _stepped_on(layer, ids)]
        served = {
            id(each) for watcher in watchers() if isinstance(watcher, Rounds) for each in watcher.served().values()
        }
    except RuntimeError:  # another thread is building a model at this moment
        return
    seen = _seen.setdefault(optimizer, weakref.WeakKeyDictionary())
    unmerged = []
    for layer in trained:
        if id(layer) in served or layer in _warned:
            continue
        versions = tuple(0 if buffer.is_inference() else buffer._version for buffer in layer.buffers())
        first, before = seen.setdefault(layer, (step, versions))
        if before != versions:
            seen[layer] = step, versions
        elif step - first >= _INTERVALS * layer.merge_every:
            unmerged.append(layer)
    if unmerged:
        _warned.update(trained)
        kinds = ", ".join(sorted({type(layer).__name__ for layer in unmerged}))
        warnings.warn(
            f"P4 layers ({len(unmerged)}: {kinds}) have been trained for {step} steps and never merged, so that they "
            "hardly learn: after making the optimizer, call p4flows.MergeScheduler(model, optimizer).attach(), or, "
            "where a library makes it, p4flows.attach_on_first_step(model)",
            stacklevel=4,
        )


def _stepped_on(layer: P4Layer, ids: frozenset[int]) -> bool:
    try:
        return any(id(p) in ids and p.requires_grad and p.grad is not None for p in layer.perturbation)
    except AttributeError:  # a constructor that has not come to its end
        return False

"""What becomes of an optimizer's per-parameter state at a merge, for some parameters only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from p4flows.training.optimizers import ENTRIES

__all__ = ["StateReset"]

_Held = list[tuple[int, dict[str, Any]]]  # the parameter's number, and its state


class StateReset:
    """The state that optimizers keep for parameters of one shape; it is changed in place.

    State that does not exist yet (before the first step) is left alone, and so is everybody else's. Call :meth:`look`
    before a merge, and the others after it.
    """

    def __init__(self, optimizers: Sequence[Optimizer], parameters: Sequence[nn.Parameter]) -> None:
        self.optimizers = list(optimizers)
        self.parameters: list[Tensor] = list(parameters)
        self._held: dict[str, _Held] = {}
        self._before: Tensor | None = None

    @torch.no_grad()
    def look(self, only_weights: bool = False, exact: bool = True) -> None:
        """Find the state there is.

        ValueError for an entry that is not known, unless only copies of the weights matter (``only_weights``); and for
        such a copy, unless it can be moved along without loss (``exact``). The average of ASGD is excepted, as ASGD
        itself never reads it.
        """
        self._held, self._before = {}, None
        states = {id(optimizer.state): optimizer.state for optimizer in self.optimizers}.values()  # some share theirs
        for state in states:
            for i, parameter in enumerate(self.parameters):
                entries = state.get(parameter, {})
                for name, value in entries.items():
                    if value is not None:
                        self._held.setdefault(name, []).append((i, entries))
        kinds = " in ".join(type(optimizer).__name__ for optimizer in reversed(self.optimizers))
        for name in self._held:
            role = ENTRIES[name].role if name in ENTRIES else "unknown"
            if role == "unknown" and not only_weights:
                raise ValueError(
                    f"optimizer: what {kinds} keeps as {name!r} is not known, and a merge gives U and V another "
                    'meaning. InvertibleLinear works with it; reset="none" is right if this is no copy of '
                    "the weights"
                )
            if role == "origin" or (role == "weight" and not exact and name != "ax"):
                raise ValueError(
                    f"optimizer: {kinds} keeps a copy of the weights, {name!r}, which a merge makes wrong. "
                    "InvertibleLinear works with it"
                )
            if role == "weight":
                self._before = torch.stack(self.parameters)

    @property
    def found(self) -> bool:
        """Whether there is any state."""
        return bool(self._held)

    @torch.no_grad()
    def restart(self, which: Tensor, roles: Sequence[str] = ("gradient", "size", "count")) -> None:
        """Set the state of the i-th parameter to where it started from, where ``which[i]``.

        ``which`` is a bool tensor (len(parameters),) on their device. Moments are selected on the device; the host
        waits at most once, for optimizers that keep their step counts there. What is not known starts as if there had
        been no step before.
        """
        if not _any(which):
            return
        chosen: list[bool] | None = which.tolist() if which.device.type == "cpu" else None
        for name, held in self._held.items():
            if name not in ENTRIES:
                chosen = which.tolist() if chosen is None else chosen
                for i, state in held:
                    if chosen[i]:
                        state.clear()
                continue
            if ENTRIES[name].role not in roles:
                continue
            for start, part in self._starts(name, held):
                on_device = [
                    (i, s[name]) for i, s in part if isinstance(s[name], Tensor) and s[name].device.type != "cpu"
                ]
                if on_device:
                    for i, value in on_device:
                        value.masked_fill_(which.to(value.device)[i], start)
                if len(on_device) < len(part):
                    chosen = which.tolist() if chosen is None else chosen
                    _assign([s for i, s in part if chosen[i]], name, start)

    @torch.no_grad()
    def carry(self, which: Tensor, T: Tensor) -> None:
        """Multiply averages of gradients (..., k) of the i-th parameter with ``T[i]`` (k, k), where ``which[i]``."""
        for name, held in self._held.items() if _any(which) else ():
            if name in ENTRIES and ENTRIES[name].role == "gradient":
                index, moments = _stacked(name, held, T.device)
                old = torch.stack(moments)
                _store(moments, old @ T[index].to(old.dtype), old, which[index])

    @torch.no_grad()
    def move(self, which: Tensor, T: Tensor | None) -> None:
        """Move copies of the i-th parameter along with it, where ``which[i]``.

        Their distance from the parameter as it was at :meth:`look` is multiplied with ``T[i]`` (k, k), or becomes zero
        without T.
        """
        if self._before is None or not _any(which):
            return
        now = torch.stack(self.parameters)
        for name, held in self._held.items():
            if name in ENTRIES and ENTRIES[name].role == "weight":
                index, copies = _stacked(name, held, now.device)
                old = torch.stack(copies).view_as(now[index])
                new = now[index]
                if T is not None:
                    new = new + (old - self._before[index]) @ T[index].to(old.dtype)
                _store(copies, new, old, which[index])

    def _starts(self, name: str, held: _Held) -> list[tuple[float, _Held]]:
        start = ENTRIES[name].start
        if not isinstance(start, str):
            return [(start, held)]
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        of = {id(p): float(group[start]) for group in groups if start in group for p in group["params"]}
        return [(of[id(self.parameters[i])], [(i, state)]) for i, state in held]


def _any(which: Tensor) -> bool:
    return not which.is_cpu or bool(which.any())  # elsewhere, asking would mean waiting


def _stacked(name: str, held: _Held, device: torch.device) -> tuple[Tensor, list[Tensor]]:
    rows, tensors = zip(*((i, state[name]) for i, state in held), strict=True)
    return torch.tensor(rows, device=device), list(tensors)


def _store(targets: list[Tensor], new: Tensor, old: Tensor, which: Tensor) -> None:
    new = torch.where(which.view(-1, *[1] * (old.ndim - 1)), new, old)
    torch._foreach_copy_(targets, [part.view_as(target) for part, target in zip(new, targets, strict=True)])


def _assign(states: list[dict[str, Any]], name: str, start: float) -> None:
    tensors = [state[name] for state in states if isinstance(state[name], Tensor) and state[name].device.type == "cpu"]
    if tensors:
        torch._foreach_zero_(tensors)
        if start:
            torch._foreach_add_(tensors, start)
    for state in states:
        if not isinstance(state[name], Tensor):
            state[name] = type(state[name])(start)

"""Setting an optimizer's per-parameter state back to where it started, for some parameters only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["StateReset"]

# What the optimizers of torch.optim put into state[parameter], and the value each entry starts from.
_INITIAL = {
    "step": 0.0,
    "momentum_buffer": 0.0,  # SGD, RMSprop, Muon
    "exp_avg": 0.0,  # Adam, AdamW, NAdam, RAdam, Adamax, SparseAdam
    "exp_avg_sq": 0.0,
    "max_exp_avg_sq": 0.0,
    "exp_inf": 0.0,
    "square_avg": 0.0,  # RMSprop, Adadelta
    "grad_avg": 0.0,
    "acc_delta": 0.0,
    "mu_product": 1.0,  # NAdam
}


# Averages of gradients: they point somewhere, the others only say how large gradients are.
_FIRST_MOMENTS = {"momentum_buffer", "exp_avg", "grad_avg"}


class StateReset:
    """Sets the optimizer state of parameters of one shape back to its initial values, in place.

    State that does not exist yet (before the first step) is left alone, and so is everybody else's.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> None:
        self.optimizer = optimizer
        self.parameters = list(parameters)

    @torch.no_grad()
    def __call__(self, which: Tensor, first_moments_only: bool = False) -> None:
        """Reset the state of the i-th parameter where ``which[i]``, a bool tensor (len(parameters),) on their device.

        Moments are selected on the device; the host waits at most once, for optimizers that keep their step counts
        there. Raises ValueError for a state entry whose initial value is not known (such as Rprop's step sizes).
        """
        if which.device.type == "cpu" and not which.any():  # elsewhere, asking would mean waiting
            return
        states = [(i, self.optimizer.state[p]) for i, p in enumerate(self.parameters) if p in self.optimizer.state]
        chosen: list[bool] | None = which.tolist() if which.device.type == "cpu" else None
        for name in set().union(*(state for _, state in states)):
            if name not in _INITIAL:
                chosen = which.tolist() if chosen is None else chosen
                if any(chosen[i] and state.get(name) is not None for i, state in states):
                    raise ValueError(
                        f"optimizer: the initial value of {type(self.optimizer).__name__}'s state {name!r} "
                        'is not known; use reset="none"'
                    )
                continue
            if first_moments_only and name not in _FIRST_MOMENTS:
                continue
            on_host, on_device = [], []
            for i, state in states:
                value = state.get(name)
                if isinstance(value, Tensor) and value.device.type != "cpu":
                    on_device.append((i, value))
                elif value is not None:
                    on_host.append((i, state))
            if on_device:
                _select(*zip(*on_device, strict=True), which, _INITIAL[name])
            if on_host:
                chosen = which.tolist() if chosen is None else chosen
                _assign([state for i, state in on_host if chosen[i]], name)

    @torch.no_grad()
    def carry(self, which: Tensor, T: Tensor) -> None:
        """Multiply the first moments (..., k) of the i-th parameter with ``T[i]`` (k, k), where ``which[i]``."""
        states = [(i, self.optimizer.state[p]) for i, p in enumerate(self.parameters) if p in self.optimizer.state]
        for name in _FIRST_MOMENTS & set().union(*(state for _, state in states)):
            held = [(i, state[name]) for i, state in states if state.get(name) is not None]
            rows, moments = zip(*held, strict=True)
            index = torch.tensor(rows, device=T.device)
            old = torch.stack(moments)
            new = torch.where(which[index].view(-1, *[1] * (old.ndim - 1)), old @ T[index].to(old.dtype), old)
            torch._foreach_copy_(list(moments), list(new.unbind()))


def _assign(states: list[dict], name: str) -> None:
    tensors = [state[name] for state in states if isinstance(state[name], Tensor)]
    if tensors:
        torch._foreach_zero_(tensors)
        if _INITIAL[name]:
            torch._foreach_add_(tensors, _INITIAL[name])
    for state in states:
        if not isinstance(state[name], Tensor):
            state[name] = type(state[name])(_INITIAL[name])


def _select(rows: Sequence[int], values: Sequence[Tensor], which: Tensor, initial: float) -> None:
    mask = which.to(values[0].device)
    for i, value in zip(rows, values, strict=True):
        value.masked_fill_(mask[i], initial)

"""Setting an optimizer's per-parameter state back to where it started, for some parameters only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from p4flows._stacked import Stacked

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
        self._stacks: dict[tuple, Stacked] = defaultdict(Stacked)

    @torch.no_grad()
    def __call__(self, which: Tensor, first_moments_only: bool = False) -> None:
        """Reset the state of the i-th parameter where ``which[i]``, a bool tensor (len(parameters),) on their device.

        Moments are selected on the device; the host waits at most once, for optimizers that keep their step counts
        there. Raises ValueError for a state entry whose initial value is not known (such as Rprop's step sizes).
        """
        if which.device.type == "cpu" and not which.any():  # elsewhere, asking would mean waiting
            return
        index = [i for i, p in enumerate(self.parameters) if p in self.optimizer.state]
        states = [self.optimizer.state[self.parameters[i]] for i in index]
        masks = {which.device: which}
        for name in set().union(*states):
            values = [state.get(name) for state in states]
            if name not in _INITIAL:
                if any(which[i] for i, value in zip(index, values, strict=True) if value is not None):
                    raise ValueError(
                        f"optimizer: the initial value of {type(self.optimizer).__name__}'s state {name!r} "
                        'is not known; use reset="none"'
                    )
                continue
            if first_moments_only and name not in _FIRST_MOMENTS:
                continue
            places = [value.device if isinstance(value, Tensor) else type(value) for value in values]
            for place in dict.fromkeys(places):
                if place is type(None):
                    continue
                if not isinstance(place, torch.device):
                    for i, state in zip(index, states, strict=True):
                        if type(state.get(name)) is place and which[i]:
                            state[name] = place(_INITIAL[name])
                    continue
                if place not in masks:
                    masks[place] = which.to(place)
                mask, here = masks[place], values
                if places.count(place) < len(which):
                    kept = [(i, value) for i, value, other in zip(index, values, places, strict=True) if other == place]
                    rows, here = zip(*kept, strict=True)
                    mask = mask[torch.tensor(rows, device=place)]
                if len(here) == 1:
                    here[0].masked_fill_(mask[0], _INITIAL[name])
                else:
                    whole = self._stacks[name, place].of(here)
                    whole.masked_fill_(mask.view(-1, *[1] * (whole.ndim - 1)), _INITIAL[name])

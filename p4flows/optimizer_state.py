"""Setting an optimizer's per-parameter state back to where it started, for some parameters only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["reset_state"]

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


@torch.no_grad()
def reset_state(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], which: Tensor) -> None:
    """Set the state of ``parameters[i]`` back to its initial value where ``which[i]``, in place.

    ``which`` (len(parameters),) is a bool tensor and may live on the device: moments are selected there, and the
    host waits at most once, for optimizers that keep their step counts on the host. State that does not exist yet
    (before the first step) is left alone, and so is everybody else's.

    Raises ValueError for a state entry whose initial value is not known (such as Rprop's step sizes).
    """
    entries: dict[tuple, list[tuple[int, Tensor]]] = defaultdict(list)
    for i, parameter in enumerate(parameters):
        state = optimizer.state.get(parameter, {})
        for name, value in state.items():
            if name not in _INITIAL:
                if not which[i]:
                    continue
                raise ValueError(
                    f"optimizer: the initial value of {type(optimizer).__name__}'s state {name!r} is not known; "
                    'use reset="none"'
                )
            if isinstance(value, Tensor):
                entries[_INITIAL[name], value.shape, value.dtype, value.device].append((i, value))
            elif value is not None and which[i]:
                state[name] = type(value)(_INITIAL[name])

    masks = {which.device: which}
    for (initial, shape, _, device), rows in entries.items():
        if device not in masks:
            masks[device] = which.to(device)
        index, values = zip(*rows, strict=True)
        mask = masks[device]
        if len(index) != len(mask):
            mask = mask[torch.tensor(index, device=device)]
        mask = mask.view(-1, *[1] * len(shape))
        torch._foreach_copy_(list(values), torch.stack(values).masked_fill_(mask, initial).unbind())

"""What is known of optimizers: what they keep for a parameter, and which of them are inside others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

from p4flows.perturbation import P4Layer

__all__ = ["ENTRIES", "Entry", "full_rank", "inside", "refuse_unknown", "stepping", "unwrapped"]


class Entry(NamedTuple):
    """An entry of ``optimizer.state[parameter]``.

    role: "gradient" for averages of gradients, which point somewhere; "size" for what says how large gradients are;
    "count" for numbers of steps and the like; "weight" for copies and averages of the parameter itself; "origin" for
    copies that say how far it has come; "passing" for what is written anew before it is read.
    start: the value that it starts from, or the name of the option of the parameter group that has it.
    """

    role: str
    start: float | str = 0.0


_WEIGHT = Entry("weight")

ENTRIES = {
    "step": Entry("count"),
    "momentum_buffer": Entry("gradient"),  # SGD, RMSprop, Muon
    "exp_avg": Entry("gradient"),  # Adam and its relatives, Lion
    "grad_avg": Entry("gradient"),  # RMSprop
    "prev": Entry("gradient"),  # Rprop
    "exp_avg_sq": Entry("size"),
    "max_exp_avg_sq": Entry("size"),
    "exp_inf": Entry("size"),  # Adamax
    "square_avg": Entry("size"),  # RMSprop, Adadelta
    "acc_delta": Entry("size"),  # Adadelta
    "sum": Entry("size", "initial_accumulator_value"),  # Adagrad
    "step_size": Entry("size", "lr"),  # Rprop
    "row_var": Entry("size"),  # Adafactor, to "variance"
    "col_var": Entry("size"),
    "variance": Entry("size"),
    "mu_product": Entry("count", 1.0),  # NAdam
    "eta": Entry("count", "lr"),  # ASGD
    "mu": Entry("count", 1.0),  # ASGD
    "old_p": Entry("passing"),  # SAM
    "e_w": Entry("passing"),  # SAM
    "ax": _WEIGHT,  # ASGD
    "z": _WEIGHT,  # schedule-free
    **dict.fromkeys(["slow_params", "slow_param", "slow_buffer", "lookahead_slow_buff", "cached_params"], _WEIGHT),
    **dict.fromkeys(["p0", "x0", "init_buffer"], Entry("origin")),  # Prodigy, and other searches for a learning rate
}
"""What is known of ``optimizer.state[parameter]``, by name."""

_optim = torch.optim
_KNOWN = (
    *(_optim.Adadelta, _optim.Adafactor, _optim.Adagrad, _optim.Adam, _optim.AdamW, _optim.Adamax, _optim.ASGD),
    *(_optim.NAdam, _optim.RAdam, _optim.RMSprop, _optim.Rprop, _optim.SGD, _optim.SparseAdam),
    *([_optim.Muon] if hasattr(_optim, "Muon") else []),
)
_KNOWN_ELSEWHERE = {"Lion", "FusedAdam", "FusedSGD", "FusedLAMB"}
# Those that leave all state to the optimizer inside, or have theirs for the time of a step only.
_TRANSPARENT = {"SAM", "ASAM", "ZeroRedundancyOptimizer", "PostLocalSGDOptimizer", "DPOptimizer"}
# Those of them that evaluate the loss elsewhere than at the weights.
_ELSEWHERE = {"SAM", "ASAM"}
# Those that are no optimizers themselves, or were never initialised as such: the hooks see the one inside only.
_FACADES = {"AcceleratedOptimizer", "LightningOptimizer"}

_ANY = "InvertibleLinear works with it"


def unwrapped(optimizer: Any) -> Optimizer:
    """The optimizer itself, where a library has put one of its own kind around it; ValueError for other things."""
    while _names(optimizer) & _FACADES:
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, Optimizer):
        found = _inner(optimizer)
        hint = "; make the scheduler with None, and call its step() after each step" if found else ""
        raise ValueError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}{hint}")
    return optimizer


def inside(optimizer: Optimizer) -> Optimizer | None:
    """The optimizer whose step this one calls, if it has one as an attribute."""
    return _inner(optimizer)


def stepping(optimizer: Optimizer) -> list[Optimizer]:
    """This optimizer and those inside it, the outermost first."""
    found = [optimizer]
    while (inner := _inner(found[-1])) is not None and not any(inner is each for each in found):
        found.append(inner)
    return found


def refuse_unknown(optimizers: Sequence[Optimizer], layers: Iterable[P4Layer], reset: str) -> None:
    """ValueError if merges of these layers would make wrong what an optimizer keeps, and nothing can be done for it.

    A merge gives the entries of U and V another meaning. Layers that have no such parameters go with any optimizer.
    """
    layers = list(layers)
    for optimizer in optimizers if layers else ():
        if isinstance(optimizer, torch.optim.LBFGS) and any(_searches(group) for group in optimizer.param_groups):
            raise ValueError(
                "optimizer: LBFGS evaluates the loss many times in a step, but layers follow their weights after it. "
                "Give it max_iter=1 and no line search for InvertibleLinear, and use another one for P4Inv"
            )
        if _names(optimizer) & _ELSEWHERE and any(layer.deferred for layer in layers):
            raise ValueError(
                f"optimizer: {type(optimizer).__name__} evaluates the loss where it moves the weights for the time of "
                "a step, but the matrix of an InvertibleLinear follows after it. Use the optimizer inside, or P4Inv"
            )
    layers = [layer for layer in layers if layer.zeroed or layer.redrawn]
    if not layers:
        return
    for optimizer in optimizers:
        name, names = type(optimizer).__name__, _names(optimizer)
        lower = name.lower()
        if isinstance(optimizer, torch.optim.LBFGS) or "lbfgs" in lower:
            raise ValueError(
                f"optimizer: {name} keeps a history of its steps over all parameters, which a merge makes wrong. Train "
                "without a MergeScheduler, and between trainings call merge() of the layers and make a new "
                f"{name}; or use another optimizer"
            )
        if "lookahead" in lower:
            raise ValueError(
                f"optimizer: {name} keeps a second copy of the weights, which a merge makes wrong. {_ANY}; or use the "
                "optimizer inside alone, and p4flows.AveragedModel for averages"
            )
        if "schedulefree" in lower:
            if not all(full_rank(layer) for layer in layers):
                raise ValueError(
                    f"optimizer: {name} keeps a second copy of the weights, which a merge can move along only if the "
                    f"perturbation has full rank, as P4Inv(n, rank=n) with n > 1. {_ANY}"
                )
            continue
        known = isinstance(optimizer, _KNOWN) or names & (_KNOWN_ELSEWHERE | _TRANSPARENT)
        if not known and reset != "none":
            raise ValueError(
                f"optimizer: what {name} keeps for a parameter is not known, and a merge gives U and V another "
                f'meaning. Use one of torch.optim; {_ANY}; or choose reset="none", which is right only if {name} keeps '
                "averages of gradients and no copies of the weights"
            )


def _searches(group: dict[str, Any]) -> bool:
    return group.get("max_iter", 1) > 1 or group.get("line_search_fn") is not None


def full_rank(layer: P4Layer) -> bool:
    """Whether a move from the old directions to the new ones loses nothing."""
    directions = layer.redrawn if layer.additive else ()
    return bool(directions) and all(_square(p) and not p.requires_grad for p in directions)


def _square(p: torch.Tensor) -> bool:
    return p.ndim > 1 and p.shape[-1] == p.shape[-2] > 1


def _names(optimizer: Any) -> set[str]:
    return {kind.__name__ for kind in type(optimizer).__mro__}


def _inner(optimizer: Any) -> Optimizer | None:
    attributes = getattr(optimizer, "__dict__", {}).values()
    return next((each for each in attributes if isinstance(each, Optimizer) and each is not optimizer), None)

"""Random sequences of what can happen to a layer."""

from __future__ import annotations

import torch

from p4flows.outcomes import MergeOutcome
from p4flows.testing.case import Case, Outputs, keeps_function

__all__ = ["sequences"]

_OPERATIONS = {
    "perturb": 0.35,
    "train others": 0.05,
    "merge": 0.25,
    "force": 0.1,
    "correct": 0.05,
    "reset": 0.1,
    "not finite": 0.1,
}


def sequences(case: Case) -> None:
    """Over random perturbations, merges, forced merges, corrections and resets the property and the contract hold."""
    layer, generator = case.changed(case.new()), case.generator(10)
    trained = case.trained(layer)
    names, weights = list(_OPERATIONS), torch.tensor(list(_OPERATIONS.values()))
    frozen: Outputs | None = case.outputs(layer)  # of A alone; None while that is not known
    for step in range(case.steps):
        name = names[torch.multinomial(weights, 1, generator=generator)]
        when = f"step {step}, {name}"
        before = case.outputs(layer)
        if name == "perturb":
            case.perturb(layer, generator)
            if layer.deferred:
                case.assert_close(before, case.outputs(layer), f"{when} changes a deferred function")
        elif name == "train others":
            case.perturb_others(layer, generator)
            frozen = None
        elif name in ("merge", "force"):
            outcome = case.merge(layer, force=name == "force")
            after = case.outputs(layer)
            if keeps_function(outcome) and not layer.deferred:
                case.assert_close(before, after, f"{when} changes the function")
            skipped = MergeOutcome.is_skip(outcome)
            if layer.deferred or not skipped.any():
                frozen = after
            elif not skipped.all():
                frozen = None
        elif name == "correct":
            layer.correct()
            case.assert_close(before, case.outputs(layer), f"{when} changes the function")
        else:
            if name == "not finite" and trained:
                p = trained[step % len(trained)].detach()
                p.view(-1)[step % p.numel()] = (float("nan"), float("inf"), float("-inf"))[step % 3]
                outcome = case.merge(layer, force=step % 2 == 0)
                frozen = frozen if outcome.numel() == 1 else None  # elsewhere the other matrices have merged
            layer.reset()
            after = case.outputs(layer)
            if frozen is not None:
                case.assert_close(frozen, after, f"{when} does not go back to the frozen parameters")
            frozen = after
        case.assert_holds(layer, when)

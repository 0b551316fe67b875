"""The check of gradients, against differences of the outputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from p4flows.perturbation import P4Layer
from p4flows.testing.bijection import inverse_of
from p4flows.testing.case import Case, Outputs, require

__all__ = ["gradients"]

_STEP = 1e-6
_TOLERANCE = 1e-5


def gradients(case: Case) -> None:
    """At B₀ a gradient reaches the perturbation; it, and that of the inputs, are those of differences in float64."""
    layer = case.changed(case.new())
    trained = case.trained(layer)
    outputs = [out for out in case.call(layer) if out.requires_grad]
    if trained:
        require(outputs, "expected an output that requires gradients")
        weights = [_noise(out, case.generator(4)) for out in outputs]
        possible = torch.autograd.grad(outputs, trained, weights, allow_unused=True)
        found = [gradient for gradient in possible if gradient is not None]
        require(all(gradient.isfinite().all() for gradient in found), "expected a finite gradient")
        require(any(gradient.abs().max() > 0 for gradient in found), "expected a gradient that is not zero at B0")
    for perturbed in (False, True):
        layer = case.changed(case.new()).double()
        if perturbed:
            case.perturb(layer, case.generator(12))
            case.perturb_others(layer, case.generator(13))
        device = layer.perturbation[0].device
        x = [part.to(device, torch.float64) for part in case.example]
        _compare(case, layer, layer, x, f"forward, perturbed: {perturbed}")
        inverse = inverse_of(layer)
        if inverse is not None:
            y = [out.detach() for out in case.call_with(layer, x)[: len(x)]]
            _compare(case, layer, inverse, y, f"inverse, perturbed: {perturbed}")


def _compare(case: Case, layer: P4Layer, function: Callable, x: Outputs, what: str) -> None:
    """The derivative of a random sum of all outputs along a random direction, by autograd and by a difference."""
    generator = case.generator(14)
    own = {id(p) for p in layer.perturbation} if layer.deferred else set()
    parameters = [p for p in layer.parameters() if p.requires_grad and id(p) not in own]
    x = [part.clone().requires_grad_() for part in x]
    weights = [_noise(out, generator) for out in case.call_with(function, x)]

    def loss() -> Tensor:
        values = case.call_with(function, x)
        return torch.stack([(w * v).sum() for w, v in zip(weights, values, strict=True)]).sum()

    for name, variables in (("the inputs", x), ("the parameters", parameters)):
        if not variables:
            continue
        direction = [_noise(v, generator) for v in variables]
        value = loss()
        found = torch.autograd.grad(value, variables, allow_unused=True) if value.requires_grad else [None] * len(x)
        slope = sum(float((g * d).sum()) for g, d in zip(found, direction, strict=False) if g is not None)
        ends = []
        for sign in (1, -2):
            _move(variables, direction, sign * _STEP)
            ends.append(float(loss().detach()))
        _move(variables, direction, _STEP)
        expected = (ends[0] - ends[1]) / (2 * _STEP)
        size = 1 + abs(expected) + abs(float(value.detach()))
        require(
            abs(slope - expected) <= _TOLERANCE * size,
            f"{what}: expected the derivative {expected:.6g} with respect to {name}, got {slope:.6g}",
        )


@torch.no_grad()
def _move(variables: list[Tensor] | list[nn.Parameter], direction: Outputs, step: float) -> None:
    for variable, d in zip(variables, direction, strict=True):
        variable.add_(d, alpha=step)


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)

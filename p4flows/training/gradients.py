"""Gradients of perturbations: those of a penalty, added for a loop whose loss is out of reach; and that they come."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from p4flows.perturbation import P4Layer
from p4flows.training.finding import held

__all__ = ["add_gradients", "listen"]


def add_gradients(layers: Iterable[P4Layer], optimizer: Optimizer) -> None:
    """Add the gradients of the layers' penalties to those that the optimizer is about to use."""
    ids = held(optimizer)
    penalties, parameters = [], []
    with torch.enable_grad():
        for layer in layers:
            own = [p for p in layer.perturbation if p.requires_grad and id(p) in ids]
            penalty = layer.penalty() if own else None
            if penalty is not None and penalty.requires_grad:
                penalties.append(penalty)
                parameters += own
    if not penalties:
        return
    # A fused optimizer under a GradScaler unscales the gradients itself, after this.
    scale = getattr(optimizer, "grad_scale", None)
    for p, gradient in zip(parameters, torch.autograd.grad(penalties, parameters, allow_unused=True), strict=True):
        if gradient is not None:
            gradient = gradient if scale is None else gradient * scale.to(gradient)
            p.grad = gradient if p.grad is None else p.grad.add_(gradient)


def listen(owner: Any, layers: Iterable[P4Layer], name: str) -> None:
    """Call the owner's method of this name whenever a gradient has come to the first of the layers that is trained.

    The owner is held weakly, and the hook goes when it goes. Copies of the layer are without.
    """
    parameter = next((p for layer in layers for p in layer.perturbation if p.requires_grad), None)
    if parameter is None:
        return
    reference = weakref.ref(owner)

    def tell(_: Tensor) -> None:
        alive = reference()
        if alive is not None:
            getattr(alive, name)()

    handle = parameter.register_post_accumulate_grad_hook(tell)
    weakref.finalize(owner, handle.remove)

"""The whole training step of one linear layer, of every kind that `layer` compares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed.layers import LAYERS, Layer, Make, p4inv
from benchmarks.speed.relative_gradient import RelativeGradient
from benchmarks.speed.tenth import EveryTenth
from benchmarks.speed.woodbury import Woodbury
from p4flows import InvertibleLinear, MergeScheduler, P4Inv

__all__ = ["BATCH", "MERGING", "METHODS", "PLAIN", "Step", "begin"]

Step = Callable[[], None]
BATCH = 32
_RATE = 1e-4


def _woodbury(rank: int) -> Make:
    def make(n: int, device: torch.device) -> Layer:
        layer = Woodbury(n, rank).to(device)
        return Layer(layer, layer, layer.inverse)

    return make


def _relative_gradient(n: int, device: torch.device) -> Layer:
    layer = RelativeGradient(n).to(device)
    return Layer(layer, layer, None)


PLAIN = "nn.Linear"
METHODS: dict[str, Make] = {
    PLAIN: LAYERS[PLAIN],
    "P4Inv, rank 1": LAYERS["P4Inv rank 1"],
    "P4Inv": p4inv(None),
    "InvertibleLinear": LAYERS["InvertibleLinear"],
    "bgflow InvertiblePPPP": LAYERS["bgflow InvertiblePPPP"],
    "nflows LULinear": LAYERS["nflows LULinear"],
    "normflows LULinearPermute": LAYERS["normflows LULinearPermute"],
    "dense": LAYERS["dense solve"],
    "relative gradient": _relative_gradient,
    "Woodbury, rank 16": _woodbury(16),
}
MERGING = ("P4Inv, rank 1", "P4Inv", "bgflow InvertiblePPPP")
"""Those in which one step in ten is a longer one."""


def begin(method: str, n: int, both: bool) -> Step | None:
    """A new layer of width n, and what trains it by one step; None if it does not have both directions.

    A step is: rows drawn anew, gradients to none, values and log|det|, backward, Adam, and merges or following. The
    loss is that of maximum likelihood; in both directions that of a reverse Kullback-Leibler divergence is added.

    ``nn.Linear`` is what all are compared with. It has one direction, and its step is the same with ``both``.
    """
    layer = METHODS[method](n, torch.device("cpu"))
    both = both and method != PLAIN
    if both and layer.inverse is None:
        return None
    optimizer = torch.optim.Adam([p for p in layer.module.parameters() if p.requires_grad], lr=_RATE)
    scheduler = _scheduler(method, layer, optimizer)
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        x = torch.randn(BATCH, n, generator=generator)
        optimizer.zero_grad()
        loss = _loss(*layer.forward(x))
        if both:
            # Rows of its own: with the same ones the gradients would cancel at the identity, where most layers start.
            loss = loss + _loss(*layer.inverse(torch.randn(BATCH, n, generator=generator)))
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()

    return step


def _loss(y: Tensor, logabsdet: Tensor) -> Tensor:
    return y.square().mean() / 2 - logabsdet.mean() / y.shape[-1]


def _scheduler(method: str, layer: Layer, optimizer: torch.optim.Optimizer) -> Any:
    if isinstance(layer.module, P4Inv | InvertibleLinear):
        return MergeScheduler(layer.module, optimizer)
    if method.startswith("bgflow"):
        from bgflow import PPPPScheduler

        return EveryTenth(PPPPScheduler(layer.module, optimizer))
    return None

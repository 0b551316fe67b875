"""Which rank is enough: digits classified with P4Linear of many ranks, and with layers that follow dense steps."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.paper.mnist import digits, fit, network
from benchmarks.properties.following import Following
from p4flows import P4Linear

__all__ = ["METHODS", "train"]


def _replaced(replica: int, rank: int, kind: str) -> nn.Sequential:
    """The standard network, of equal weights at the start, with P4 layers in place of linear layers, or of all."""
    model, count = network(None, replica), 0
    for i, layer in enumerate(model):
        seed = 10 * replica + count
        if isinstance(layer, nn.Linear) and kind == "following":
            model[i] = Following(layer, min(rank, layer.out_features), seed)
        elif isinstance(layer, (nn.Linear, nn.Conv2d) if kind == "convolutions" else nn.Linear):
            model[i] = P4Linear.from_linear(layer, min(rank, *layer.weight.flatten(1).shape), seed)
        else:
            continue
        count += 1
    return model


METHODS: dict[str, Any] = {
    "standard": partial(network, None),
    **{f"rank {k}": partial(_replaced, rank=k, kind="linear") for k in (1, 4, 16, 32, 64, 128)},
    **{f"following, rank {k}": partial(_replaced, rank=k, kind="following") for k in (1, 4, 16)},
    "rank 16, convolutions too": partial(_replaced, rank=16, kind="convolutions"),
}
"""Networks by replica. 128 is the full rank of the wide layer, 9216 × 128; the other one, 128 × 10, has 10 at most."""


def train(
    method: str, lr: float, replica: int, epochs: int, quick: bool = False, data: Path | None = None
) -> dict[str, list[float]]:
    """SGD, merging in every iteration; training loss, test loss and accuracy by epoch."""
    make = METHODS[method]
    model = make(replica=replica)
    return fit(model, lr, replica, epochs, *(part[:128] if quick else part for part in digits(data)))

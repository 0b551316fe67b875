"""A Boltzmann generator's own samples, drawn anew by their weights, as data to train it on: new ones in every round."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from nflows.flows import Flow
from torch import Tensor

from benchmarks.harness.checkpoint import Checkpoint
from benchmarks.paper.boltzmann import Data, generate
from p4flows.molecules import ImportanceWeights

__all__ = ["UNSEEN", "OwnSamples", "resampled"]

UNSEEN = 1_000_000
"""Added to a seed: noise to measure with, on which no round has trained."""

_CLIPPED = 2_000  # one in so many weights is among those that count no more than the least of them


@dataclass
class OwnSamples:
    """Rows for :func:`benchmarks.paper.boltzmann_training.train`: in each round the flow draws new ones.

    A round trains on its own samples and on those of the rounds before, of which each has as many rows as its weights
    make it worth.

    Attributes:
        flow, data: what draws, and what weighs, at the temperature of ``data.energy``.
        count: samples drawn in a round.
        steps: of training in a round.
        file: the file of a round, by its number, from which an interrupted run goes on.
        seed: of the noise.
        beside: rows (B, n) of coordinates from elsewhere.
    """

    flow: Flow
    data: Data
    count: int
    steps: int
    file: Callable[[int], Path]
    seed: int = 0
    beside: Tensor | None = None
    _parts: list[Tensor] = field(default_factory=list)

    def __call__(self, step: int) -> Tensor:
        """The rows for this step of a training, the first of which is 1."""
        rounds = 1 + (step - 1) // self.steps
        if len(self._parts) < rounds:
            self._parts += [self._drawn(i) for i in range(len(self._parts), rounds)]
            self._rows = torch.cat(self._parts if self.beside is None else [self.beside, *self._parts])
        return self._rows

    def _drawn(self, i: int) -> Tensor:
        seed = 1_000 * self.seed + i
        kept = Checkpoint(self.file(i), {"samples": self.count, "seed": seed})
        found = kept.restore()
        if not found:
            training = self.flow.training
            z, _, weights = generate(self.flow, self.data, self.count, seed)
            self.flow.train(training)
            found = {"z": resampled(z, weights, seed)}
            kept.save(**found)
        return found["z"]


def resampled(z: Tensor, weights: ImportanceWeights, seed: int) -> Tensor:
    """Rows of z, drawn by their weights, as many as the weights make them worth.

    The largest weights are clipped, so that no row is all there is.
    """
    log_weights = weights.log_weights
    usable = log_weights > -torch.inf
    if not usable.any():
        raise ValueError("weights: expected some that are not zero, for samples to be drawn by them")
    ceiling = log_weights.topk(1 + int(usable.sum()) // _CLIPPED).values[-1]
    probability = log_weights.clamp(max=ceiling).softmax(0)
    count = max(1, int(1 / probability.square().sum()))
    return z[torch.multinomial(probability, count, True, generator=torch.Generator().manual_seed(seed))]

"""A Boltzmann generator's own samples, with their weights, as data to train it on: new ones in every round."""

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

__all__ = ["OwnSamples", "thinned", "unseen"]

_BESIDE = 0.25
_SPARE = 2  # rows for each that a round needs
_CLIPPED = 2_000  # one in so many weights is among those that count no more than the least of them


@dataclass
class OwnSamples:
    """Rows for :func:`benchmarks.paper.boltzmann_training.train`: in each round the flow draws new ones.

    A round trains on its own samples and on those of the rounds before, all by their weights. A round counts by the
    effective size of its samples, so that one in which the flow was bad counts little.

    Attributes:
        flow, data: what draws, and what weighs, at the temperature of ``data.energy``.
        count: samples drawn in a round.
        steps, batch: of training in a round.
        file: the file of a round, by its number, from which an interrupted run goes on.
        seed: of the noise, from 0 on.
        first: rounds that there were before with the same seed, for other samples, at most a thousand in all.
        beside: rows (B, n) of coordinates from elsewhere, each of which counts a fourth.
    """

    flow: Flow
    data: Data
    count: int
    steps: int
    batch: int
    file: Callable[[int], Path]
    seed: int = 0
    first: int = 0
    beside: Tensor | None = None
    _drawn: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __call__(self, step: int) -> Tensor:
        """The rows for this step of a training, the first of which is 1; they are the same throughout a round."""
        rounds = 1 + (step - 1) // self.steps
        if len(self._drawn) < rounds:
            self._drawn += [self._draw(i, i == rounds - 1) for i in range(len(self._drawn), rounds)]
            beside = self.data.z[:0] if self.beside is None else self.beside
            z, weights = zip((beside, torch.full((len(beside),), _BESIDE).double()), *self._drawn, strict=True)
            generator = torch.Generator().manual_seed(self._noise(rounds - 1))
            which = torch.multinomial(torch.cat(weights), _SPARE * self.steps * self.batch, True, generator=generator)
            self._rows = torch.cat(z)[which]
        return self._rows

    def _noise(self, i: int) -> int:
        return 1_000 * self.seed + self.first + i

    def _draw(self, i: int, last: bool) -> tuple[Tensor, Tensor]:
        seed = self._noise(i)
        kept = Checkpoint(self.file(i), {"samples": self.count, "seed": seed, "clipped": _CLIPPED})
        found = kept.restore()
        if not found and not last:
            raise ValueError(f"{self.file(i)}: expected what was drawn in round {i}, by the flow as it was then")
        if not found:
            training = self.flow.training
            z, _, weights = generate(self.flow, self.data, self.count, seed)
            self.flow.train(training)
            found = dict(zip(("z", "weights"), thinned(z, weights, seed), strict=True))
            kept.save(**found)
        return found["z"], found["weights"]


def unseen(seed: int) -> int:
    """A seed of noise to measure with, on which no round of any seed has trained."""
    return -1 - seed


def thinned(z: Tensor, weights: ImportanceWeights, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of z, and their weights, which sum up to about their effective number.

    The largest weights are clipped, so that no row is all there is. Of rows with less than the mean weight only some
    are kept, by chance and in proportion to it, with the mean weight.
    """
    log_weights = weights.log_weights
    usable = log_weights > -torch.inf
    if not usable.any():
        raise ValueError("weights: expected some that are not zero, for samples to be drawn by them")
    ceiling = log_weights.topk(1 + int(usable.sum()) // _CLIPPED).values[-1]
    share = log_weights.clamp(max=ceiling).softmax(0)
    chance = (share * len(z)).clamp(max=1)
    kept = torch.rand(len(z), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) < chance
    return z[kept], (share / chance)[kept] / share.square().sum()

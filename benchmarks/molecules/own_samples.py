"""Training a Boltzmann generator on its own samples, drawn anew by their weights: they are new in every round."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from nflows.flows import Flow
from torch import Tensor

from benchmarks.harness.checkpoint import Checkpoint
from benchmarks.paper.boltzmann import Data, generate
from benchmarks.paper.boltzmann_training import Stage, train
from p4flows.molecules import ImportanceWeights

__all__ = ["Rounds", "resampled", "train_on_own_samples"]

_CLIPPED = 40  # weights that count no more than the least of them


@dataclass(frozen=True)
class Rounds:
    """``count`` times ``samples`` are drawn, and ``stage`` is done on them.

    The learning rate of the stage is that of the first round, and falls from round to round as half a cosine.
    """

    count: int
    samples: int
    stage: Stage

    def rate(self, i: int) -> float:
        """The learning rate of round i."""
        return self.stage.lr * (1 + math.cos(math.pi * i / self.count)) / 2


def train_on_own_samples(
    flow: Flow, data: Data, rounds: Rounds, file: Callable[[str], Path], average: float, beside: Tensor | None = None
) -> float:
    """Train at the temperature of ``data.energy``, from files on if there are any; the seconds that it took.

    A round trains on its own samples and on those of the rounds before, of which each has as many rows as its weights
    make it worth, and on ``beside``, rows of coordinates from elsewhere.
    """
    rows = [] if beside is None else [beside]
    seconds = 0.0
    for i in range(rounds.count):
        seed = 1_000 * rounds.stage.seed + i
        drawn = Checkpoint(file(f"samples {i}"), {"samples": rounds.samples, "seed": seed})
        found = drawn.restore()
        if not found:
            start = time.perf_counter()
            z, _, weights = generate(flow, data, rounds.samples, seed)
            found = {"z": resampled(z, weights, seed), "seconds": time.perf_counter() - start}
            drawn.save(**found)
        rows.append(found["z"])
        stage = replace(rounds.stage, lr=rounds.rate(i), seed=seed)
        name = f"round {i}"
        training = train(flow, replace(data, z=torch.cat(rows)), stage, name, file(name), average=average)
        seconds += found["seconds"] + training["ms_per_step"] * stage.steps / 1000
    return seconds


def resampled(z: Tensor, weights: ImportanceWeights, seed: int) -> Tensor:
    """Rows of z, drawn by their weights, as many as the weights make them worth.

    The largest weights are clipped, so that no row is all there is.
    """
    log_weights = weights.log_weights
    ceiling = log_weights.topk(min(_CLIPPED, len(z))).values[-1]
    probability = log_weights.clamp(max=ceiling).softmax(0)
    count = max(1, int(1 / probability.square().sum()))
    return z[torch.multinomial(probability, count, True, generator=torch.Generator().manual_seed(seed))]

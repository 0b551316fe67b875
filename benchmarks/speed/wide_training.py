"""The training of one flow of `wide` for so many seconds, whatever number of steps that is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from nflows.flows import Flow
from torch import Tensor

from benchmarks.harness.device import now
from benchmarks.mixing.training import CLIP, build
from benchmarks.speed.wide_curves import BOTH
from benchmarks.speed.wide_data import Source, load
from p4flows import MergeScheduler

__all__ = ["train"]

_PARTS = ("validation", "test")
_HELD_OUT = 400  # rows of each
_SEEDS = 1_000_000  # theirs begin here, as rows of a seed that trains would be rows for training
_FIRST_LOOK = 1 / 40  # of the budget; the others are spread evenly in logarithm up to its end
_ENERGY_WEIGHT = 0.05  # of the reverse divergence, as in the training by energy of `alanine_dipeptide`
_WARM_UP = 11  # steps, so that there is a merge among them


def train(
    problem: str,
    n: int,
    budget: float,
    directions: str,
    device: str,
    batch: int,
    seed: int,
    looks: int = 20,
    **options: Any,
) -> dict[str, Any]:
    """Train for ``budget`` seconds at constant learning rates; ``options`` are those of ``mixing.training.build``.

    The loss is the mean negative log-likelihood of fresh rows and, in both directions, 0.05 times the reverse
    Kullback-Leibler divergence, estimated with as many samples, to the density of the energy. Held-out likelihoods are
    measured at the start and ``looks`` times more, while the clock stands still. On a processor the seconds are those
    of one thread, so that what else the machine does counts as little as can be.

    Returns lists over these times: seconds, steps, and the NLL a dimension of the rows for validation and test. A
    training whose NLL is not finite ends there. Then what became of the merges, and the least test NLL that is
    possible, if known.
    """
    place = torch.device(device)
    clock = time.process_time if place.type == "cpu" else partial(now, place)
    # What happens once in a process must not count: libraries are loaded, and kernels chosen.
    for step in [_begin(load(problem, 16, place), directions, batch, seed, place, options)[1]] * _WARM_UP:
        step()
    source = load(problem, n, place)
    flow, step, scheduler = _begin(source, directions, batch, seed, place, options)
    rows = torch.cat([source.draw(_HELD_OUT, _generator(_SEEDS + i, place), part) for i, part in enumerate(_PARTS)])
    found: dict[str, list[float]] = {key: [] for key in ("seconds", "steps", *_PARTS)}
    times = [budget * _FIRST_LOOK ** (i / max(1, looks - 1)) for i in reversed(range(looks))]
    seconds, steps = 0.0, 0
    while True:
        values = _nll(flow, rows)
        if not all(map(math.isfinite, values)):
            break
        for key, value in zip(found, (seconds, steps, *values), strict=True):
            found[key].append(value)
        times = [t for t in times if t > seconds]
        if not times:
            break
        while seconds < times[0]:
            start = clock()
            step()
            seconds += clock() - start
            steps += 1
    counters = {} if scheduler is None else {name: count for name, count in scheduler.counters.items() if count}
    result = {**found, "counters": counters}
    if source.known:
        result["optimum"] = source.energy(rows[_HELD_OUT:]).double().mean().item() / n
    return result


def _begin(
    source: Source, directions: str, batch: int, seed: int, device: torch.device, options: dict[str, Any]
) -> tuple[Flow, Callable[[], None], MergeScheduler | None]:
    flow, optimizer, scheduler = build(source.features, seed=seed, device=device, **options)
    generator = _generator(seed, device)

    def step() -> None:
        optimizer.zero_grad()
        loss = -flow.log_prob(source.draw(batch, generator)).mean()
        if directions == BOTH:
            noise = torch.randn(batch, source.features, generator=generator, device=device)
            loss = loss + _ENERGY_WEIGHT * _divergence(flow, source, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), CLIP)
        optimizer.step()

    return flow, step, scheduler


def _divergence(flow: Flow, source: Source, noise: Tensor) -> Tensor:
    """The mean of log q(x) + u(x) over samples x that are made of noise."""
    x, logabsdet = flow._transform.inverse(noise)
    return (flow._distribution.log_prob(noise) - logabsdet + source.energy(x)).mean()


@torch.no_grad()
def _nll(flow: Flow, rows: Tensor) -> list[float]:
    """The mean NLL a dimension of each part's rows."""
    flow.eval()
    values = -flow.log_prob(rows).double().view(len(_PARTS), -1).mean(1) / rows.shape[1]
    flow.train()
    return values.tolist()


def _generator(seed: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)

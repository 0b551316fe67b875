"""Times of a whole training step of orthogonal layers by their width, and of the residual networks, in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from benchmarks.paper.toy_densities import DISTRIBUTIONS
from benchmarks.properties import lipschitz, orthogonal
from p4flows import MergeScheduler

__all__ = ["PLAIN", "flows", "layers"]

PLAIN = "nn.Linear"
Step = Callable[[], None]
_BATCH = 64
_MERGES = 10  # steps in a turn, so that it has a merge in it


def layers(n: int, turns: int, slow: float, without: Collection[str] = ()) -> dict[str, Any]:
    """Milliseconds of a step at width n: forward, backward, Adam and merges; None for one of more than ``slow`` s."""
    jobs: dict[str, Step] = {}
    makers: dict[str, Callable[[int], nn.Module]] = {PLAIN: lambda n: nn.Linear(n, n, bias=False), **orthogonal.METHODS}
    for name, make in ((name, make) for name, make in makers.items() if name not in without):
        try:
            jobs[name] = _step(make(n), n)
        except ModuleNotFoundError as error:
            print(f"left out: {name}: {error}")
    return {"n": n, "ms": _measure(jobs, turns, slow, f"n = {n}")}


def flows(data: str, blocks: int, hidden: int, batch: int, turns: int) -> dict[str, Any]:
    """Milliseconds of a training step of the residual networks."""
    jobs = {}
    for name, (make, every) in lipschitz.METHODS.items():
        flow = lipschitz.ResidualFlow(make, blocks, hidden)
        optimizer = torch.optim.Adam([p for p in flow.parameters() if p.requires_grad], lr=1e-3)
        if every:
            MergeScheduler(flow, optimizer, every).attach()
        x = DISTRIBUTIONS[data].sample(batch, torch.Generator().manual_seed(0))

        def step(flow: nn.Module = flow, optimizer: torch.optim.Optimizer = optimizer, x: torch.Tensor = x) -> None:
            optimizer.zero_grad()
            (-flow.log_prob(x).mean()).backward()
            optimizer.step()

        jobs[name] = step
    return {"ms": _measure(jobs, turns, float("inf"), "residual networks")}


def _step(layer: nn.Module, n: int) -> Step:
    optimizer = orthogonal.optimizer_of(layer, 1e-4)
    x, y = torch.randn(2, _BATCH, n, generator=torch.Generator().manual_seed(0))

    def step() -> None:
        optimizer.zero_grad()
        (orthogonal.forward(layer, x) - y).square().mean().backward()
        optimizer.step()

    return step


def _measure(jobs: dict[str, Step], turns: int, slow: float, title: str) -> dict[str, float | None]:
    """The median over turns of the mean in a turn; the jobs take turns, so that what else runs slows all of them."""
    steps: dict[str, int] = {}
    for name, step in jobs.items():
        start = time.perf_counter()
        step()
        once = time.perf_counter() - start
        if once < slow:
            steps[name] = _MERGES if once < slow / 4 else 1
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in tqdm(range(turns), desc=title):
        for name, count in steps.items():
            start = time.perf_counter()
            for _ in range(count):
                jobs[name]()
            times[name].append(1000 * (time.perf_counter() - start) / count)
    return {name: statistics.median(times[name]) if name in times else None for name in jobs}

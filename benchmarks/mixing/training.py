"""The training of one RealNVP with some mix between its couplings, for `swaps` and `perturbation`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from nflows.transforms import CompositeTransform, LULinear, ReversePermutation
from torch import Tensor, nn
from torch.optim import Adam
from tqdm import tqdm

from benchmarks.harness.parts import part
from benchmarks.mixing.data import load
from benchmarks.mixing.masked_lu import MaskedLU
from benchmarks.mixing.mixes import Dense, put_between
from benchmarks.paper.realnvp import real_nvp
from benchmarks.paper.splines import spline_flow
from p4flows import MergeScheduler
from p4flows.perturbation import P4Layer

__all__ = ["CLIP", "begin", "build", "train", "train_all"]

CLIP = 10.0
"""The largest norm of a step's gradients."""

_LOOKS = 20


def train_all(pool: Executor, folder: Path, settings: list[dict[str, Any]], title: str) -> list[dict[str, Any]]:
    """The results of :func:`train` for every setting, those of an earlier run from its files."""
    return list(tqdm(pool.map(partial(_part, folder), settings), total=len(settings), desc=title, unit="flow"))


def _part(folder: Path, setting: dict[str, Any]) -> dict[str, Any]:
    return part(folder, setting, lambda: train(**setting))


def train(data: str, seed: int, steps: int, frames: int, **options: Any) -> dict[str, Any]:
    """Maximum likelihood by Adam with a cosine schedule; ``options`` are those of :func:`begin`.

    Returns the lowest of 20 NLLs of the validation part, the NLL of the test part at that step, the validation NLL at
    the end, the time of a step, and what became of the merges.
    """
    x, validation, test = load(data, seed, frames)
    flow, step, scheduler = begin(x, seed=seed, steps=steps, **options)
    best = {"validation": float("inf"), "test": float("inf"), "step": 0}
    seconds, start = 0.0, time.perf_counter()
    last = float("inf")
    for i in range(1, steps + 1):
        step()
        if i % max(1, steps // _LOOKS) == 0:
            seconds += time.perf_counter() - start
            last = _nll(flow, validation)
            if last < best["validation"]:
                best = {"validation": last, "test": _nll(flow, test), "step": i}
            start = time.perf_counter()
    counters = {} if scheduler is None else {name: n for name, n in scheduler.counters.items() if n}
    return {**best, "last_validation": last, "ms_per_step": 1000 * seconds / steps, "counters": counters}


def begin(
    x: Tensor, seed: int, steps: int, batch: int, **options: Any
) -> tuple[Flow, Callable[[], None], MergeScheduler | None]:
    """A new flow on rows like x, what trains it by one step, and its merge scheduler; ``options`` of :func:`build`."""
    flow, optimizer, scheduler = build(x.shape[1], seed=seed, **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)

    def step() -> None:
        rows = torch.randint(len(x), (batch,), generator=generator)
        optimizer.zero_grad()
        loss = -flow.log_prob(x[rows]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), CLIP)
        optimizer.step()
        schedule.step()

    return flow, step, scheduler


def build(
    features: int,
    couplings: int,
    mix: str,
    seed: int,
    hidden: int,
    net_rate: float,
    mix_rate: float | None = None,
    rank: int | None = None,
    start: str = "reversed",
    splines: bool = False,
    device: torch.device | str = "cpu",
    **merging: Any,
) -> tuple[Flow, Adam, MergeScheduler | None]:
    """A new flow, its optimizer, and its merge scheduler, which is attached.

    Without couplings the flow is one mix alone, a linear map. ``net_rate`` is the learning rate of the couplings'
    networks, ``mix_rate`` that of all that is learned between the couplings; ``rank`` that of P4 layers; ``start`` the
    permutation that a learned mix starts from; with ``splines`` the couplings are not those of RealNVP; ``merging`` are
    options of MergeScheduler.
    """
    torch.manual_seed(seed)
    if couplings:
        flow = (spline_flow if splines else real_nvp)(features, couplings, hidden)
    else:
        flow = Flow(CompositeTransform([ReversePermutation(features)]), StandardNormal([features]))
    put_between(flow, features, mix, rank, seed, start).to(device)
    learned = [p for module in flow.modules() for p in _learned(module)]
    ids = {id(p) for p in learned}
    others = [p for p in flow.parameters() if id(p) not in ids and p.requires_grad]
    groups = [{"params": others, "lr": net_rate}] if others else []
    if learned:
        groups.append({"params": learned, "lr": net_rate if mix_rate is None else mix_rate})
    optimizer = Adam(groups)
    scheduler = None
    if any(isinstance(module, P4Layer) for module in flow.modules()):
        scheduler = MergeScheduler(flow, optimizer, **merging).attach()
    return flow, optimizer, scheduler


def _learned(module: nn.Module) -> Iterable[nn.Parameter]:
    mixes = isinstance(module, P4Layer | Dense | LULinear | MaskedLU)
    return [p for p in module.parameters() if p.requires_grad] if mixes else []


@torch.no_grad()
def _nll(flow: Flow, x: Tensor) -> float:
    flow.eval()
    value = -flow.log_prob(x).double().mean().item()
    flow.train()
    return value

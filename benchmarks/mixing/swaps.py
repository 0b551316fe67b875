"""Where learned mixing pays: RealNVPs on real data with permutations, LU, dense matrices and P4Inv as swaps."""

from __future__ import annotations

import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nflows.flows import Flow
from nflows.transforms import LULinear
from torch import nn
from tqdm import tqdm

from benchmarks.harness.environment import save
from benchmarks.harness.parts import part
from benchmarks.harness.pool import pool_of
from benchmarks.harness.threads import one_thread
from benchmarks.mixing.data import load
from benchmarks.mixing.mixes import Dense, put_between
from benchmarks.mixing.swaps_figure import draw
from benchmarks.mixing.swaps_table import FROM_RANDOM, table
from benchmarks.paper.realnvp import real_nvp
from p4flows import MergeScheduler, P4Inv

__all__ = ["FILES", "KEPT", "PROBLEMS", "Problem", "add_arguments", "run", "table", "train", "train_all"]

FILES = ("swaps.json", "swaps.png")
KEPT = "--parts"


@dataclass(frozen=True)
class Problem:
    """Data and training; ``couplings`` says for how many of them, and with how many seeds.

    ``rates`` are learning rates of the mixes to be tried beside ``lr``; ``more`` are mixes at equal steps only, with
    one seed.
    """

    couplings: dict[int, int]
    mixes: tuple[str, ...]
    rates: tuple[float, ...] = ()
    more: tuple[str, ...] = ()
    steps: int = 400
    batch: int = 128
    hidden: int = 32
    lr: float = 1e-3


# What :func:`benchmarks.mixing.mixes.put_between` makes of a name.
_MIXES: dict[str, dict[str, Any]] = {
    "alternating masks": {"mix": "alternating masks"},
    "reversed": {"mix": "reversed"},
    "random": {"mix": "random"},
    "LU": {"mix": "LU"},
    "dense": {"mix": "dense"},
    "P4Inv, rank 1": {"mix": "P4Inv"},
    "P4Inv, rank 8": {"mix": "P4Inv", "rank": 8},
}
_FIXED = ("alternating masks", "reversed", "random")
_LEARNED = tuple(mix for mix in _MIXES if mix not in _FIXED)
_FROM_RANDOM = {f"{mix}{FROM_RANDOM}": {**_MIXES[mix], "start": "random"} for mix in _LEARNED if mix != "LU"}
_MIXES |= _FROM_RANDOM
_TABULAR = Problem({2: 5, 4: 5, 8: 5, 16: 3}, (*_FIXED, *_LEARNED), rates=(3e-3,))
_TIMED_SEEDS = 1
_ROUNDS = 60
PROBLEMS = {
    "digits": _TABULAR,
    "image-patches": _TABULAR,
    "breast-cancer": _TABULAR,
    # The nets of the paper; 50 couplings are its flow.
    "alanine-dipeptide": Problem(
        {2: 2, 8: 2, 16: 1, 50: 1},
        (*_FIXED[1:], *_LEARNED),
        more=tuple(_FROM_RANDOM),
        steps=3_000,
        batch=256,
        hidden=60,
    ),
}


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="20 steps and one seed, to see that everything runs")
    parser.add_argument(
        "--data", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS), metavar="NAME", help="what to learn"
    )
    parser.add_argument("--most-couplings", type=int, default=50, help="leave deeper flows out")
    parser.add_argument("--jobs", type=int, default=2, help="flows trained at a time")


@one_thread()
def run(args: Namespace) -> dict[str, Any]:
    settings = []
    for data in args.data:
        problem = PROBLEMS[data]
        if args.quick:
            problem = replace(problem, couplings={2: 1}, steps=20)
        settings += [
            {
                **{"data": data, "couplings": couplings, "mix": mix, "seed": seed},
                **{name: getattr(problem, name) for name in ("steps", "batch", "hidden", "lr")},
                "frames": 1_500 if args.quick else 250_000,
                **({"perturbation_lr": rate} if rate else {}),
            }
            for couplings, seeds in problem.couplings.items()
            if couplings <= args.most_couplings
            for mix in (*problem.mixes, *problem.more)
            for rate in ((None, *problem.rates) if mix in _LEARNED else (None,))
            for seed in range(seeds if mix in problem.mixes else 1)
        ]
    with pool_of(args.jobs) as pool:
        equal_steps = train_all(pool, args.kept, settings, "equal steps")
        # Speeds are compared step by step: what else the machine does changes in the course of hours.
        shapes = {(s["data"], s["couplings"]): {**s, "seed": 0, "mixes": PROBLEMS[s["data"]].mixes} for s in settings}
        relative = dict(zip(shapes, pool.map(partial(_relative_times, args.kept), shapes.values()), strict=True))
        timed = {}
        for i, setting in enumerate(settings):
            if setting["mix"] in _LEARNED and setting["seed"] < _TIMED_SEEDS:
                # As many steps as a flow with fixed permutations takes in the time that the mix under test needs.
                ratio = max(1.0, relative[setting["data"], setting["couplings"]][setting["mix"]])
                timed[i] = {**setting, "steps": max(1, round(setting["steps"] / ratio))}
        equal_time = dict(zip(timed, train_all(pool, args.kept, list(timed.values()), "equal time"), strict=True))
    rows = []
    for i, (setting, measured) in enumerate(zip(settings, equal_steps, strict=True)):
        rows.append({**setting, **measured})
        if i in timed:
            rows[-1]["equal_time"] = {"steps": timed[i]["steps"], **equal_time[i]}
    times = [{"data": data, "couplings": couplings, "times": r} for (data, couplings), r in relative.items()]
    results = {"rows": rows, "relative_times": times}
    path = save("swaps", results, args.out)
    print(f"{path}\n{draw(rows, args.out / 'swaps.png')}\n{table(results)}")
    return results


def train_all(pool: Executor, folder: Path, settings: list[dict[str, Any]], title: str) -> list[dict[str, Any]]:
    """The results of :func:`train` for every setting, those of an earlier run from its files."""
    return list(tqdm(pool.map(partial(_part, folder), settings), total=len(settings), desc=title, unit="flow"))


def _part(folder: Path, setting: dict[str, Any]) -> dict[str, Any]:
    return part(folder, setting, lambda: train(**setting))


def train(data: str, seed: int, steps: int, frames: int, **options: Any) -> dict[str, float]:
    """Maximum likelihood by Adam with a cosine schedule; the best held-out NLL on the way, and the time of a step.

    ``options``: couplings, mix, batch, hidden and lr; ``perturbation_lr``, the learning rate of U and V, and of dense
    and LU matrices, if it is another; and options of MergeScheduler.
    """
    x, held_out = load(data, seed, frames)
    flow, step = _training(x, seed=seed, steps=steps, **options)
    best, seconds, start = float("inf"), 0.0, time.perf_counter()
    for i in range(1, steps + 1):
        step()
        if i % max(1, steps // 20) == 0:
            seconds += time.perf_counter() - start
            best = min(best, _nll(flow, held_out))
            start = time.perf_counter()
    return {"nll": best, "last_nll": _nll(flow, held_out), "ms_per_step": 1000 * seconds / steps}


def _training(
    x: torch.Tensor,
    couplings: int,
    mix: str,
    seed: int,
    steps: int,
    batch: int,
    hidden: int,
    lr: float,
    perturbation_lr: float | None = None,
    **merging: Any,
) -> tuple[Flow, Callable[[], None]]:
    """A new flow, and what trains it by one step."""
    torch.manual_seed(seed)
    features = x.shape[1]
    flow = put_between(real_nvp(features, couplings, hidden), features, seed=seed, **_MIXES[mix])
    theirs = [p for module in flow.modules() for p in _mixing(module)]
    ids = {id(p) for p in theirs}
    groups = [{"params": [p for p in flow.parameters() if id(p) not in ids]}]
    if theirs:
        groups.append({"params": theirs, "lr": lr if perturbation_lr is None else perturbation_lr})
    optimizer = torch.optim.Adam(groups, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    if any(isinstance(module, P4Inv) for module in flow.modules()):
        MergeScheduler(flow, optimizer, **merging).attach()
    generator = torch.Generator().manual_seed(seed)

    def step() -> None:
        rows = torch.randint(len(x), (batch,), generator=generator)
        optimizer.zero_grad()
        loss = -flow.log_prob(x[rows]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 10.0)
        optimizer.step()
        schedule.step()

    return flow, step


def _mixing(module: nn.Module) -> Iterable[nn.Parameter]:
    if isinstance(module, P4Inv):
        return module.U, module.V
    return module.parameters() if isinstance(module, Dense | LULinear) else ()


def _relative_times(folder: Path, shape: dict[str, Any]) -> dict[str, float]:
    """The time of a step with each mix, in that of one with fixed permutations, measured in turns."""
    names = ("couplings", "seed", "batch", "hidden", "lr")

    def measure() -> dict[str, float]:
        x, _ = load(shape["data"], shape["seed"], shape["frames"])
        options = {name: shape[name] for name in names}
        steps = {mix: _training(x, mix=mix, steps=_ROUNDS, **options)[1] for mix in shape["mixes"]}
        times: dict[str, list[float]] = {mix: [] for mix in steps}
        for _ in range(_ROUNDS):
            for mix, step in steps.items():
                start = time.perf_counter()
                step()
                times[mix].append(time.perf_counter() - start)
        # Means, as merges are part of the cost; but a step that the machine interrupts is not.
        means = {mix: np.minimum(values[10:], 3 * np.median(values)).mean() for mix, values in times.items()}
        fixed = np.mean([means[mix] for mix in means if mix in _FIXED])
        return {mix: float(value / fixed) for mix, value in means.items()}

    key = {"timing": _ROUNDS, **{name: shape[name] for name in ("data", "mixes", "frames", *names)}}
    return part(folder, key, measure)


@torch.no_grad()
def _nll(flow: Flow, x: torch.Tensor) -> float:
    flow.eval()
    value = -flow.log_prob(x).double().mean().item()
    flow.train()
    return value

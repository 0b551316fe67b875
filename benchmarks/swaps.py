"""Where learned mixing pays: RealNVPs on real data with permutations, LU, dense matrices and P4Inv as swaps."""

from __future__ import annotations

import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nflows.flows import Flow
from tqdm import tqdm

from benchmarks.environment import RESULTS, save
from benchmarks.mixing import put_between
from benchmarks.parts import part
from benchmarks.realnvp import real_nvp
from benchmarks.swaps_data import load
from benchmarks.swaps_figure import draw
from p4flows import MergeScheduler, P4Inv

__all__ = ["PROBLEMS", "Problem", "add_arguments", "pool_of", "run", "table", "train", "train_all"]


@dataclass(frozen=True)
class Problem:
    """Data and training; ``couplings`` says for how many of them, and with how many seeds."""

    couplings: dict[int, int]
    mixes: tuple[str, ...]
    steps: int = 400
    batch: int = 128
    hidden: int = 32
    lr: float = 1e-3


_MIXES = {
    "alternating masks": ("alternating masks", 1),
    "reversed": ("reversed", 1),
    "random": ("random", 1),
    "LU": ("LU", 1),
    "dense": ("dense", 1),
    "P4Inv, rank 1": ("P4Inv", 1),
    "P4Inv, rank 8": ("P4Inv", 8),
}
_FIXED = ("alternating masks", "reversed", "random")
_LEARNED = ("LU", "dense", "P4Inv, rank 1", "P4Inv, rank 8")
_TABULAR = Problem({2: 5, 4: 5, 8: 5, 16: 3}, (*_FIXED, *_LEARNED))
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
        steps=3_000,
        batch=256,
        hidden=60,
    ),
}


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="20 steps and one seed, to see that everything runs")
    parser.add_argument("--data", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS), metavar="NAME")
    parser.add_argument("--most-couplings", type=int, default=50, help="leave deeper flows out")
    parser.add_argument("--jobs", type=int, default=2, help="flows trained at a time")
    parser.add_argument("--parts", type=Path, default=Path("out/swaps"), help="finished trainings; a run goes on there")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of swaps.json and swaps.png")


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
            }
            for couplings, seeds in problem.couplings.items()
            if couplings <= args.most_couplings
            for mix in problem.mixes
            for seed in range(seeds)
        ]
    with pool_of(args.jobs) as pool:
        equal_steps = train_all(pool, args.parts, settings, "equal steps")
        # Speeds are compared step by step: what else the machine does changes in the course of hours.
        shapes = {(s["data"], s["couplings"]): {**s, "mixes": PROBLEMS[s["data"]].mixes} for s in settings}
        relative = dict(zip(shapes, pool.map(partial(_relative_times, args.parts), shapes.values()), strict=True))
        timed = {}
        for i, setting in enumerate(settings):
            if setting["mix"] not in _FIXED and setting["seed"] < _TIMED_SEEDS:
                # As many steps as a flow with fixed permutations takes in the time that the mix under test needs.
                ratio = max(1.0, relative[setting["data"], setting["couplings"]][setting["mix"]])
                timed[i] = {**setting, "steps": max(1, round(setting["steps"] / ratio))}
        equal_time = dict(zip(timed, train_all(pool, args.parts, list(timed.values()), "equal time"), strict=True))
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


def pool_of(jobs: int) -> Executor:
    """Spawned processes that share the threads of torch."""
    threads = max(1, torch.get_num_threads() // jobs)
    return ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (threads,))


def train_all(pool: Executor, folder: Path, settings: list[dict[str, Any]], title: str) -> list[dict[str, Any]]:
    """The results of :func:`train` for every setting, those of an earlier run from its files."""
    return list(tqdm(pool.map(partial(_part, folder), settings), total=len(settings), desc=title, unit="flow"))


def _part(folder: Path, setting: dict[str, Any]) -> dict[str, Any]:
    return part(folder, setting, lambda: train(**setting))


def train(data: str, seed: int, steps: int, frames: int, **options: Any) -> dict[str, float]:
    """Maximum likelihood by Adam with a cosine schedule; the best held-out NLL on the way, and the time of a step.

    ``options``: couplings, mix, batch, hidden and lr; the learning rate of the perturbations, ``perturbation_lr``, if
    it is another; and options of MergeScheduler.
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
    **merging: Any,
) -> tuple[Flow, Callable[[], None]]:
    """A new flow, and what trains it by one step."""
    torch.manual_seed(seed)
    features = x.shape[1]
    kind, rank = _MIXES[mix]
    flow = put_between(real_nvp(features, couplings, hidden), features, kind, rank, seed)
    theirs = [p for module in flow.modules() if isinstance(module, P4Inv) for p in (module.U, module.V)]
    ids = {id(p) for p in theirs}
    groups = [{"params": [p for p in flow.parameters() if id(p) not in ids]}]
    if theirs:
        groups.append({"params": theirs, "lr": merging.pop("perturbation_lr", lr)})
    optimizer = torch.optim.Adam(groups, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    if theirs:
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


def table(results: dict[str, Any]) -> str:
    """Held-out NLL at equal steps, mean ± standard deviation over seeds; after the slash at equal time, one seed."""
    rows = results["rows"]
    mixes = [mix for mix in _MIXES if any(row["mix"] == mix for row in rows)]
    lines = [f"| data | couplings | seeds | {' | '.join(mixes)} |", "|---|---:|---:|" + "---:|" * len(mixes)]
    for data, couplings in dict.fromkeys((row["data"], row["couplings"]) for row in rows):
        here = [row for row in rows if (row["data"], row["couplings"]) == (data, couplings)]
        cells, means = {}, {}
        for mix in mixes:
            nll = np.array([row["nll"] for row in here if row["mix"] == mix])
            timed = [row["equal_time"]["nll"] for row in here if row["mix"] == mix and "equal_time" in row]
            if len(nll):
                means[mix] = nll.mean()
                spread = f" ± {nll.std():.2f}" if len(nll) > 1 else ""
                cells[mix] = f"{nll.mean():.2f}{spread}" + (f" / {np.mean(timed):.2f}" if timed else "")
        best = min(means, key=means.get)
        cells[best] = f"**{cells[best]}**"
        seeds = len({row["seed"] for row in here})
        lines.append(f"| {data} | {couplings} | {seeds} | {' | '.join(cells.get(mix, '–') for mix in mixes)} |")
    return "\n".join(lines)

"""Where learned mixing pays: RealNVPs on real data with permutations, LU and P4Inv between the couplings."""

from __future__ import annotations

import time
from argparse import ArgumentParser, Namespace
from concurrent.futures import ProcessPoolExecutor
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
from benchmarks.tabular_data import DATASETS, load
from benchmarks.tabular_figure import draw
from p4flows import MergeScheduler, P4Inv

__all__ = ["add_arguments", "run", "table"]

_BATCH, _HIDDEN, _LEARNING_RATE = 128, 32, 1e-3
_MIXES = {
    "alternating masks": ("alternating masks", 1),
    "reversed": ("reversed", 1),
    "random": ("random", 1),
    "LU": ("LU", 1),
    "P4Inv, rank 1": ("P4Inv", 1),
    "P4Inv, rank 8": ("P4Inv", 8),
}


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="20 steps and one seed, to see that everything runs")
    parser.add_argument("--couplings", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--steps", type=int, default=2_000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="flows trained at a time")
    parser.add_argument(
        "--parts", type=Path, default=Path("out/tabular"), help="finished trainings; a run goes on there"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of tabular.json and tabular.png")


def run(args: Namespace) -> dict[str, Any]:
    steps, seeds = (20, 1) if args.quick else (args.steps, args.seeds)
    settings = [
        {"data": data, "couplings": couplings, "mix": mix, "seed": seed, "steps": steps}
        for data in DATASETS
        for couplings in args.couplings
        for mix in _MIXES
        for seed in range(seeds)
    ]
    threads = max(1, torch.get_num_threads() // args.jobs)
    with ProcessPoolExecutor(args.jobs, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        equal_steps = _all(pool, args.parts, settings, "equal steps")
        # As many steps as a flow with reversed permutations takes in the time that the mix under test needs.
        step_ms = {}
        for setting, measured in zip(settings, equal_steps, strict=True):
            step_ms.setdefault((setting["data"], setting["couplings"], setting["mix"]), []).append(
                measured["ms_per_step"]
            )
        timed = []
        for setting in settings:
            where = setting["data"], setting["couplings"]
            ratio = np.median(step_ms[(*where, "reversed")]) / np.median(step_ms[(*where, setting["mix"])])
            timed.append({**setting, "steps": max(1, round(steps * min(1.0, ratio)))})
        equal_time = _all(pool, args.parts, timed, "equal time")
    rows = [
        {**setting, **measured, "equal_time": {"steps": shorter["steps"], **other}}
        for setting, measured, shorter, other in zip(settings, equal_steps, timed, equal_time, strict=True)
    ]
    results = {"steps": steps, "batch": _BATCH, "hidden": _HIDDEN, "learning_rate": _LEARNING_RATE, "rows": rows}
    path = save("tabular", results, args.out)
    print(f"{path}\n{draw(rows, args.out / 'tabular.png')}\n{table(results)}")
    return results


def _all(pool: ProcessPoolExecutor, folder: Path, settings: list[dict[str, Any]], title: str) -> list[dict[str, Any]]:
    return list(tqdm(pool.map(partial(_part, folder), settings), total=len(settings), desc=title, unit="flow"))


def _part(folder: Path, setting: dict[str, Any]) -> dict[str, Any]:
    return part(folder, setting, lambda: train(**setting))


def train(
    data: str, couplings: int, mix: str, seed: int, steps: int, perturbation_lr: float = 3e-4
) -> dict[str, float]:
    """Maximum likelihood by Adam with a cosine schedule; the best held-out NLL on the way, and the time of a step."""
    x, held_out = load(data, seed)
    torch.manual_seed(seed)
    features = x.shape[1]
    kind, rank = _MIXES[mix]
    flow = put_between(real_nvp(features, couplings, _HIDDEN), features, kind, rank, seed)
    layers = [module for module in flow.modules() if isinstance(module, P4Inv)]
    theirs = {id(p) for layer in layers for p in (layer.U, layer.V)}
    groups = [{"params": [p for p in flow.parameters() if id(p) not in theirs]}]
    if layers:
        groups.append({"params": [p for p in flow.parameters() if id(p) in theirs], "lr": perturbation_lr})
    optimizer = torch.optim.Adam(groups, lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    if layers:
        MergeScheduler(flow, optimizer, every=10).attach()
    generator = torch.Generator().manual_seed(seed)
    best, seconds, start = float("inf"), 0.0, time.perf_counter()
    for step in range(1, steps + 1):
        rows = torch.randint(len(x), (_BATCH,), generator=generator)
        optimizer.zero_grad()
        loss = -flow.log_prob(x[rows]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 10.0)
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 20) == 0:
            seconds += time.perf_counter() - start
            best = min(best, _nll(flow, held_out))
            start = time.perf_counter()
    return {"nll": best, "last_nll": _nll(flow, held_out), "ms_per_step": 1000 * seconds / steps}


@torch.no_grad()
def _nll(flow: Flow, x: torch.Tensor) -> float:
    flow.eval()
    value = -flow.log_prob(x).double().mean().item()
    flow.train()
    return value


def table(results: dict[str, Any]) -> str:
    """Held-out NLL at equal steps and, after the slash, at equal time; mean ± standard deviation over seeds."""
    rows = results["rows"]
    mixes = list(dict.fromkeys(row["mix"] for row in rows))
    lines = [f"| data | couplings | {' | '.join(mixes)} |", "|---|---:|" + "---:|" * len(mixes)]
    for data in dict.fromkeys(row["data"] for row in rows):
        for couplings in dict.fromkeys(row["couplings"] for row in rows):
            cells, means = [], []
            for mix in mixes:
                chosen = [r for r in rows if (r["data"], r["couplings"], r["mix"]) == (data, couplings, mix)]
                steps = np.array([r["nll"] for r in chosen])
                timed = np.array([r["equal_time"]["nll"] for r in chosen])
                means.append(steps.mean())
                cells.append(f"{steps.mean():.2f} ± {steps.std():.2f} / {timed.mean():.2f}")
            cells[int(np.argmin(means))] = f"**{cells[int(np.argmin(means))]}**"
            lines.append(f"| {data} | {couplings} | {' | '.join(cells)} |")
    return "\n".join(lines)

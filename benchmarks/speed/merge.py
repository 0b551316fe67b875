"""The cost of a merge by the scheduler, against bgflow's PPPPScheduler."""

from __future__ import annotations

import statistics
import time
import warnings
from argparse import ArgumentParser, Namespace
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from benchmarks.harness.bgflow_checkout import find_bgflow
from benchmarks.harness.environment import save
from p4flows import MergeScheduler, P4Inv, P4InvStack
from p4flows.tracking.algebra import low_rank_update_

__all__ = ["FILES", "add_arguments", "run", "table"]

FILES = ("merge.json",)


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, nargs="+", default=[200, 50, 1], help="numbers of layers")
    parser.add_argument("--widths", type=int, nargs="+", default=[2, 60, 4096], help="and their widths, in pairs")
    parser.add_argument("--rounds", type=int, default=31, help="turns of each, of which the median is taken")


def run(args: Namespace) -> dict[str, Any]:
    warnings.filterwarnings("ignore")
    bgflow = find_bgflow()
    rows = []
    for layers, n in tqdm(list(zip(args.layers, args.widths, strict=True)), desc="model"):
        jobs = {"p4flows": _ours(nn.ModuleList([P4Inv(n, rank=1, seed=i) for i in range(layers)]))}
        if layers > 1:
            jobs["stack"] = _ours(nn.ModuleList([P4InvStack(n, layers, rank=1)]))
        if bgflow:
            jobs["bgflow"] = _bgflow(layers, n)
        jobs["updates"] = _updates(layers, n)
        times: dict[str, list[float]] = {name: [] for name in jobs}
        for _ in range(args.rounds):
            for name, (prepare, work) in jobs.items():
                for _ in range(2):  # caches and threads are those of the job before
                    work()
                prepare()
                start = time.perf_counter()
                work()
                times[name].append(1000 * (time.perf_counter() - start))
        ms = {name: statistics.median(values) for name, values in times.items()}
        rows.append({"layers": layers, "n": n, "ms": ms, "to_p4flows": {k: v / ms["p4flows"] for k, v in ms.items()}})
    results = {"rows": rows}
    print(save("merge", results, args.out))
    print(table(results))
    return results


def _trained(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return optimizer


def _perturb(parameters: list[nn.Parameter]) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(std=0.01)


def _ours(model: nn.ModuleList):
    scheduler = MergeScheduler(model, _trained(model), every=1, correct_every=None)
    scheduler.step()
    return lambda: _perturb([layer.U for layer in model]), scheduler.step


def _bgflow(layers: int, n: int):
    from bgflow import InvertiblePPPP, PPPPScheduler

    model = nn.ModuleList([InvertiblePPPP(n) for _ in range(layers)])
    scheduler = PPPPScheduler(model, _trained(model), n_correct=None)
    scheduler.step()
    return lambda: _perturb([layer.u for layer in model]), scheduler.step


def _updates(layers: int, n: int):
    """The two rank-one updates alone, in place, for all layers at once."""
    A, A_inv, u = torch.zeros(layers, n, n), torch.zeros(layers, n, n), torch.randn(layers, n, 1)

    def work() -> None:
        for M in (A, A_inv):
            low_rank_update_(M, u, u.mT)

    return lambda: None, work


def table(results: dict[str, Any]) -> str:
    """Milliseconds of a merge, as a Markdown table."""
    lines = [
        "| layers | P4Inv layers | P4InvStack | bgflow | bgflow to P4Inv, to P4InvStack | the two updates alone |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in results["rows"]:
        ms = row["ms"]
        cells = [f"{ms[name]:.3g} ms" if name in ms else "–" for name in ("p4flows", "stack", "bgflow", "updates")]
        ratios = [f"{ms['bgflow'] / ms[name]:.1f}" for name in ("p4flows", "stack") if {name, "bgflow"} <= ms.keys()]
        cells.insert(3, ", ".join(ratios) or "–")
        lines.append(f"| {row['layers']} of {row['n']} × {row['n']} | {' | '.join(cells)} |")
    return "\n".join(lines)

"""A whole training step of the paper's deep networks: the stack of Appendix G, the 50-coupling flow of Appendix H."""

from __future__ import annotations

import statistics
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.harness.bgflow_checkout import find_bgflow
from benchmarks.harness.device import add_device, now
from benchmarks.harness.environment import save
from benchmarks.harness.output import file_name
from benchmarks.paper.realnvp import real_nvp
from benchmarks.speed.tenth import EveryTenth
from p4flows import BentIdentity, MergeScheduler, P4Inv, P4InvStack
from p4flows.nflows import InvertibleLinear, P4InvLinear, replace_permutations

__all__ = ["FILES", "add_arguments", "run", "table"]

FILES = ("step.json",)

Step = Callable[[], None]


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--depth", type=int, default=200, help="layers of the two-dimensional network")
    parser.add_argument("--models", type=int, nargs="+", default=[4, 16], help="networks side by side")
    parser.add_argument("--couplings", type=int, default=50, help="of the alanine dipeptide flow")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each, of which the median is taken")
    parser.add_argument("--compile", action="store_true", help="with torch.compile too: some minutes")
    add_device(parser)


def run(args: Namespace) -> dict[str, Any]:
    warnings.filterwarnings("ignore")
    rows = []
    for network, jobs in (("stack", _stacks(args)), ("flow", _flows(args))):
        compile_seconds = {}
        for name, step in tqdm(jobs.items(), desc=f"first steps, {network}"):
            start = now(args.device)
            step()
            if "compiled" in name:
                compile_seconds[name] = now(args.device) - start
        times: dict[str, list[float]] = {name: [] for name in jobs}
        for _ in tqdm(range(args.rounds), desc=network):
            for name, step in jobs.items():
                for repeat in range(4):
                    start = now(args.device)
                    step()
                    if repeat:  # caches and threads are those of the job before
                        times[name].append(1000 * (now(args.device) - start))
        for name, values in times.items():
            row = {"network": network, "method": name, "ms": statistics.median(values)}
            rows.append(row | ({"first_step_s": compile_seconds[name]} if name in compile_seconds else {}))
    results = {"device": str(args.device), "depth": args.depth, "couplings": args.couplings, "rows": rows}
    print(save(file_name(args), results, args.out))
    print(table(results))
    return results


def _training(model: nn.Module, apply: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor, scheduler: Any) -> Step:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    scheduler = scheduler(model, optimizer)

    def step() -> None:
        optimizer.zero_grad()
        y, logabsdet = apply(x)
        (y.square().sum(-1) / 2 - logabsdet).mean().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()

    return step


def _in_turn(layers: nn.ModuleList, x: Tensor) -> tuple[Tensor, Tensor]:
    bent, total = BentIdentity(), 0
    for i, layer in enumerate(layers):
        x, a = layer(x)
        x, b = bent.inverse(x) if i % 2 else bent(x)
        total = total + a.view(b.shape) + b
    return x, total


def _stacks(args: Namespace) -> dict[str, Step]:
    place = args.device
    x = torch.randn(200, 2, device=place)
    layers = nn.ModuleList(P4Inv(2, rank=1, seed=i) for i in range(args.depth)).to(place)
    stack = P4InvStack(2, args.depth, 1).to(place)
    jobs = {"P4InvStack": _training(stack, stack, x, MergeScheduler)}
    if args.compile:
        stack = P4InvStack(2, args.depth, 1).to(place)
        jobs["P4InvStack, compiled"] = _training(stack, torch.compile(stack, fullgraph=True), x, MergeScheduler)
    jobs["separate P4Inv"] = _training(layers, lambda x: _in_turn(layers, x), x, MergeScheduler)
    for models in args.models:
        stack = P4InvStack(2, args.depth, 1, models=models).to(place)
        jobs[f"P4InvStack, {models} models"] = _training(stack, stack, x.expand(models, -1, -1), MergeScheduler)
    if find_bgflow():
        from bgflow import InvertiblePPPP, PPPPScheduler

        peers = nn.ModuleList(InvertiblePPPP(2, penalty_parameter=0.0) for _ in range(args.depth)).to(place)
        jobs["bgflow InvertiblePPPP"] = _training(
            peers, lambda x: _in_turn(peers, x), x, lambda model, optimizer: EveryTenth(PPPPScheduler(model, optimizer))
        )
    return jobs


def _flows(args: Namespace) -> dict[str, Step]:
    x = torch.randn(256, 60, device=args.device)
    jobs = {}
    for name, swap, rank in (
        ("RealNVP", None, None),
        ("RealNVP + P4Inv", P4InvLinear, 1),
        ("RealNVP + InvertibleLinear", InvertibleLinear, None),
    ):
        for compiled in (False, True) if args.compile else (False,):
            flow = real_nvp(60, args.couplings)
            if swap:
                replace_permutations(flow, rank, layer=swap)
            transform = flow.to(args.device)._transform
            function = torch.compile(transform, fullgraph=True) if compiled else transform
            scheduler = MergeScheduler if swap else lambda model, optimizer: None
            jobs[f"{name}, compiled" if compiled else name] = _training(transform, function, x, scheduler)
    return jobs


def table(results: dict[str, Any]) -> str:
    """Milliseconds of a training step, as a Markdown table."""
    titles = {
        "stack": f"{results['depth']} layers of 2 × 2 with Bent identities, batch 200",
        "flow": f"alanine dipeptide, {results['couplings']} couplings, batch 256",
    }
    lines = ["| network | method | ms a step | relative |", "|---|---|---:|---:|"]
    first: dict[str, float] = {}
    for row in results["rows"]:
        base = first.setdefault(row["network"], row["ms"])
        lines.append(f"| {titles[row['network']]} | {row['method']} | {row['ms']:.3g} | {row['ms'] / base:.2f} |")
    return "\n".join(lines)

"""Energies and forces of alanine dipeptide a second, from our OpenMM bridge and from bgflow's."""

from __future__ import annotations

import statistics
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import Any

import openmm
import torch
from openmm import unit
from tqdm import tqdm

from benchmarks.harness.bgflow_checkout import find_bgflow
from benchmarks.harness.environment import save
from benchmarks.paper.boltzmann import TEMPERATURE
from p4flows.molecules import Molecule, OpenMMEnergy, alanine_dipeptide

__all__ = ["FILES", "add_arguments", "run", "table"]

FILES = ("bridge.json",)


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--batch", type=int, default=2_000, help="structures evaluated at a time")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each, of which the median is taken")


def run(args: Namespace) -> dict[str, Any]:
    molecule = alanine_dipeptide()
    noise = torch.randn(args.batch, molecule.system.getNumParticles(), 3, generator=torch.Generator().manual_seed(0))
    x = (torch.tensor(molecule.positions) + 0.003 * noise).flatten(1).float()
    bridges = {f"p4flows, {w} workers" if w else "p4flows, in process": _ours(molecule, w) for w in (0, 2)}
    if find_bgflow():
        bridges |= {f"bgflow, {w} worker{'s' * (w > 1)}": _bgflow(molecule, w) for w in (1, 2)}
    results = [evaluate(x) for evaluate in tqdm(bridges.values(), desc="first batches")]
    for energy, gradient in results[1:]:  # who is fast has to be right
        torch.testing.assert_close(energy, results[0][0], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(gradient, results[0][1], rtol=1e-3, atol=1)
    times: dict[str, list[float]] = {name: [] for name in bridges}
    for _ in tqdm(range(args.rounds), desc="rounds"):
        for name, evaluate in bridges.items():
            start = time.perf_counter()
            evaluate(x)
            times[name].append(time.perf_counter() - start)
    rows = [{"bridge": name, "per_second": args.batch / statistics.median(values)} for name, values in times.items()]
    results = {"batch": args.batch, "atoms": molecule.system.getNumParticles(), "rows": rows}
    print(save("bridge", results, args.out))
    print(table(results))
    return results


def _ours(molecule: Molecule, workers: int) -> Callable:
    energy = OpenMMEnergy(molecule.system, TEMPERATURE, workers=workers)

    def evaluate(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.clone().requires_grad_()
        u = energy(x)
        (gradient,) = torch.autograd.grad(u.sum(), x)
        return u.detach(), gradient

    return evaluate


def _bgflow(molecule: Molecule, workers: int) -> Callable:
    from bgflow import OpenMMBridge

    integrator = openmm.LangevinMiddleIntegrator(TEMPERATURE, 1 / unit.picosecond, 1 * unit.femtosecond)
    bridge = OpenMMBridge(molecule.system, integrator, platform_name="Reference", n_workers=workers)

    def evaluate(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # Not through its OpenMMEnergy, which would find a batch that looks the same in its cache.
        energy, forces, *_ = bridge.evaluate(x)
        return energy[:, 0].to(x), -forces.to(x)

    return evaluate


def table(results: dict[str, Any]) -> str:
    """Energies with forces a second, as a Markdown table."""
    rates = {row["bridge"]: row["per_second"] for row in results["rows"]}
    lines = ["| bridge | energies and forces a second | to bgflow with as many |", "|---|---:|---:|"]
    for ours, theirs in (("p4flows, in process", "bgflow, 1 worker"), ("p4flows, 2 workers", "bgflow, 2 workers")):
        ratio = f"{rates[ours] / rates[theirs]:.1f}" if theirs in rates else "–"
        lines.append(f"| {ours} | {rates[ours]:,.0f} | {ratio} |")
        if theirs in rates:
            lines.append(f"| {theirs} | {rates[theirs]:,.0f} | |")
    return "\n".join(lines)

"""A Boltzmann generator whose weights mean something: what each part of a recipe brings, at 600 K and at 300 K."""

from __future__ import annotations

from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.claims import claim
from benchmarks.harness.claims import table as claims_table
from benchmarks.harness.environment import save
from benchmarks.harness.parts import fingerprint
from benchmarks.molecules.circular import MIXES, circular_flow
from benchmarks.molecules.own_samples import OwnSamples, unseen
from benchmarks.paper.boltzmann import TEMPERATURE, Data, generate, load_data, measure, worth
from benchmarks.paper.boltzmann_training import Stage, train
from p4flows.molecules import OpenMMEnergy

__all__ = ["FILES", "KEPT", "add_arguments", "claims", "run", "table"]

FILES = ("recipe.json",)
KEPT = "--checkpoints"
_LADDER = (505.0, 424.0, 357.0, 300.0)  # K, steps of a factor 1.19
_FRAMES = 250_000
_MEASURED = 200_000
_DRAWN = 80_000  # samples in each round
_RATE, _COLD_RATE = 1e-3, 3e-4
_AVERAGE = 0.95  # decay, over every tenth step of the last half
# Of the learning rate: entries of a dense weight move by it in every step, whatever their gradients, and disturb all.
_SWAPS = {"InvertibleLinear": 0.1}
_ROUNDS, _ROUNDS_PER_STEPS = 24, 6  # at 600 K, of a sixth of the first steps each
_STEP_SHARE, _LAST_SHARE = 12, 4  # of these rounds: a twelfth at each lower temperature, a fourth at 300 K


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--mixes", nargs="+", choices=list(MIXES), default=["random", "InvertibleLinear"], help="between couplings"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of networks and training")
    parser.add_argument("--frames", type=int, default=_FRAMES, help="MD frames, 0.1 ps apart")
    parser.add_argument("--couplings", type=int, default=8, help="coupling layers")
    parser.add_argument(
        "--steps", type=int, default=1_600, help="on frames; a sixth of that in each round on own samples"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=_ROUNDS,
        help="on own samples at 600 K, and half as many below; or 0",
    )
    parser.add_argument("--batch", type=int, default=512, help="in a step")
    parser.add_argument("--samples", type=int, default=_MEASURED, help="drawn to measure; in a round at most as many")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--circular", action=BooleanOptionalAction, default=True, help="splines for angles that turn")
    parser.add_argument("--compiled", action=BooleanOptionalAction, default=True, help="train by torch.compile")


def run(args: Namespace) -> dict[str, Any]:
    torch.set_num_threads(args.threads)
    data = load_data(args.frames)
    rows = []
    for seed in args.seeds:
        for mix in args.mixes:
            rows += _follow(mix, seed, data, args)
            results = {"settings": _settings(args) | {"ladder": _LADDER}, "rows": rows}
            path = save("recipe", results, args.out)
    print(f"{path}\n{claims_table({'claims': claims(results)})}\n\n{table(results)}")
    return results


def _settings(args: Namespace) -> dict[str, Any]:
    names = ("frames", "couplings", "steps", "rounds", "batch", "samples", "threads", "circular", "compiled")
    return {name: getattr(args, name) for name in names}


def _follow(mix: str, seed: int, data: Data, args: Namespace) -> list[dict[str, Any]]:
    """The recipe with one kind of swap: a row after each of its parts."""
    flow = circular_flow(data.coordinates, args.couplings, mix, args.circular, seed=seed, compiled=args.compiled)
    md = data.samples(data.test_frames)
    recipe = {"ladder": _LADDER, "rates": (_RATE, _COLD_RATE, _SWAPS), "average": _AVERAGE, "drawn": _DRAWN}
    settings = _settings(args) | recipe | {"mix": mix, "seed": seed}
    done = 0  # rounds
    rows: list[dict[str, Any]] = []

    def file(part: str, number: int | None = None) -> Path:
        name = part if number is None else f"{part} {number}"
        return args.kept / f"{mix} {seed} {name} {fingerprint(settings)}.pt"

    def row(part: str, temperature: float, seconds: float, measured: dict[str, Any]) -> None:
        rows.append(
            {"mix": mix, "seed": seed, "part": part, "temperature": temperature, "seconds": seconds, **measured}
        )
        print(f"{mix}, {seed}, {part}: ESS {measured['ess']:.1%} at {temperature:.0f} K, {seconds:.0f} s", flush=True)

    def measured() -> dict[str, Any]:
        return measure(flow, data, md, args.samples, unseen(seed))[0]

    def trained(part: str, data: Data, stage: Stage, rows: OwnSamples | None = None) -> float:
        path, swaps = file(part), _SWAPS.get(mix, 1.0)
        training = train(flow, data, stage, f"{mix}, {part}", path, average=_AVERAGE, swaps=swaps, rows=rows)
        return training["ms_per_step"] * stage.steps / 1000

    def on_own_samples(part: str, data: Data, rounds: int, rate: float, beside: Tensor | None = None) -> float:
        nonlocal done
        steps = max(1, args.steps // _ROUNDS_PER_STEPS)
        count, samples = min(_DRAWN, args.samples), partial(file, f"{part}, samples")
        rows = OwnSamples(flow, data, count, steps, args.batch, samples, seed, done, beside)
        done += rounds
        return trained(part, data, replace(likelihood, steps=rounds * steps, lr=rate), rows)

    likelihood = Stage(args.steps, args.batch, lr=_RATE, schedule="cosine", every=None, seed=seed)
    seconds = trained("likelihood", data, likelihood)
    row("likelihood", TEMPERATURE, seconds, measured())
    if not args.rounds:
        return rows
    # Frames are correlated, and a flow that sees them often overfits. Its own samples are new in every round.
    seconds = on_own_samples("own samples", data, args.rounds, _RATE, data.z)
    row("own samples", TEMPERATURE, seconds, measured())
    before = TEMPERATURE
    for temperature in _LADDER:
        flow._distribution.deviation *= (temperature / before) ** 0.5
        before = temperature
        cold = replace(data, energy=OpenMMEnergy(data.molecule.system, temperature))
        # The last temperature is the one that counts.
        rounds = args.rounds // (_LAST_SHARE if temperature == _LADDER[-1] else _STEP_SHARE)
        seconds = on_own_samples(f"{temperature:.0f} K", cold, max(1, rounds), _COLD_RATE)
        _, _, weights = generate(flow, cold, args.samples, unseen(seed))
        row(f"{temperature:.0f} K", temperature, seconds, worth(weights))
    return rows


def claims(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The goals of the recipe, for the kind of swap that is best in each; with several seeds by the worst of them."""
    judged = []
    for temperature, part, goal in ((600, "own samples", 0.5), (300, "300 K", 0.2)):
        found: dict[str, list[float]] = {}
        for row in results["rows"]:
            if row["part"] == part:
                found.setdefault(row["mix"], []).append(row["ess"])
        if found:
            mix = max(found, key=lambda name: min(found[name]))
            ours = f"{min(found[mix]):.1%} ({mix})"
            rule = f"≥ {goal:.0%}, the worst seed of the best swaps"
            judged.append(
                claim(f"effective sample size at {temperature} K", "our goal", rule, ours, min(found[mix]) >= goal)
            )
    return judged


def table(results: dict[str, Any]) -> str:
    """A line for each kind of swap and part, means over seeds, as a Markdown table."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in results["rows"]:
        groups.setdefault((row["mix"], row["part"]), []).append(row)
    columns = [
        ("T (K)", "temperature", "{:.0f}"),
        ("seconds", "seconds", "{:.0f}"),
        ("held-out NLL (nats)", "nll", "{:.2f}"),
        ("effective sample size", "ess", "{:.1%}"),
        ("largest weight", "largest_weight", "{:.2%}"),
        ("out of range", "rejected_fraction", "{:.2%}"),
        ("Ramachandran JS to MD", "ramachandran_js", "{:.4f}"),
    ]
    lines = [f"| swaps | after | {' | '.join(label for label, *_ in columns)} |", "|---|---|" + "---:|" * len(columns)]
    for (mix, part), rows in groups.items():
        cells = [form.format(fmean(row[key] for row in rows)) if key in rows[0] else "" for _, key, form in columns]
        lines.append(f"| {mix} | {part} | {' | '.join(cells)} |")
    return "\n".join(lines)

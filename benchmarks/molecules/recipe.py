"""A Boltzmann generator whose weights mean something: what each part of a recipe brings, at 600 K and at 300 K."""

from __future__ import annotations

from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from nflows.flows import Flow
from torch import Tensor

from benchmarks.harness.claims import claim
from benchmarks.harness.claims import table as claims_table
from benchmarks.harness.environment import save
from benchmarks.harness.parts import fingerprint
from benchmarks.molecules.circular import MIXES, circular_flow
from benchmarks.paper.boltzmann import TEMPERATURE, Data, generate, load_data, measure, worth
from benchmarks.paper.boltzmann_training import Stage, is_finished, train
from p4flows.molecules import ImportanceWeights, OpenMMEnergy

__all__ = ["FILES", "KEPT", "add_arguments", "claims", "run", "table"]

FILES = ("recipe.json",)
KEPT = "--checkpoints"
_LADDER = (505.0, 424.0, 357.0, 300.0)  # K, steps of a factor 1.19
_FRAMES = 250_000
_MEASURED = 50_000
_BUFFER = 80_000  # samples in each round
_AVERAGE = 0.9  # decay, over every tenth step of the last half
_ROUNDS, _LAST_ROUNDS, _ROUNDS_PER_STEPS = 10, 3, 6  # at 600 K, at 300 K, and of a sixth of the first steps each
_UNSEEN = 1_000_000  # added to a seed for the noise that is measured with, which no round has trained on
_CLIPPED = 40  # weights that count no more than the least of them


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--mixes", nargs="+", choices=list(MIXES), default=["random", "InvertibleLinear"], help="between couplings"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of networks and training")
    parser.add_argument("--frames", type=int, default=_FRAMES, help="MD frames, 0.1 ps apart")
    parser.add_argument("--couplings", type=int, default=8, help="coupling layers")
    parser.add_argument(
        "--steps", type=int, default=2_000, help="on frames; a sixth of that in each of 16 rounds on own samples"
    )
    parser.add_argument("--batch", type=int, default=512, help="in a step")
    parser.add_argument("--samples", type=int, default=_MEASURED, help="drawn to measure")
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
    names = ("frames", "couplings", "steps", "batch", "samples", "threads", "circular", "compiled")
    return {name: getattr(args, name) for name in names}


def _follow(mix: str, seed: int, data: Data, args: Namespace) -> list[dict[str, Any]]:
    """The recipe with one kind of swap: a row after each of its parts."""
    flow = circular_flow(data.coordinates, args.couplings, mix, args.circular, seed=seed, compiled=args.compiled)
    md = data.samples(data.test_frames)
    settings = _settings(args) | {"mix": mix, "seed": seed}
    rows: list[dict[str, Any]] = []

    def part(name: str, stage: Stage, data: Data, own: int | None = None, besides: Tensor | None = None) -> float:
        """Train, with ``own`` as a seed on own samples; what is finished is read, and needs none. The seconds."""
        path = args.kept / f"{mix} {seed} {name} {fingerprint(settings)}.pt"
        if own is not None and not is_finished(path, stage):
            data = replace(data, z=_own_samples(flow, data, min(_BUFFER, 10 * args.samples), own, besides))
        training = train(flow, data, replace(stage, seed=seed), f"{mix}, {name}", path, average=_AVERAGE)
        return training["ms_per_step"] * stage.steps / 1000

    def row(name: str, temperature: float, seconds: float, measured: dict[str, Any]) -> None:
        rows.append(
            {"mix": mix, "seed": seed, "part": name, "temperature": temperature, "seconds": seconds, **measured}
        )
        print(f"{mix}, {seed}, {name}: ESS {measured['ess']:.1%} at {temperature:.0f} K, {seconds:.0f} s", flush=True)

    likelihood = Stage(args.steps, args.batch, lr=1e-3, schedule="cosine", every=None)
    row(
        "likelihood",
        TEMPERATURE,
        part("likelihood", likelihood, data),
        measure(flow, data, md, args.samples, seed + _UNSEEN)[0],
    )
    # Frames are correlated, and a flow that sees them often overfits. Its own samples are new in every round.
    own = replace(likelihood, steps=max(1, args.steps // _ROUNDS_PER_STEPS), lr=3e-4)
    seconds = 0.0
    for i in range(_ROUNDS):
        seconds += part(f"round {i}", own, data, 100 * seed + i, data.z)
    row("own samples", TEMPERATURE, seconds, measure(flow, data, md, args.samples, seed + _UNSEEN)[0])
    before = TEMPERATURE
    for temperature in _LADDER:
        flow._distribution.deviation *= (temperature / before) ** 0.5
        before = temperature
        cold = replace(data, energy=OpenMMEnergy(data.molecule.system, temperature))
        # The last temperature is the one that counts.
        rounds = _LAST_ROUNDS if temperature == _LADDER[-1] else 1
        seconds = sum(part(f"{temperature:.0f} K, round {i}", own, cold, 100 * seed + i) for i in range(rounds))
        _, _, weights = generate(flow, cold, args.samples, seed + _UNSEEN)
        row(f"{temperature:.0f} K", temperature, seconds, worth(weights))
    return rows


def _own_samples(flow: Flow, data: Data, count: int, seed: int, besides: Tensor | None) -> Tensor:
    """Samples of the flow, drawn anew by their weights, and as many of other data."""
    z, _, weights = generate(flow, data, count, seed)
    z = _resampled(z, weights, seed)
    if besides is None:
        return z
    order = torch.randperm(len(besides), generator=torch.Generator().manual_seed(seed))
    return torch.cat([z, besides[order[: len(z)]]])


def _resampled(z: Tensor, weights: ImportanceWeights, seed: int) -> Tensor:
    """As many samples, drawn by their weights; the largest are clipped, so that no sample is all there is."""
    log_weights = weights.log_weights
    ceiling = log_weights.topk(min(_CLIPPED, len(z))).values[-1]
    probability = log_weights.clamp(max=ceiling).softmax(0)
    return z[torch.multinomial(probability, len(z), True, generator=torch.Generator().manual_seed(seed))]


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
        ("seconds of steps", "seconds", "{:.0f}"),
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

"""The main job: alanine dipeptide by two flows of splines on the same data, with fixed and with learned swaps."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.comparison import comparison
from benchmarks.harness.environment import save
from benchmarks.harness.parts import fingerprint
from benchmarks.harness.threads import one_thread
from benchmarks.molecules.own_samples import OwnSamples, unseen
from benchmarks.paper.boltzmann import PERTURBATION, TEMPERATURE, describe, load_data, measure
from benchmarks.paper.boltzmann_figure import draw
from benchmarks.paper.boltzmann_training import Stage, train
from benchmarks.paper.splines import spline_flow
from p4flows.nflows import replace_permutations

__all__ = ["COMMITTED", "FILES", "KEPT", "add_arguments", "run", "table"]

FILES = ("demo.json", "demo.png", "demo.pt")
KEPT = "--checkpoints"
COMMITTED = False

_OWN_RATE = 5e-4


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--frames", type=int, default=60_000, help="MD frames, 0.1 ps apart")
    parser.add_argument("--couplings", type=int, default=6, help="coupling layers")
    parser.add_argument("--steps", type=int, default=1_200, help="training steps of each flow on frames")
    parser.add_argument("--rounds", type=int, default=6, help="on own samples, of a tenth of the steps each, or 0")
    parser.add_argument("--batch", type=int, default=256, help="frames in a training step")
    parser.add_argument("--samples", type=int, default=40_000, help="samples drawn")
    parser.add_argument("--seed", type=int, default=0, help="of data, networks and training")


@one_thread()
def run(args: Namespace) -> dict[str, Any]:
    names = ("frames", "couplings", "steps", "rounds", "batch", "samples", "seed")
    settings = {name: getattr(args, name) for name in names} | {"own_rate": _OWN_RATE}
    data = load_data(args.frames, seed=args.seed)
    training_data, md = data.samples(data.frames), data.samples(data.test_frames)
    noise = torch.randn(data.test_frames.shape, generator=torch.Generator().manual_seed(args.seed))
    perturbed = data.samples(data.test_frames + PERTURBATION * noise)
    rows = {
        # How far the training data are from the held-out part says what is noise.
        "MD": describe(training_data, md, data),
        "MD + 0.004 nm": describe(perturbed, md, data),
    }
    samples = {"MD": training_data, "MD + 0.004 nm": perturbed}
    flows = {}
    for name in ("splines", "splines + P4Inv"):
        torch.manual_seed(args.seed)
        flows[name] = flow = spline_flow(data.coordinates.n_coordinates, args.couplings)
        if name != "splines":
            replace_permutations(flow, seed=args.seed)
        # A run with other settings must not go on from here.
        file = partial(_file, args.kept, f"{name} {fingerprint(settings)}")
        stage = Stage(args.steps, args.batch, schedule="cosine", seed=args.seed)
        rows[name] = train(flow, data, stage, name, file("frames"))
        if args.rounds:
            steps = max(1, args.steps // 10)
            own = OwnSamples(flow, data, args.samples // 2, steps, args.batch, file, args.seed, beside=data.z)
            stage = replace(stage, steps=args.rounds * steps, lr=_OWN_RATE)
            train(flow, data, stage, f"{name}, own samples", file("own samples"), rows=own)
        measured, samples[name] = measure(flow, data, md, args.samples, unseen(args.seed))
        rows[name] |= measured
    results = {"settings": {**settings, "temperature": TEMPERATURE}, "rows": rows}
    path = save("demo", results, args.out)
    picture = draw(samples, rows, args.out / "demo.png")
    torch.save({"coordinates": data.coordinates, **flows}, args.out / "demo.pt")
    for checkpoint in args.kept.glob(f"* {fingerprint(settings)} *.pt"):  # what is finished starts anew the next time
        checkpoint.unlink()
    print(f"\n{table(results)}\n\n{path}\n{picture}\n{args.out / 'demo.pt'}: the trained flows; new structures are\n")
    print(_lines(args.out / "demo.pt"))
    return results


def _file(folder: Path, run: str, part: str | int) -> Path:
    return folder / f"{run} {part}.pt"


def _lines(path: Path) -> str:
    """Three lines of Python that load the learned flow and sample structures, in nm."""
    return f"""\
    import torch
    saved = torch.load({str(path)!r}, weights_only=False)
    x, _ = saved["coordinates"].inverse(saved["splines + P4Inv"].sample(1_000))"""


def table(results: dict[str, Any]) -> str:
    """The results as a Markdown table, aligned for the terminal too."""
    return comparison(
        results["rows"],
        [
            ("trainable parameters", "parameters", "{:,}"),
            ("held-out NLL (nats)", "nll", "{:.2f}"),
            ("effective sample size", "ess", "{:.2%}"),
            ("largest weight's share", "largest_weight", "{:.1%}"),
            ("samples out of range", "rejected_fraction", "{:.1%}"),
            ("mean u(x) (kT)", "energy_mean", "{:.3g}"),
            ("median u(x) (kT)", "energy_median", "{:.2f}"),
            ("low-energy fraction", "low_energy_fraction", "{:.3f}"),
            ("Ramachandran JS to MD", "ramachandran_js", "{:.4f}"),
            ("largest \\|x − F(F⁻¹(x))\\|", "round_trip", "{:.1e}"),
        ],
    )

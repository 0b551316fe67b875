"""The main job: alanine dipeptide by two RealNVPs on the same data, with fixed and with learned swaps."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.comparison import comparison
from benchmarks.harness.environment import save
from benchmarks.paper.boltzmann import PERTURBATION, TEMPERATURE, describe, load_data, measure
from benchmarks.paper.boltzmann_figure import draw
from benchmarks.paper.boltzmann_training import Stage, train
from benchmarks.paper.realnvp import real_nvp
from p4flows.nflows import replace_permutations

__all__ = ["add_arguments", "run", "table"]


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--frames", type=int, default=60_000, help="MD frames, 0.1 ps apart (default %(default)s)")
    parser.add_argument("--couplings", type=int, default=8, help="coupling layers (default %(default)s)")
    parser.add_argument("--steps", type=int, default=4_000, help="training steps of each flow (default %(default)s)")
    parser.add_argument("--rank", type=int, default=1, help="rank of the perturbations (default %(default)s)")
    parser.add_argument("--samples", type=int, default=10_000, help="samples drawn (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of demo.json and demo.png")


def run(args: Namespace) -> dict[str, Any]:
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
    for name in ("RealNVP", "RealNVP + P4Inv"):
        torch.manual_seed(args.seed)
        flow = real_nvp(data.coordinates.n_coordinates, args.couplings)
        if name != "RealNVP":
            replace_permutations(flow, rank=args.rank, seed=args.seed)
        training = train(flow, data, Stage(args.steps, schedule="cosine", seed=args.seed), name)
        rows[name], samples[name] = measure(flow, data, md, args.samples, args.seed)
        rows[name] |= training
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "function")}
    results = {"settings": {**settings, "temperature": TEMPERATURE}, "rows": rows}
    path = save("demo", results, args.out)
    picture = draw(samples, rows, args.out / "demo.png")
    print()
    print(table(results))
    print(f"\n{path}\n{picture}")
    return results


def table(results: dict[str, Any]) -> str:
    """The results as a Markdown table, aligned for the terminal too."""
    return comparison(
        results["rows"],
        [
            ("trainable parameters", "parameters", "{:,}"),
            ("ms per training step", "ms_per_step", "{:.1f}"),
            ("held-out NLL (nats)", "nll", "{:.2f}"),
            ("mean u(x) (kT)", "energy_mean", "{:.3g}"),
            ("median u(x) (kT)", "energy_median", "{:.2f}"),
            ("low-energy fraction", "low_energy_fraction", "{:.3f}"),
            ("Ramachandran JS to MD", "ramachandran_js", "{:.4f}"),
            ("largest \\|x − F(F⁻¹(x))\\|", "round_trip", "{:.1e}"),
        ],
    )

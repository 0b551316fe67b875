"""``python -m benchmarks NAME``."""

from __future__ import annotations

from argparse import ArgumentParser
from importlib import import_module

COMMANDS = {
    "demo": "alanine dipeptide with fixed and with learned swaps; what `make demo` runs",
    "alanine_dipeptide": "the Boltzmann generators of Figure 7, at the scale of the paper",
    "bridge": "energies and forces a second, beside bgflow's bridge",
    "cost": "time and memory of a training evaluation against width (Figure 2)",
    "linear": "linear problems, Figures 3 to 5",
    "merge": "time of a merge",
    "mnist": "classification by perturbations of low rank, Figure 10",
    "step": "time of a training step of deep networks, eager and compiled",
    "density2d": "two-dimensional densities, Figures 6 and 8",
    "drift": "errors of inverse and log-determinant over up to 100,000 merges",
    "swaps": "where learned mixing pays: real data, permutations, LU and P4Inv by the number of couplings",
    "perturbation": "how to train a perturbation by Adam: learning rate, optimizer state, merge interval",
    "readme": "copy the result tables into README.md",
}


def main() -> None:
    parser = ArgumentParser(prog="python -m benchmarks", description="Measure, and write to benchmarks/results.")
    commands = parser.add_subparsers(required=True, metavar="NAME")
    for name, text in COMMANDS.items():
        module = import_module(f"benchmarks.{name}")
        command = commands.add_parser(name, help=text, description=text)
        module.add_arguments(command)
        command.set_defaults(function=module.run)
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()

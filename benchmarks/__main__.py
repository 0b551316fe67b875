"""``python -m benchmarks NAME``."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from importlib import import_module

# The module of a command has ``add_arguments(parser)`` and ``run(args)``. Only that of the command which is asked for
# is imported: what another one needs may be missing here, and help should not wait for torch.
COMMANDS = {
    "demo": ("paper.demo", "alanine dipeptide with fixed and with learned swaps; what `make demo` runs"),
    "linear": ("paper.linear", "linear problems, Figures 3 to 5"),
    "density2d": ("paper.density2d", "two-dimensional densities, Figures 6 and 8"),
    "alanine_dipeptide": (
        "paper.alanine_dipeptide",
        "the Boltzmann generators of Figure 7, at the scale of the paper",
    ),
    "mnist": ("paper.mnist", "classification by perturbations of low rank, Figure 10"),
    "cost": ("speed.cost", "time and memory of a training evaluation against width (Figure 2)"),
    "merge": ("speed.merge", "time of a merge"),
    "step": ("speed.step", "time of a training step of deep networks, eager and compiled"),
    "bridge": ("speed.bridge", "energies and forces a second, beside bgflow's bridge"),
    "drift": ("numerics.drift", "errors of inverse and log-determinant over up to 100,000 merges"),
    "swaps": (
        "mixing.swaps",
        "where learned mixing pays: real data, permutations, LU and P4Inv by the number of couplings",
    ),
    "perturbation": (
        "mixing.perturbation",
        "how to train a perturbation by Adam: learning rate, optimizer state, merge interval",
    ),
    "readme": ("harness.readme", "copy the result tables into README.md"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(sys.argv[1:] if arguments is None else list(arguments))
    args.function(args)


def parse(arguments: Sequence[str]) -> Namespace:
    """The arguments of a command, and the function that runs it."""
    parser = ArgumentParser(prog="python -m benchmarks", description="Measure, and write to benchmarks/results.")
    commands = parser.add_subparsers(required=True, metavar="NAME")
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if name in arguments[:1]:
            _complete(command, name, module)
    return parser.parse_args(arguments)


def _complete(command: ArgumentParser, name: str, module: str) -> None:
    try:
        imported = import_module(f"benchmarks.{module}")
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] in ("benchmarks", "p4flows"):
            raise
        sys.exit(f"{name}: {error.name} is not installed (pip install '.[benchmarks]')")
    imported.add_arguments(command)
    command.set_defaults(function=imported.run)


if __name__ == "__main__":
    main()

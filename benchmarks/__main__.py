"""``python -m benchmarks NAME``."""

from __future__ import annotations

import sys
from argparse import SUPPRESS, Action, ArgumentParser, HelpFormatter, Namespace
from collections.abc import Sequence
from importlib import import_module

from benchmarks.harness.commit import commit
from benchmarks.harness.interruption import interruptible
from benchmarks.harness.output import add_output, settle_output
from benchmarks.harness.redraw import add_redraw

# The module of a command has ``add_arguments(parser)`` and ``run(args)``; FILES, which it writes to ``args.out``; KEPT,
# the option for ``args.kept``, if it keeps there what an interrupted run goes on from; PICTURE, a function that draws
# its picture from the JSON alone, if there is one; and COMMITTED, False if its results are not. Only the module that is
# asked for is imported: others may need what is missing here, and help should not wait for torch.
COMMANDS = {
    "demo": (
        "paper.demo",
        "alanine dipeptide with fixed and with learned swaps; what `make demo` runs: 10 minutes on two cores",
    ),
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
    "layer": ("speed.layer", "time and memory of a whole training step of one linear layer by its width"),
    "wide": (
        "speed.wide",
        "wide flows with permutations, LU, dense and our layers as swaps, at equal wall-clock",
    ),
    "ranks": (
        "speed.ranks",
        "a deep and a wide flow on two processes: equal ranks, steps a second, and what is sent",
    ),
    "bridge": ("speed.bridge", "energies and forces a second, beside bgflow's bridge"),
    "drift": ("numerics.drift", "errors of inverse and log-determinant over up to 100,000 merges"),
    "swaps": (
        "mixing.swaps",
        "where learned mixing pays: real data, permutations, LU, dense and our layers by the number of couplings",
    ),
    "splines": ("mixing.splines", "the same mixes between couplings of rational-quadratic splines"),
    "perturbation": (
        "mixing.perturbation",
        "rank and learning rate of a perturbation by the width",
    ),
    "properties": (
        "properties.properties",
        "orthogonal and Lipschitz continuous layers (Section 5), and the rank of plain ones, beside their peers",
    ),
    "validation": (
        "molecules.validation",
        "simulations of alanine dipeptide beside OpenMM's own script, and equipartition",
    ),
    "recipe": (
        "molecules.recipe",
        "effective sample sizes of alanine dipeptide at 600 K and 300 K: splines, swaps, own samples, cooling",
    ),
    "readme": ("harness.readme", "copy the result tables into README.md and docs/"),
}


class Help(HelpFormatter):
    """Help that tells every default: numbers and names by itself, what else there is where the text does."""

    def _get_help_string(self, action: Action) -> str | None:
        default = action.default
        if default is None or isinstance(default, bool) or default == SUPPRESS:
            return action.help
        text = " ".join(map(str, default)) if isinstance(default, list) else str(default)
        return f"{action.help} (default: {text.replace('%', '%%')})"


def main(arguments: Sequence[str] | None = None) -> None:
    with interruptible():
        args = parse(sys.argv[1:] if arguments is None else list(arguments))
        try:
            settle_output(args)
        except ValueError as error:
            sys.exit(f"{args.name}: {error}")
        commit()  # a run takes hours, and files may change meanwhile
        try:
            args.function(args)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("the same command goes on from here" if "kept" in args else "") from None


def parse(arguments: Sequence[str]) -> Namespace:
    """The arguments of a command, and the function that runs it."""
    parser = ArgumentParser(
        prog="python -m benchmarks",
        description="Measure, and write to benchmarks/results; with --quick, and for the demo, to out.",
        epilog="python -m benchmarks NAME --help tells the options of a command.",
    )
    commands = parser.add_subparsers(required=True, metavar="NAME")
    for name, (_, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, formatter_class=Help)
        if name in arguments[:1]:
            complete(command, name)
    return parser.parse_args(arguments)


def complete(parser: ArgumentParser, name: str) -> None:
    """Import a command, and add its options."""
    try:
        module = import_module(f"benchmarks.{COMMANDS[name][0]}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("benchmarks", "p4flows"):
            raise
        sys.exit(f"{name}: {error.name} is not installed (pip install '.[benchmarks]')")
    module.add_arguments(parser)
    add_output(parser, name, module.FILES, getattr(module, "KEPT", None), getattr(module, "COMMITTED", True))
    parser.set_defaults(function=module.run)
    if hasattr(module, "PICTURE"):
        add_redraw(parser, name, module.run, module.PICTURE)


if __name__ == "__main__":
    main()

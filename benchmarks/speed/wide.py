"""Where O(n²) pays in minutes and nats: wide flows with permutations, LU, dense and our layers, in equal time."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.harness.claims import table as claims_table
from benchmarks.harness.device import add_device
from benchmarks.harness.environment import save
from benchmarks.harness.output import file_name
from benchmarks.harness.parts import part
from benchmarks.harness.threads import one_thread
from benchmarks.mixing.mixes import PERMUTATIONS
from benchmarks.speed.wide_claims import claims
from benchmarks.speed.wide_curves import BOTH, GAUSSIAN
from benchmarks.speed.wide_data import PROBLEMS
from benchmarks.speed.wide_figure import draw
from benchmarks.speed.wide_rates import choose_rates
from benchmarks.speed.wide_table import table
from benchmarks.speed.wide_training import train

__all__ = ["FILES", "KEPT", "METHODS", "PICTURE", "add_arguments", "claims", "run", "table"]

FILES = ("wide.json", "wide.png", "wide_all.png")
KEPT = "--parts"
PICTURE = draw

WIDTHS = {"patches": (576, 1024, 2304, 4096), GAUSSIAN: (512, 1024, 2048, 4096)}
# By the name on the command line: the name in tables, and what `mixing.mixes.put_between` makes of it.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "reversed": ("reversed", {"mix": "reversed"}),
    "random": ("random", {"mix": "random"}),
    "LU": ("LU", {"mix": "masked LU"}),
    "dense": ("dense", {"mix": "dense"}),
    "P4Inv-1": ("P4Inv, rank 1", {"mix": "P4Inv", "rank": 1}),
    "P4Inv-8": ("P4Inv, rank 8", {"mix": "P4Inv", "rank": 8}),
    "P4Inv-32": ("P4Inv, rank 32", {"mix": "P4Inv", "rank": 32}),
    "InvertibleLinear": ("InvertibleLinear", {"mix": "InvertibleLinear"}),
}
_FORWARD = "forward"
_DIRECTIONS = {"patches": [_FORWARD], GAUSSIAN: [_FORWARD, BOTH]}  # by default: only the latter has a true energy
_FEATURES_A_SECOND = {"patches": 48, GAUSSIAN: 96}  # of the default budget; a step on patches has two mixes in it
_BATCH, _HIDDEN = 128, 32
_QUICK_WIDTH, _QUICK_BUDGET = 64, 0.2
_NARROW = 1024  # up to which there is more than one seed


def add_arguments(parser: ArgumentParser) -> None:
    widths = sorted({n for found in WIDTHS.values() for n in found})
    parser.add_argument("--quick", action="store_true", help="n = 64 and 0.2 seconds, to see that everything runs")
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS), help="what is learned")
    parser.add_argument(
        "--widths", type=int, nargs="+", choices=widths, default=widths, metavar="N", help="n, where a problem has it"
    )
    parser.add_argument("--couplings", type=_positive, nargs="+", default=[2], help="of the flows on patches")
    parser.add_argument(
        "--directions", nargs="+", choices=[_FORWARD, BOTH], help="trained (default: forward; on the Gaussian both too)"
    )
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help="mixes")
    parser.add_argument("--seeds", type=_positive, default=1, help=f"up to n = {_NARROW}; wider flows have one")
    parser.add_argument(
        "--budget",
        type=partial(_positive, kind=float),
        help="seconds of training for each flow (default: n / 48; on the Gaussian n / 96)",
    )
    add_device(parser)


def _positive(text: str, kind: type = int) -> Any:
    with suppress(ValueError):
        if kind(text) > 0:
            return kind(text)
    raise ArgumentTypeError(f"expected a number above 0, got {text!r}")


@one_thread()
def run(args: Namespace) -> dict[str, Any]:
    results: dict[str, Any] = {"device": str(args.device), "rows": list(_rows(args))}
    if args.device.type == "cuda":
        results["gpu"] = torch.cuda.get_device_name(args.device)
    results["claims"] = claims(results)
    name = file_name(args)
    path = save(name, results, args.out)
    print(f"{path}\n{draw(results, args.out / f'{name}.png')}\n{claims_table(results)}\n\n{table(results)}")
    return results


def _rows(args: Namespace) -> Iterator[dict[str, Any]]:
    """A row for every flow that is trained for the whole budget: what it is, and what came out."""
    bar = tqdm([(case, method) for case in _cases(args) for method in _methods(args, case)], unit="method")
    for case, method in bar:
        name, mix = METHODS[method]
        bar.set_description("{problem}, n = {n}, {directions}, ".format(**case) + name)
        base = {**case, **mix, "device": str(args.device)}
        rates, tried = choose_rates(base, partial(_trained, args.kept))
        for seed in range(args.seeds if case["n"] <= _NARROW else 1):
            setting = {**base, **rates, "seed": seed}
            yield {**setting, "method": name, **_trained(args.kept, setting), **({} if seed else {"tried": tried})}


def _cases(args: Namespace) -> Iterator[dict[str, Any]]:
    """What the methods are compared on."""
    for problem in args.problems:
        widths = [_QUICK_WIDTH] if args.quick else [n for n in WIDTHS[problem] if n in args.widths]
        for directions in args.directions or _DIRECTIONS[problem]:
            for couplings in args.couplings if problem == "patches" else [0]:
                for n in widths:
                    case = {"problem": problem, "n": n, "couplings": couplings, "directions": directions}
                    budget = _QUICK_BUDGET if args.quick else n / _FEATURES_A_SECOND[problem]
                    yield {**case, "budget": args.budget or budget, "batch": _BATCH, "hidden": _HIDDEN}


def _methods(args: Namespace, case: dict[str, Any]) -> list[str]:
    """Those that learn something: without couplings, permutations do not."""
    return [method for method in args.methods if case["couplings"] or METHODS[method][1]["mix"] not in PERMUTATIONS]


def _trained(folder: Path, setting: dict[str, Any]) -> dict[str, Any]:
    return part(folder, setting, lambda: train(**setting))

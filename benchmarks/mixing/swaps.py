"""Where learned mixing pays: RealNVPs on real data with permutations, LU, dense matrices and our layers as swaps."""

from __future__ import annotations

import itertools
import time
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.claims import table as claims_table
from benchmarks.harness.environment import save
from benchmarks.harness.parts import part
from benchmarks.harness.pool import pool_of
from benchmarks.harness.threads import one_thread
from benchmarks.mixing.data import load
from benchmarks.mixing.swaps_claims import claims
from benchmarks.mixing.swaps_figure import draw
from benchmarks.mixing.swaps_table import summary, table
from benchmarks.mixing.training import begin, train_all

__all__ = [
    "FILES",
    "KEPT",
    "PICTURE",
    "PROBLEMS",
    "Problem",
    "add_arguments",
    "add_shared_arguments",
    "claims",
    "measure",
    "run",
    "summary",
    "table",
]

FILES = ("swaps.json", "swaps.png")
PICTURE = draw
KEPT = "--parts"

_RATES = (1e-3, 3e-3, 8e-3, 2e-2)
_BEYOND = {1e-3: 3e-4, 2e-2: 5e-2}  # tried too where the best is at the edge
_ROUNDS = 60


@dataclass(frozen=True)
class Problem:
    """Training on some data; ``couplings`` says for how many of them, and with how many seeds.

    With ``splines`` they are couplings of rational-quadratic splines, and not those of RealNVP.

    Learning rates are chosen with up to ``searched`` couplings; deeper flows take those of ``searched``. With more than
    ``nets_searched`` the networks beside a learned mix keep 0.001. Up to ``timed`` are compared at equal time too.
    """

    couplings: dict[int, int]
    searched: int = 8
    nets_searched: int = 8
    timed: int = 16
    steps: int = 400
    batch: int = 128
    hidden: int = 32
    splines: bool = False


# What :func:`benchmarks.mixing.mixes.put_between` makes of a name.
MIXES: dict[str, dict[str, Any]] = {
    "reversed": {"mix": "reversed"},
    "random": {"mix": "random"},
    "LU": {"mix": "LU"},
    "dense": {"mix": "dense"},
    "P4Inv, rank 1": {"mix": "P4Inv", "rank": 1},
    "P4Inv": {"mix": "P4Inv"},
    "InvertibleLinear": {"mix": "InvertibleLinear"},
}
_FIXED = ("reversed", "random")
_LEARNED = tuple(mix for mix in MIXES if mix not in _FIXED)
PROBLEMS = {
    "digits": Problem({2: 3, 4: 3, 8: 2, 16: 1}),
    "image-patches": Problem({2: 3, 4: 3, 8: 2, 16: 1}),
    "breast-cancer": Problem({2: 3, 4: 3, 8: 2, 16: 1}),
    # The nets and, at last, the depth of the paper.
    "alanine-dipeptide": Problem(
        {2: 2, 8: 1, 16: 1, 50: 1}, nets_searched=2, timed=8, steps=1_000, batch=256, hidden=60
    ),
}


def add_arguments(parser: ArgumentParser) -> None:
    add_shared_arguments(parser, PROBLEMS)
    parser.add_argument("--most-couplings", type=int, default=50, help="leave deeper flows out")
    parser.add_argument("--frames", type=int, default=60_000, help="MD frames of the molecule, 0.1 ps apart")
    parser.add_argument(
        "--equal-time", action=BooleanOptionalAction, default=True, help="compare at equal time too (the default)"
    )


def add_shared_arguments(parser: ArgumentParser, problems: dict[str, Problem]) -> None:
    """The options of every comparison of mixes."""
    parser.add_argument("--quick", action="store_true", help="20 steps and one seed, to see that everything runs")
    parser.add_argument(
        "--data", nargs="+", choices=list(problems), default=list(problems), metavar="NAME", help="problems"
    )
    parser.add_argument("--jobs", type=int, default=2, help="flows trained at a time, on one thread each")


@one_thread()
def run(args: Namespace) -> dict[str, Any]:
    frames = 1_500 if args.quick else args.frames
    problems = {
        name: replace(problem, couplings={n: k for n, k in problem.couplings.items() if n <= args.most_couplings})
        for name, problem in PROBLEMS.items()
        if name in args.data
    }
    relative: dict[tuple[str, int], dict[str, float]] = {}
    with pool_of(args.jobs) as pool:
        rows = measure(pool, args.kept, problems, frames, args.quick)
        if args.equal_time:
            timed = [row for row in rows if row["couplings"] <= PROBLEMS[row["data"]].timed]
            for key, row in {(row["data"], row["couplings"]): row for row in timed}.items():
                relative[key] = _relative_times(args.kept, row)
            _add_equal_time(pool, args.kept, timed, relative)
    times = [{"data": data, "couplings": n, "times": found} for (data, n), found in relative.items()]
    results = {"rows": rows, "relative_times": times}
    results["claims"] = claims(results)
    path = save("swaps", results, args.out)
    print(f"{path}\n{draw(results, args.out / 'swaps.png')}\n{claims_table(results)}\n\n{table(results)}")
    return results


def measure(
    pool: Executor, folder: Path, problems: dict[str, Problem], frames: int, quick: bool
) -> list[dict[str, Any]]:
    """A row for every problem, number of couplings, mix and seed, at learning rates chosen on the validation part."""
    rows: list[dict[str, Any]] = []
    for name, problem in problems.items():
        if quick:
            problem = replace(problem, couplings={2: 1}, steps=20)
        rates: dict[int, dict[str, Any]] = {}
        for n in problem.couplings:
            base = {"data": name, "couplings": n, "frames": frames}
            base |= {key: getattr(problem, key) for key in ("steps", "batch", "hidden")}
            base |= {"splines": True} if problem.splines else {}
            if n <= problem.searched:
                rates[n] = _choose_rates(pool, folder, base, n <= problem.nets_searched)
            chosen = rates[max(c for c in rates if c <= problem.searched)]
            settings = [
                {**base, **MIXES[mix], "seed": seed, **chosen[mix]["rates"]}
                for mix in MIXES
                for seed in range(problem.couplings[n])
            ]
            mixes = [mix for mix in MIXES for _ in range(problem.couplings[n])]
            measured = train_all(pool, folder, settings, f"{name}, {n} couplings, all seeds")
            for mix, setting, result in zip(mixes, settings, measured, strict=True):
                rows.append({**setting, "mix": mix, **result})
                if setting["seed"] == 0 and n <= problem.searched:
                    rows[-1]["tried"] = chosen[mix]["tried"]
    return rows


def _choose_rates(pool: Executor, folder: Path, base: dict[str, Any], nets: bool) -> dict[str, dict[str, Any]]:
    """For every mix the learning rates with the lowest validation NLL of seed 0, and what was tried.

    With a permutation there is that of the networks. For a learned mix that of the mix is chosen first, with 0.001 for
    the networks; then, if ``nets``, that of the networks, that of the mix again, and so on until neither changes.
    """
    name = f"{base['data']}, {base['couplings']} couplings"
    fixed = {mix: {**base, **MIXES[mix], "seed": 0} for mix in _FIXED}
    learned = {mix: {**base, **MIXES[mix], "seed": 0, "net_rate": _RATES[0]} for mix in _LEARNED}
    chosen = _descend(pool, folder, fixed, ("net_rate",), name)
    return chosen | _descend(pool, folder, learned, ("mix_rate", "net_rate") if nets else ("mix_rate",), name)


def _descend(
    pool: Executor, folder: Path, settings: dict[str, dict[str, Any]], options: tuple[str, ...], title: str
) -> dict[str, dict[str, Any]]:
    """Coordinate descent on the grid, for each mix until no option changes any more."""
    tried: dict[str, dict[str, dict[str, float]]] = {mix: {} for mix in settings}
    settled = dict.fromkeys(settings, 0)  # searches since an option last changed
    for option in itertools.cycle(options):
        moving = {mix: setting for mix, setting in settings.items() if settled[mix] < len(options)}
        if not moving:
            break
        for mix, found in _search(pool, folder, moving, option, f"{title}, {option}").items():
            best = min(found, key=found.get)
            settled[mix] = settled[mix] + 1 if settings[mix].get(option) == best else 1
            settings[mix][option] = best
            tried[mix][option] = {f"{rate:g}": nll for rate, nll in sorted(found.items())}
    rates = {mix: {name: value for name, value in s.items() if name.endswith("_rate")} for mix, s in settings.items()}
    return {mix: {"rates": rates[mix], "tried": tried[mix]} for mix in settings}


def _search(
    pool: Executor, folder: Path, settings: dict[str, dict[str, Any]], option: str, title: str
) -> dict[str, dict[float, float]]:
    """The validation NLL of every mix by the rate, on the grid, and beyond it where the best is at its edge."""
    tried: dict[str, dict[float, float]] = {mix: {} for mix in settings}
    wanted = [(mix, rate) for mix in settings for rate in _RATES]
    while wanted:
        results = train_all(pool, folder, [{**settings[mix], option: rate} for mix, rate in wanted], title)
        for (mix, rate), result in zip(wanted, results, strict=True):
            tried[mix][rate] = result["validation"]
        further = [(mix, _BEYOND.get(min(found, key=found.get))) for mix, found in tried.items()]
        wanted = [(mix, rate) for mix, rate in further if rate and rate not in tried[mix]]
    return tried


def _add_equal_time(
    pool: Executor, folder: Path, rows: list[dict[str, Any]], relative: dict[tuple[str, int], dict[str, float]]
) -> None:
    """Train seed 0 of each learned mix for the time that a flow with fixed permutations takes for its steps."""
    timed = [row for row in rows if row["mix"] in _LEARNED and row["seed"] == 0]
    names = ("data", "couplings", "frames", "batch", "hidden", "seed", "net_rate", "mix_rate")
    settings = [
        {
            **{name: row[name] for name in names},
            **MIXES[row["mix"]],
            "steps": max(1, round(row["steps"] / max(1.0, relative[row["data"], row["couplings"]][row["mix"]]))),
        }
        for row in timed
    ]
    for row, setting, result in zip(timed, settings, train_all(pool, folder, settings, "equal time"), strict=True):
        row["equal_time"] = {"steps": setting["steps"], **result}


def _relative_times(folder: Path, shape: dict[str, Any]) -> dict[str, float]:
    """The time of a step with each mix, in that of one with fixed permutations, measured in turns."""
    names = ("couplings", "batch", "hidden")

    def measure() -> dict[str, float]:
        x, *_ = load(shape["data"], 0, shape["frames"])
        options = {name: shape[name] for name in names} | {"seed": 0, "steps": _ROUNDS, "net_rate": 1e-3}
        steps = {name: begin(x, **options, **mix)[1] for name, mix in MIXES.items()}
        times: dict[str, list[float]] = {mix: [] for mix in steps}
        for _ in range(_ROUNDS):
            for mix, step in steps.items():
                start = time.perf_counter()
                step()
                times[mix].append(time.perf_counter() - start)
        # Means, as merges are part of the cost; but a step that the machine interrupts is not.
        means = {mix: np.minimum(values[10:], 3 * np.median(values)).mean() for mix, values in times.items()}
        fixed = np.mean([means[mix] for mix in _FIXED])
        return {mix: float(value / fixed) for mix, value in means.items()}

    key = {"timing": _ROUNDS, **{name: shape[name] for name in ("data", "frames", *names)}}
    return part(folder, key, measure)

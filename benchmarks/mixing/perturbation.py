"""How to train a perturbation by Adam: its learning rate, what becomes of the optimizer's state, and the interval."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from itertools import product
from typing import Any

import numpy as np

from benchmarks.harness.environment import save
from benchmarks.harness.pool import pool_of
from benchmarks.harness.threads import one_thread
from benchmarks.mixing.swaps import train_all

__all__ = ["FILES", "KEPT", "add_arguments", "run", "table"]

FILES = ("perturbation.json",)
KEPT = "--parts"

# Two couplings leave most to the swaps, so that differences show.
_FLOW = {"data": "alanine-dipeptide", "couplings": 2, "batch": 256, "hidden": 60, "lr": 1e-3}
_RANKS = ("P4Inv, rank 1", "P4Inv, rank 8")
_RATES = (1e-4, 3e-4, 1e-3, 3e-3)


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="20 steps and one seed, to see that everything runs")
    parser.add_argument("--steps", type=int, default=3_000, help="of each training")
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each kind")
    parser.add_argument("--jobs", type=int, default=2, help="flows trained at a time")


@one_thread()
def run(args: Namespace) -> dict[str, Any]:
    steps, seeds, frames = (20, 1, 1_500) if args.quick else (args.steps, args.seeds, 250_000)
    rules = [{"mix": mix} for mix in ("reversed", "dense")]
    for mix, (reset, every) in product(_RANKS, (("momentum", 10), ("v", 10), ("all", 10), ("momentum", 100))):
        rules += [{"mix": mix, "reset": reset, "every": every, "perturbation_lr": rate} for rate in _RATES]
    settings = [
        {**_FLOW, "steps": steps, "frames": frames, **rule, "seed": seed} for rule in rules for seed in range(seeds)
    ]
    with pool_of(args.jobs) as pool:
        measured = train_all(pool, args.kept, settings, "trainings")
    rows = [{**setting, **result} for setting, result in zip(settings, measured, strict=True)]
    results = {"rows": rows}
    print(f"{save('perturbation', results, args.out)}\n{table(results)}")
    return results


def table(results: dict[str, Any]) -> str:
    """Held-out NLL, mean ± standard deviation over seeds, by the learning rate of U and V."""
    rows = results["rows"]

    def cell(**rule: Any) -> str:
        nll = np.array([row["nll"] for row in rows if all(row.get(key) == value for key, value in rule.items())])
        return f"{nll.mean():.3f} ± {nll.std():.3f}"

    rates = list(dict.fromkeys(row["perturbation_lr"] for row in rows if "perturbation_lr" in row))
    lines = [
        f"| swaps | reset | N | {' | '.join(f'{rate:g}' for rate in rates)} |",
        "|---|---|---:|" + "---:|" * len(rates),
    ]
    for mix, reset, every in dict.fromkeys((row["mix"], row.get("reset"), row.get("every")) for row in rows):
        if reset is None:
            # Without a perturbation there is the learning rate of all.
            cells = (cell(mix=mix) if rate == _FLOW["lr"] else "" for rate in rates)
            lines.append(f"| {mix} | | | {' | '.join(cells)} |")
            continue
        cells = (cell(mix=mix, reset=reset, every=every, perturbation_lr=rate) for rate in rates)
        lines.append(f"| {mix} | {reset} | {every} | {' | '.join(cells)} |")
    return "\n".join(lines)

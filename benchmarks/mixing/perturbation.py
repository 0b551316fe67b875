"""The rank and the learning rate of a perturbation by the width: whether one rate serves all ranks."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from benchmarks.harness.claims import claim
from benchmarks.harness.claims import table as claims_table
from benchmarks.harness.environment import save
from benchmarks.harness.pool import pool_of
from benchmarks.harness.threads import one_thread
from benchmarks.mixing.training import train_all
from p4flows import P4Inv

__all__ = ["FILES", "KEPT", "add_arguments", "claims", "run", "table"]

FILES = ("perturbation.json",)
KEPT = "--parts"

# Two couplings leave most to the swaps, so that differences show.
_FLOW = {"couplings": 2, "batch": 128, "hidden": 32, "net_rate": 1e-3, "seed": 0, "frames": 0}
_WIDTHS = {"breast-cancer": 30, "image-patches": 64, "image-patches-16": 256, "image-patches-32": 1024}
_STEPS = {30: 400, 64: 400, 256: 200, 1024: 100}
_RATES = (1e-3, 3e-3, 8e-3, 2e-2)
# The layers with their defaults on wide data once more, for longer, where smaller rates are the better ones.
_LONG = {1024: 600}
_LONG_RATES = (3e-4, 1e-3, 3e-3)
_GOAL = 0.031  # nats a dimension, what a prototype of rank 64 came to


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="20 steps and two widths, to see that everything runs")
    parser.add_argument(
        "--widths", type=int, nargs="+", choices=list(_WIDTHS.values()), default=list(_WIDTHS.values()), help="n"
    )
    parser.add_argument("--jobs", type=int, default=2, help="flows trained at a time, on one thread each")


@one_thread()
def run(args: Namespace) -> dict[str, Any]:
    settings = []
    widths = [30, 64] if args.quick else args.widths
    for data, n in ((data, n) for data, n in _WIDTHS.items() if n in widths):
        flow = {**_FLOW, "data": data, "steps": 20 if args.quick else _STEPS[n]}
        settings.append({**flow, "mix": "reversed"})
        settings += [{**flow, "mix": mix, "mix_rate": rate} for mix in ("dense", "InvertibleLinear") for rate in _RATES]
        settings += [{**flow, "mix": "P4Inv", "rank": k, "mix_rate": rate} for k in ranks(n) for rate in _RATES]
        if n in _LONG and not args.quick:
            flow["steps"] = _LONG[n]
            settings.append({**flow, "mix": "reversed"})
            settings += [
                {**flow, "mix": mix, "mix_rate": rate} for mix in ("P4Inv", "InvertibleLinear") for rate in _LONG_RATES
            ]
    with pool_of(args.jobs) as pool:
        measured = train_all(pool, args.kept, settings, "trainings")
    rows = [
        {"n": _WIDTHS[setting["data"]], **setting, **result} for setting, result in zip(settings, measured, strict=True)
    ]
    results = {"rows": rows}
    results["claims"] = claims(results)
    print(f"{save('perturbation', results, args.out)}\n{claims_table(results)}\n\n{table(results)}")
    return results


def ranks(n: int) -> list[int]:
    """1, 8, 16, what P4Inv takes by default, and a quarter and a half of n."""
    return sorted({1, 8, 16, P4Inv(n, device="cpu").rank, n // 4, n // 2})


def claims(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Whether one learning rate serves all ranks: by the validation NLL a dimension, at each width."""
    found = []
    long = [row for row in results["rows"] if row["n"] in _LONG and row["steps"] == _LONG[row["n"]]]
    rows = [row for row in results["rows"] if row not in long]
    for n in dict.fromkeys(row["n"] for row in rows):
        best: dict[int, float] = {}
        by_rate: dict[float, dict[int, float]] = {}
        for row in rows:
            if row["n"] == n and row["mix"] == "P4Inv" and row["rank"] > 1:
                by_rate.setdefault(row["mix_rate"], {})[row["rank"]] = row["validation"] / n
                best[row["rank"]] = min(best.get(row["rank"], float("inf")), row["validation"] / n)
        loss = {rate: max(nll[k] - best[k] for k in nll) for rate, nll in by_rate.items()}
        rate = min(loss, key=loss.get)
        text = f"n = {n}: one rate serves all ranks above 1"
        rule = "no rank loses more than 0.02 nats a dimension"
        found.append(claim(text, "our goal", rule, f"{loss[rate]:.3f} at {rate:g}", loss[rate] <= 0.02))
    for n in dict.fromkeys(row["n"] for row in long):
        nll, fixed = (
            min(row["validation"] for row in long if (row["n"], row["mix"]) == (n, mix)) / n
            for mix in ("P4Inv", "reversed")
        )
        text = f"n = {n}, {_LONG[n]} steps: P4Inv with its defaults, nats a dimension"
        ours = f"{nll:.3f}; reversed permutations {fixed:.3f}"
        found.append(claim(text, "our goal", f"≤ {_GOAL}", ours, nll <= _GOAL))
    return found


def table(results: dict[str, Any]) -> str:
    """Validation NLL a dimension by the learning rate of U (or of the weight)."""
    rows = results["rows"]
    rates = sorted({row["mix_rate"] for row in rows if "mix_rate" in row})
    lines = [f"| n | steps | swaps | {' | '.join(f'{rate:g}' for rate in rates)} |"]
    lines.append("|---:|---:|---|" + "---:|" * len(rates))
    found: dict[tuple, dict[float | None, float]] = {}
    for row in rows:
        key = row["n"], row["steps"], row["mix"], row.get("rank")
        found.setdefault(key, {})[row.get("mix_rate")] = row["validation"] / row["n"]
    for (n, steps, mix, rank), nll in found.items():
        name = mix if rank is None else f"{mix}, rank {rank}"
        cells = [
            f"{nll[rate]:.3f}" if rate in nll else "" for rate in (rates if None not in nll else [None, *rates[1:]])
        ]
        lines.append(f"| {n} | {steps} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)

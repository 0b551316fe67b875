"""The rank and the learning rate of a perturbation by the width: whether one rate serves all ranks."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from benchmarks.harness.claims import table as claims_table
from benchmarks.harness.environment import save
from benchmarks.harness.pool import pool_of
from benchmarks.harness.threads import one_thread
from benchmarks.mixing.training import train_all
from p4flows import P4Inv

__all__ = ["FILES", "KEPT", "add_arguments", "run", "table"]

FILES = ("perturbation.json",)
KEPT = "--parts"

# Two couplings leave most to the swaps, so that differences show.
_FLOW = {"couplings": 2, "batch": 128, "hidden": 32, "net_rate": 1e-3, "seed": 0, "frames": 0}
_WIDTHS = {"breast-cancer": 30, "image-patches": 64, "image-patches-16": 256, "image-patches-32": 1024}
_STEPS = {30: 400, 64: 400, 256: 400, 1024: 100}
_RATES = (1e-3, 3e-3, 8e-3, 2e-2)


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
    with pool_of(args.jobs) as pool:
        measured = train_all(pool, args.kept, settings, "trainings")
    rows = [
        {"n": _WIDTHS[setting["data"]], **setting, **result} for setting, result in zip(settings, measured, strict=True)
    ]
    results = {"rows": rows, "claims": claims(rows)}
    print(f"{save('perturbation', results, args.out)}\n{claims_table(results)}\n\n{table(results)}")
    return results


def ranks(n: int) -> list[int]:
    """1, 8, 16, a quarter and a half of n, and what P4Inv takes by default."""
    return sorted({1, 8, 16, n // 4, n // 2, P4Inv(n, device="cpu").rank})


def claims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Whether one learning rate serves all ranks: by the validation NLL a dimension, at each width."""
    found = []
    for n in dict.fromkeys(row["n"] for row in rows):
        best = {}
        by_rate: dict[float, dict[int, float]] = {}
        for row in rows:
            if row["n"] == n and row["mix"] == "P4Inv" and row["rank"] > 1:
                by_rate.setdefault(row["mix_rate"], {})[row["rank"]] = row["validation"] / n
                best[row["rank"]] = min(best.get(row["rank"], float("inf")), row["validation"] / n)
        loss = {rate: max(nll[k] - best[k] for k in nll) for rate, nll in by_rate.items()}
        rate = min(loss, key=loss.get)
        found.append(
            {
                "claim": f"n = {n}: one rate serves all ranks above 1",
                "paper": "at most 0.02 nats a dimension lost by any",
                "ours": f"{loss[rate]:.3f} at {rate:g}",
                "holds": bool(loss[rate] <= 0.02),
            }
        )
    return found


def table(results: dict[str, Any]) -> str:
    """Validation NLL a dimension by the learning rate of U (or of the weight)."""
    rows = results["rows"]
    rates = list(dict.fromkeys(row["mix_rate"] for row in rows if "mix_rate" in row))
    lines = [f"| n | swaps | {' | '.join(f'{rate:g}' for rate in rates)} |", "|---:|---|" + "---:|" * len(rates)]
    for n, mix, rank in dict.fromkeys((row["n"], row["mix"], row.get("rank")) for row in rows):
        here = [row for row in rows if (row["n"], row["mix"], row.get("rank")) == (n, mix, rank)]
        if mix == "reversed":
            lines.append(f"| {n} | reversed | {here[0]['validation'] / n:.3f} |" + " |" * (len(rates) - 1))
            continue
        name = mix if rank is None else f"P4Inv, rank {rank}"
        cells = {row["mix_rate"]: f"{row['validation'] / n:.3f}" for row in here}
        lines.append(f"| {n} | {name} | {' | '.join(cells[rate] for rate in rates)} |")
    return "\n".join(lines)

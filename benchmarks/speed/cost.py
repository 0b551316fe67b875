"""Figure 2 and beyond: the time and memory of a training evaluation in both directions, against width."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from argparse import ArgumentParser, Namespace
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.harness.bgflow_checkout import find_bgflow
from benchmarks.harness.device import add_device
from benchmarks.harness.environment import save
from benchmarks.harness.output import file_name
from benchmarks.speed.cost_figure import draw
from benchmarks.speed.layers import METHODS, Evaluation
from benchmarks.speed.memory import allocated

__all__ = ["FILES", "PICTURE", "add_arguments", "run", "table"]

FILES = ("cost.json", "cost.png")
PICTURE = draw

DIRECTIONS = ("forward", "inverse")
_TOO_SLOW = 1.0  # seconds; a method that took longer is left out of wider layers
_BLOCK = 0.03  # seconds; evaluations of one method that are timed together


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--widths", type=int, nargs="+", default=[2, 16, 64, 256, 512, 1024, 2048, 4096, 8192], help="of the layers"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 256], help="batch sizes")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each width, batch and direction")
    add_device(parser)


def run(args: Namespace) -> dict[str, Any]:
    warnings.filterwarnings("ignore")  # the peers' deprecations
    find_bgflow()
    device, file = args.device, file_name(args)
    rows: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    slow: set[tuple[str, str]] = set()
    for n in tqdm(args.widths, desc="width"):
        evaluations: dict[str, tuple[Evaluation, Evaluation]] = {}
        for name, make in METHODS.items():
            if all((name, direction) in slow for direction in DIRECTIONS):
                continue
            try:
                evaluations[name] = make(n, device)
            except Exception as error:  # a peer that does not run here is a result too
                left_out[f"{name}, n = {n}"] = f"{type(error).__name__}: {error}"[:200]
        for batch in args.batches:
            x = torch.randn(batch, n, device=device)
            for i, direction in enumerate(DIRECTIONS):
                candidates = {k: v[i] for k, v in evaluations.items() if (k, direction) not in slow}
                times, failed = _measure(candidates, x, args.seconds)
                left_out |= {f"{name}, {direction}, n = {n}": reason for name, reason in failed.items()}
                slow |= {(name, direction) for name, seconds in times.items() if seconds > _TOO_SLOW}
                for name, seconds in times.items():
                    rows.append(
                        {
                            "n": n,
                            "batch": batch,
                            "direction": direction,
                            "method": name,
                            "ms": 1000 * seconds,
                            "to_p4inv": seconds / times["P4Inv rank 1"],
                            "to_limit": seconds / times["limit"],
                            # The profiler keeps a record of every operation: thousands, for Householder layers.
                            "peak_mib": _peak_mib(candidates[name], x) if seconds < 0.1 * n / 512 else None,
                        }
                    )
        results = {"device": str(device), "rows": rows, "exponents": _exponents(rows), "left_out": left_out}
        save(file, results, args.out)  # after every width, so that an interruption loses little
    print(draw(results, args.out / f"{file}.png"))
    print(table(results))
    return results


def _measure(
    candidates: dict[str, Evaluation], x: torch.Tensor, budget: float
) -> tuple[dict[str, float], dict[str, str]]:
    """Median seconds of an evaluation, over rounds in which every method has its turn."""
    repeats, failed = {}, {}
    for name, evaluate in candidates.items():
        try:
            evaluate(x)
            once = min(_time(evaluate, x, 1) for _ in range(2))
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"[:200]
            continue
        repeats[name] = max(1, math.ceil(_BLOCK / once))
    times: dict[str, list[float]] = {name: [] for name in repeats}
    start, rounds = time.perf_counter(), 0
    while rounds < 3 or (time.perf_counter() - start < budget and rounds < 50):
        for name, count in repeats.items():
            if rounds < 3 or name in ("P4Inv rank 1", "limit") or statistics.median(times[name]) < _TOO_SLOW / 4:
                times[name].append(_time(candidates[name], x, count) / count)
        rounds += 1
    return {name: statistics.median(values) for name, values in times.items()}, failed


def _time(evaluate: Evaluation, x: torch.Tensor, count: int) -> float:
    for _ in range(count // 4):  # caches and threads are those of the method before
        evaluate(x)
    if x.is_cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(count):
            evaluate(x)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    begin = time.perf_counter()
    for _ in range(count):
        evaluate(x)
    return time.perf_counter() - begin


def _peak_mib(evaluate: Evaluation, x: torch.Tensor) -> float:
    return allocated(lambda: evaluate(x), x.device).peak / 2**20


def _exponents(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Slope of ln(time) against ln(n) over n >= 1024, by least squares."""
    exponents = {}
    for key in dict.fromkeys((row["method"], row["direction"], row["batch"]) for row in rows):
        points = [
            (math.log(row["n"]), math.log(row["ms"]))
            for row in rows
            if (row["method"], row["direction"], row["batch"]) == key and row["n"] >= 1024
        ]
        if len(points) > 1:
            exponents["{}, {}, batch {}".format(*key)] = statistics.linear_regression(*zip(*points, strict=True)).slope
    return exponents


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def table(results: dict[str, Any]) -> str:
    """Times as multiples of P4Inv's, for the first batch size, as a Markdown table."""
    rows = [row for row in results["rows"] if row["batch"] == results["rows"][0]["batch"]]
    widths = [n for n in dict.fromkeys(row["n"] for row in rows) if n >= 64]
    lines = [
        "| | " + " | ".join(f"n = {n}" for n in widths) + " |",
        "|---|" + "---:|" * len(widths),
    ]
    found = {(row["method"], row["n"], row["direction"]): row for row in rows}
    for method in METHODS:
        if not any((method, n, direction) in found for n in widths for direction in DIRECTIONS):
            continue
        cells = []
        for n in widths:
            pair = [found.get((method, n, direction)) for direction in DIRECTIONS]
            key, unit = ("ms", " ms") if method == "P4Inv rank 1" else ("to_p4inv", "")
            cells.append(" / ".join("–" if row is None else _short(row[key]) + unit for row in pair))
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)

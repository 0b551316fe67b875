"""`swaps` between couplings of rational-quadratic splines, beside which sbi's `nsf` has LU-decomposed matrices."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from benchmarks.harness.claims import claim
from benchmarks.harness.claims import table as claims_table
from benchmarks.harness.environment import save
from benchmarks.harness.pool import pool_of
from benchmarks.harness.threads import one_thread
from benchmarks.mixing.swaps import Problem, add_shared_arguments, measure
from benchmarks.mixing.swaps_table import by_row, table

__all__ = ["FILES", "KEPT", "PROBLEMS", "add_arguments", "claims", "run", "table"]

FILES = ("splines.json",)
KEPT = "--parts"
PROBLEMS = {name: Problem({4: 2}, nets_searched=0, splines=True) for name in ("digits", "breast-cancer")}


def add_arguments(parser: ArgumentParser) -> None:
    add_shared_arguments(parser, PROBLEMS)


@one_thread()
def run(args: Namespace) -> dict[str, Any]:
    with pool_of(args.jobs) as pool:
        problems = {name: PROBLEMS[name] for name in args.data}
        results: dict[str, Any] = {"rows": measure(pool, args.kept, problems, 0, args.quick)}
    results["claims"] = claims(results)
    print(f"{save('splines', results, args.out)}\n{claims_table(results)}\n\n{table(results)}")
    return results


def claims(results: dict[str, Any]) -> list[dict[str, Any]]:
    """A mean over seeds of the test NLL is what is compared."""
    found = by_row(results["rows"]).values()
    level = sum(min(row["P4Inv"].mean(), row["InvertibleLinear"].mean()) <= row["LU"].mean() for row in found)
    return [
        claim(
            "between spline couplings the better of ours is at least level with LU",
            "our goal: every row",
            f"all {len(found)} rows that were run",
            f"{level} of {len(found)}",
            level == len(found),
        )
    ]

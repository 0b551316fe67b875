"""What Section 4.2 says of the linear problems, judged by rules over the rows of `linear`."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.harness.claims import claim

__all__ = ["claims"]

_PD, _SO, _MINUS = "positive definite, 32", "SO(128)", "-I, 101"


def claims(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows for :func:`benchmarks.harness.claims.table`.

    A matrix is recovered where the loss falls below ``results["threshold"]``, and iterations are counted until then.
    """
    by = {(row["problem"], row["method"]): row for row in results["rows"]}
    threshold = results["threshold"]
    recovered = f"loss ≤ {threshold:g}"

    def iterations(problem: str, method: str) -> float:
        row = by[problem, method]
        return next((s for s, l in zip(row["step"], row["loss"], strict=True) if l <= threshold), math.inf)

    def ratio(problem: str, method: str) -> float:
        standard = iterations(problem, "standard")
        return iterations(problem, method) / standard if standard < math.inf else math.nan

    def times(r: float) -> str:
        return f"{r:.2f} times" if math.isfinite(r) else f"never at {threshold:g}"

    found = []
    for N, low, high, said in (
        (1, 0, 1.1, "the same"),
        (10, 0, 1.3, "minimally more"),
        (50, 1.5, 2.5, "twice as many"),
    ):
        r = ratio(_PD, f"P4Inv, N = {N}")
        rule = f"{recovered} in {low} to {high} times" if low else f"{recovered} in at most {high} times"
        text = f"{_PD}: iterations with N = {N}, in those of a standard layer"
        found.append(claim(text, said, rule, times(r), low <= r <= high))
    inverse, r = by[_PD, "P4Inv through its inverse"]["loss"], ratio(_PD, "P4Inv through its inverse")
    found.append(
        claim(
            f"{_PD}: trained through the inverse",
            "recovered, but slower",
            f"{recovered} in more than 1.1 times",
            f"{times(r)}, loss {inverse[-1]:.1e} at the end",
            1.1 < r < math.inf,
        )
    )
    r = ratio(_SO, "P4Inv, N = 1")
    text = f"{_SO}: iterations with N = 1, in those of a standard layer"
    found.append(claim(text, "more", f"{recovered} in more than 1 times", times(r), 1 < r < math.inf))
    worst = max(by[_SO, "P4Inv, N = 1"]["residual"])
    text = f"{_SO}: largest residual of the inverse"
    found.append(claim(text, "5 decimals throughout", "< 1e-5 at every point", f"{worst:.1e}", worst < 1e-5))
    stuck = by[_SO, "P4Inv through its inverse"]["loss"]
    ours = f"loss {stuck[-1]:.2g}, from {stuck[0]:.2g}"
    text = f"{_SO}: trained through the inverse"
    found.append(claim(text, "not successful", "loss > 0.1 at the end", ours, stuck[-1] > 0.1))
    held = by[_MINUS, "P4Inv, N = 1, penalty"]
    ours = f"loss {min(held['loss']):.2g} at least, sign {held['sign'][-1]:+.0f}"
    rule = f"loss > {1000 * threshold:g} throughout, sign +1 at the end"
    stays = held["sign"][-1] == 1 and min(held["loss"]) > 1000 * threshold
    found.append(claim(f"{_MINUS}: with a penalty", "not reached", rule, ours, stays))
    free, r = by[_MINUS, "P4Inv, N = 1"], ratio(_MINUS, "P4Inv, N = 1")
    said, rule = "reached almost as fast as by a standard layer", f"{recovered} in at most 1.2 times the iterations"
    ours = f"{times(r)}, loss {free['loss'][-1]:.1e} at the end"
    found.append(claim(f"{_MINUS}: without a penalty", said, rule, ours, r <= 1.2))
    ours = f"{free['sign'][0]:+.0f} to {free['sign'][-1]:+.0f}"
    text = f"{_MINUS}: the sign of the determinant"
    found.append(claim(text, "changes", "-1 at the end", ours, free["sign"][-1] == -1))
    ours = f"{max(free['residual']):.1e} at most, {free['residual'][-1]:.1e} at the end"
    text = f"{_MINUS}: residual of the inverse"
    said = "5 decimals after the crossing"
    found.append(claim(text, said, "< 1e-5 at the end", ours, free["residual"][-1] < 1e-5))
    for method, more in (("P4Inv, N = 1", ""), ("P4Inv, N = 1, no correction", ", never corrected by rule")):
        error = by[_MINUS, method]["logabsdet_error"][-1]
        text = f"{_MINUS}: error of ln|det| at the end{more}"
        found.append(claim(text, "the correct value", "≤ 1e-5", f"{error:.1e}", error <= 1e-5))
    r = ratio(_PD, "P4Inv, N = 50, rank 8")
    text = f"{_PD}: iterations with N = 50 and rank 8, in those of a standard layer"
    found.append(claim(text, "our goal", f"{recovered} in at most 1.1 times", times(r), r <= 1.1))
    return found

"""What is claimed of wide flows at equal time, judged by rules over the rows of `wide`."""

from __future__ import annotations

from typing import Any

from benchmarks.harness.claims import claim
from benchmarks.speed.wide_curves import OURS, best_of_ours, by_case, earlier, end
from benchmarks.speed.wide_table import times

__all__ = ["claims"]

_WIDTHS = (2048, 2304)  # n = 2,048, or the nearest square
_GOALS = {"LU": 3, "dense": 8}


def claims(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows for :func:`benchmarks.harness.claims.table`, for what was run.

    Of ours it is always the one with the lowest validation NLL that counts.
    """
    found, ahead = [], []
    for (problem, directions, couplings, n), methods in by_case(results).items():
        ours = best_of_ours(methods)
        if ours is None:
            continue
        others = [rows for method, rows in methods.items() if not method.startswith(OURS)]
        if others:
            ahead.append(all(end(methods[ours]) < end(rows) for rows in others))
        for rival, goal in _GOALS.items() if n in _WIDTHS else ():
            if rival not in methods:
                continue
            ratio = earlier(methods[ours], methods[rival])
            flow = f", {couplings} couplings" if couplings else ""
            text = f"{problem}, n = {n}{flow}, {directions}: times earlier than {rival} at what it ends with"
            said = f"{times(ratio)}, {ours}"
            found.append(claim(text, "our goal", f"≥ {goal}", said, ratio is not None and ratio >= goal))
    if ahead:
        text = "the better of ours is ahead of all others at the end of the budget"
        ours = f"{sum(ahead)} of {len(ahead)}"
        found.append(claim(text, "our goal: every row", f"all {len(ahead)} rows that were run", ours, all(ahead)))
    return found

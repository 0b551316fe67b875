"""What `wide` measured, read as curves: what each method has at which time, and how much earlier one is there."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["BOTH", "GAUSSIAN", "OURS", "Kind", "Methods", "best_of_ours", "by_case", "earlier", "end", "kept"]

GAUSSIAN = "gaussian"
BOTH = "both"
"""The problem whose optimum is known, and the directions of a training that is not forward only."""

OURS = ("P4Inv", "InvertibleLinear")
"""How the names of our methods begin."""

Kind = tuple[str, str, int]
"""Problem, directions and couplings."""

Methods = dict[str, list[dict[str, Any]]]
"""The rows of all seeds by the method."""


def by_case(results: dict[str, Any]) -> dict[tuple[str, str, int, int], Methods]:
    """The rows of the results, by kind and n."""
    found: dict[tuple[str, str, int, int], Methods] = {}
    for row in results["rows"]:
        case = row["problem"], row["directions"], row["couplings"], row["n"]
        found.setdefault(case, {}).setdefault(row["method"], []).append(row)
    return found


def kept(row: dict[str, Any]) -> np.ndarray:
    """The test NLL a dimension, above the least possible if that is known, of what one would keep at each time.

    That is the flow with the lowest validation NLL up to then.
    """
    return np.array(row["test"])[_best(row)] - row.get("optimum", 0.0)


def end(rows: list[dict[str, Any]]) -> float:
    """The mean over seeds of what is kept at the end of the budget."""
    return float(np.mean([kept(row)[-1] for row in rows]))


def best_of_ours(methods: Methods) -> str | None:
    """Our method with the lowest validation NLL, for which no test row is looked at; None if none of ours was run."""
    ours = [method for method in methods if method.startswith(OURS)]
    return min(ours, key=lambda method: np.mean([min(row["validation"]) for row in methods[method]]), default=None)


def earlier(ours: list[dict[str, Any]], other: list[dict[str, Any]]) -> float | None:
    """How many times earlier ours is below what the other has at the end of its budget, and stays there.

    Their time is that at which they came by it, or the whole budget where they only got worse than at the start. None
    where ours is not below it within the budget, with every seed.
    """
    goal = end(other)
    ours_s = [_seconds_below(row, goal) for row in ours]
    if None in ours_s:
        return None
    other_s = [row["seconds"][_best(row)[-1] or -1] for row in other]
    return float(np.mean(other_s) / np.mean(ours_s))


def _best(row: dict[str, Any]) -> list[int]:
    """At each time, the place of the lowest validation NLL up to then."""
    values = row["validation"]
    return [min(range(i + 1), key=values.__getitem__) for i in range(len(values))]


def _seconds_below(row: dict[str, Any], goal: float) -> float | None:
    above = np.flatnonzero(kept(row) >= goal)
    first = max(1, above[-1] + 1 if len(above) else 1)  # not at the start, where nothing has been learned
    return row["seconds"][first] if first < len(row["seconds"]) else None

"""The table of `wide`: what each method has at the end of its budget of time."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.speed.wide_curves import best_of_ours, by_case, earlier, end

__all__ = ["RIVALS", "table", "times"]

RIVALS = ("LU", "dense")


def table(results: dict[str, Any]) -> str:
    """The test NLL a dimension, ± its deviation over seeds, and after a slash the steps of the training.

    On the Gaussian it is the NLL above the least possible. The last column is how many times earlier the better of ours
    has what LU and dense matrices have at the end.
    """
    methods = list(dict.fromkeys(row["method"] for row in results["rows"]))
    header = ["data", "trained", "couplings", "n", "seconds", *methods, "earlier than LU, dense"]
    lines = [header, ["---", "---", *["---:"] * (len(header) - 2)]]
    for (problem, directions, couplings, n), found in by_case(results).items():
        cells = {method: _cell(rows) for method, rows in found.items()}
        best = min(found, key=lambda method: end(found[method]))
        cells[best] = f"**{cells[best]}**"
        seconds = next(iter(found.values()))[0]["budget"]
        which = [problem, directions, str(couplings), str(n), f"{seconds:.3g}"]
        ours = best_of_ours(found)
        ratios = [times(earlier(found[ours], found[rival])) if ours and rival in found else "–" for rival in RIVALS]
        lines.append([*which, *(cells.get(method, "–") for method in methods), ", ".join(ratios)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def times(ratio: float | None) -> str:
    """A ratio of times as text; "not" where there is none, since one is not there within the budget."""
    return "not" if ratio is None else f"{ratio:.1f}"


def _cell(rows: list[dict[str, Any]]) -> str:
    steps = np.mean([row["steps"][-1] for row in rows])
    deviation = f" ± {np.std([end([row]) for row in rows]):.3f}" if len(rows) > 1 else ""
    return f"{end(rows):.3f}{deviation} / {steps:.0f}"

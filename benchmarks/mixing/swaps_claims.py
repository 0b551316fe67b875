"""What is claimed of learned swaps, judged by rules over all rows of `swaps`."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.harness.claims import claim
from benchmarks.mixing.swaps_table import by_row

__all__ = ["claims"]

_PLANNED = 16  # rows that the goals speak of; where fewer are run, the same share of them is needed


def claims(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows for :func:`benchmarks.harness.claims.table`; a mean over seeds of the test NLL is what is compared."""
    rows = results["rows"]
    found = by_row(rows)
    count = len(found)
    mean = {key: {mix: values.mean() for mix, values in mixes.items()} for key, mixes in found.items()}
    ahead = sum(row["P4Inv"] < row["LU"] for row in mean.values())
    near = sum(row["P4Inv"] <= row["dense"] + 1 for row in mean.values())
    # Within 0.3 nats, or within the spread over seeds of the dense matrix where that is larger.
    as_dense = sum(
        row["InvertibleLinear"] <= row["dense"] + max(0.3, found[key]["dense"].std()) for key, row in mean.items()
    )
    beyond_fixed = sum(
        min(row["P4Inv"], row["InvertibleLinear"]) < min(row["reversed"], row["random"]) for row in mean.values()
    )
    skipped = sum(row["counters"].get("skipped", 0) for row in rows)
    named = sum(n for row in rows for name, n in row["counters"].items() if name.startswith("skipped_"))
    merges = sum(n for row in rows for name, n in row["counters"].items() if name in ("merged", "forced", "partial"))

    def of_rows(text: str, goal: int, value: int) -> dict[str, Any]:
        said = "our goal: every row" if goal == _PLANNED else f"our goal: {goal} of {_PLANNED} rows"
        needed = math.ceil(count * goal / _PLANNED)
        rule = f"at least {needed} of the {count} rows that were run"
        return claim(text, said, rule, f"{value} of {count}", value >= needed)

    return [
        of_rows("P4Inv with its defaults is ahead of LU", 10, ahead),
        of_rows("P4Inv with its defaults is within 1 nat of dense", 12, near),
        of_rows("InvertibleLinear is within 0.3 nats, or the spread, of dense", _PLANNED, as_dense),
        of_rows("the better of ours is ahead of both fixed permutations", _PLANNED, beyond_fixed),
        claim(
            "every skipped merge has a reason that is named",
            "our goal",
            "as many reasons as skips",
            f"{named} of {skipped} skips; {merges} merges",
            named == skipped,
        ),
    ]

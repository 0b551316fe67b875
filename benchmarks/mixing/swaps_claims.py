"""What is claimed of learned swaps, judged by rules over all rows of `swaps`."""

from __future__ import annotations

from typing import Any

from benchmarks.mixing.swaps_table import by_row

__all__ = ["claims"]


def claims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows for :func:`benchmarks.harness.claims.table`; a mean over seeds of the test NLL is what is compared."""
    found = by_row([row for row in rows if "splines" not in row])
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
    splines = by_row([row for row in rows if "splines" in row])
    level = sum(
        min(mixes["P4Inv"].mean(), mixes["InvertibleLinear"].mean()) <= mixes["LU"].mean() for mixes in splines.values()
    )
    skipped = sum(row["counters"].get("skipped", 0) for row in rows)
    named = sum(n for row in rows for name, n in row["counters"].items() if name.startswith("skipped_"))
    merges = sum(n for row in rows for name, n in row["counters"].items() if name in ("merged", "forced", "partial"))

    def claim(text: str, rule: str, value: int, needed: int) -> dict[str, Any]:
        return {"claim": text, "paper": rule, "ours": f"{value} of {count}", "holds": bool(value >= needed)}

    return [
        claim(
            "P4Inv with its defaults is ahead of LU",
            "in 10 of 16 rows",
            ahead,
            round(count * 10 / 16),
        ),
        claim(
            "P4Inv with its defaults is within 1 nat of dense",
            "in 12 of 16 rows",
            near,
            round(count * 12 / 16),
        ),
        claim("InvertibleLinear is within 0.3 nats, or the spread, of dense", "in every row", as_dense, count),
        claim("the better of ours is ahead of both fixed permutations", "in every row", beyond_fixed, count),
        {
            "claim": "between spline couplings the better of ours is at least level with LU",
            "paper": "in every row",
            "ours": f"{level} of {len(splines)}",
            "holds": level == len(splines),
        },
        {
            "claim": "every skipped merge has a reason that is named",
            "paper": "all",
            "ours": f"{named} of {skipped} skips; {merges} merges",
            "holds": bool(named == skipped),
        },
    ]

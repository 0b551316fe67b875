"""The table of `swaps`: test NLL of every mix, for each learning problem and number of couplings."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["by_row", "summary", "table"]

_SHORT = ("reversed", "random", "LU", "dense", "P4Inv", "InvertibleLinear")


def table(results: dict[str, Any]) -> str:
    """The test NLL at equal steps, mean ± deviation over seeds; after the slash at equal time."""
    rows = results["rows"]
    mixes = list(dict.fromkeys(row["mix"] for row in rows))
    lines = [f"| data | couplings | seeds | {' | '.join(mixes)} |", "|---|---:|---:|" + "---:|" * len(mixes)]
    for (data, couplings), found in by_row(rows).items():
        cells = {}
        for mix, values in found.items():
            cells[mix] = f"{values.mean():.2f}" + (f" ± {values.std():.2f}" if len(values) > 1 else "")
            timed = [
                row["equal_time"]["test"]
                for row in rows
                if (row["data"], row["couplings"], row["mix"]) == (data, couplings, mix) and "equal_time" in row
            ]
            if timed:
                cells[mix] += f" / {np.mean(timed):.2f}"
        best = min(found, key=lambda mix: found[mix].mean())
        cells[best] = f"**{cells[best]}**"
        seeds = max(map(len, found.values()))
        lines.append(f"| {data} | {couplings} | {seeds} | {' | '.join(cells.get(mix, '–') for mix in mixes)} |")
    return "\n".join(lines)


def summary(results: dict[str, Any]) -> str:
    """The mean test NLL with the fewest and with the most couplings, of the mixes of :data:`_SHORT`."""
    found = by_row(results["rows"])
    lines = [f"| data | couplings | {' | '.join(_SHORT)} |", "|---|---:|" + "---:|" * len(_SHORT)]
    for data in dict.fromkeys(data for data, _ in found):
        depths = [couplings for name, couplings in found if name == data]
        for couplings in dict.fromkeys((min(depths), max(depths))):
            means = {mix: found[data, couplings][mix].mean() for mix in _SHORT}
            best = min(means, key=means.get)
            cells = (f"**{mean:.2f}**" if mix == best else f"{mean:.2f}" for mix, mean in means.items())
            lines.append(f"| {data} | {couplings} | {' | '.join(cells)} |")
    return "\n".join(lines)


def by_row(rows: list[dict[str, Any]]) -> dict[tuple[str, int], dict[str, np.ndarray]]:
    """The test NLLs of all seeds, by (data, couplings) and mix."""
    found: dict[tuple[str, int], dict[str, list[float]]] = {}
    for row in rows:
        found.setdefault((row["data"], row["couplings"]), {}).setdefault(row["mix"], []).append(row["test"])
    return {key: {mix: np.array(values) for mix, values in mixes.items()} for key, mixes in found.items()}

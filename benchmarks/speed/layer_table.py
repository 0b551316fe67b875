"""What `layer` found: its claims, and its tables of times and memory."""

from __future__ import annotations

from typing import Any

from benchmarks.harness.claims import claim
from benchmarks.speed.layer_steps import METHODS, PLAIN

__all__ = ["claims", "summary", "table"]

_Row = dict[str, Any]


def claims(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Our own goals, at the widths that were measured; where there are several numbers of threads, with the most."""
    found = []
    rows = {(row["n"], row["both_directions"]): row for row in sorted(results["rows"], key=lambda row: row["threads"])}
    for n, goal in ((1024, 2.5), (4096, 3.0)):
        if (n, False) in rows:
            ms = rows[n, False]["ms"]
            ratio = ms["InvertibleLinear"] / ms[PLAIN]
            text = f"n = {n}: a step of InvertibleLinear in those of nn.Linear"
            found.append(claim(text, "our goal", f"≤ {goal}", f"{ratio:.2f}", ratio <= goal))
    for other, both, goal in (("dense", False, 8), ("dense", True, 12), ("nflows LULinear", True, 3)):
        if (4096, both) in rows:
            ms = rows[4096, both]["ms"]
            ratio = ms[other] / ms["InvertibleLinear"]
            way = "both directions" if both else "forward"
            text = f"n = 4096, {way}: a step of {other} in those of InvertibleLinear"
            found.append(claim(text, "our goal", f"≥ {goal}", f"{ratio:.2f}", ratio >= goal))
    if "kept_mib" in rows.get((4096, False), {}):
        kept = rows[4096, False]["kept_mib"]["P4Inv, rank 1"] * 2**20 / 4096**2
        text = "n = 4096: bytes that P4Inv of rank 1 holds between steps, for each entry of A"
        found.append(claim(text, "our goal", "≤ 16, rounded", f"{kept:.1f}", round(kept) <= 16))
    share = results["following"]["share"]
    text = f"{results['following']['couplings']} couplings of 60: share of following in a training step"
    found.append(claim(text, "our goal", "≤ 0.25", f"{share:.2f}", share <= 0.25))
    return found


def table(results: dict[str, Any]) -> str:
    """Times, and the peaks of memory if they were measured, as Markdown tables."""
    tables = [summary(results)]
    if all("peak_mib" in row for row in results["rows"]):
        tables += ["Memory, at most during such a step:", _relative(results["rows"], "peak_mib", "MiB")]
    return "\n\n".join(tables)


def summary(results: dict[str, Any]) -> str:
    """The times alone."""
    return _relative(results["rows"], "ms", "ms")


def _relative(rows: list[_Row], key: str, unit: str) -> str:
    """Figures as multiples of those of nn.Linear, forward / both directions, as a Markdown table."""
    by: dict[tuple[int, int], dict[bool, _Row]] = {}
    for row in rows:
        by.setdefault((row["n"], row["threads"]), {})[row["both_directions"]] = row[key]
    lines = [f"| | {' | '.join(_titles(list(by)))} |", "|---|" + "---:|" * len(by)]
    lines.append(f"| {PLAIN} | {' | '.join(f'{found[False][PLAIN]:.3g} {unit}' for found in by.values())} |")
    for name in METHODS:
        if name != PLAIN and any(name in found[False] for found in by.values()):
            cells = (f"{_ratio(found[False], name)} / {_ratio(found[True], name)}" for found in by.values())
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _titles(columns: list[tuple[int, int]]) -> list[str]:
    widths = [n for n, _ in columns]
    one = len(set(widths)) == len(widths)
    return [f"n = {n}" if one else f"n = {n}, {k} {'thread' if k == 1 else 'threads'}" for n, k in columns]


def _ratio(found: dict[str, float], name: str) -> str:
    if name not in found:
        return "–"
    ratio = found[name] / found[PLAIN]
    return f"{ratio:.1f}" if ratio >= 0.1 else f"{ratio:.1g}"

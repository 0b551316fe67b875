"""The table of `ranks`, and its estimate for more ranks than were run."""

from __future__ import annotations

import math
import statistics
from typing import Any

__all__ = ["ring_seconds", "table"]

RANKS = (8, 64)
_KINDS = ("torchrun", "Lightning")
_BUCKET = 25 * 2**20  # bytes that DistributedDataParallel sends at a time
_TITLES = {
    "deep": "deep: n = {features}, {couplings} couplings, batch {batch}",
    "wide": "wide: n = {features}, {couplings} couplings, batch {batch}",
}


def ring_seconds(size: float, ranks: int, bandwidth: float, latency: float) -> float:
    """The time of a ring all-reduce of ``size`` bytes, of which DistributedDataParallel sends 25 MiB at a time.

    Each rank sends 2 (R - 1) messages in a row for every such bucket, and each message has 1 / R of the bucket in it:
    ``2 (R - 1) (size / R / bandwidth + buckets * latency)``.

    Args:
        size: bytes.
        ranks: R.
        bandwidth: bytes a second from one rank to the next, while all send at once.
        latency: seconds of an empty message.
    """
    buckets = max(1, math.ceil(size / _BUCKET))
    return 2 * (ranks - 1) * (size / ranks / bandwidth + buckets * latency)


def table(results: dict[str, Any]) -> str:
    """Steps a second, what is sent and whether ranks are equal, with the estimate, as a Markdown table."""
    bandwidth, latency = results["bandwidth_gbit"] * 1e9 / 8, results["latency_us"] / 1e6
    columns = ["flow", "swaps", "numbers that a swap sends", "MB a step", "one process"]
    columns += [f"two, {kind}" for kind in _KINDS] + ["ranks equal"] + [f"{ranks} ranks, estimated" for ranks in RANKS]
    lines = [f"| {' | '.join(columns)} |", "|---|---|---:|---:|---:|" + "---:|" * len(_KINDS) + "---|---:|---:|"]
    for row in results["rows"]:
        size = 4 * row["numbers"]
        alone = statistics.median(row["seconds"]["alone"])
        cells = [_TITLES[row["flow"]].format(**row), row["method"], f"{row['numbers_of_a_mix']:,}", f"{size / 1e6:.3g}"]
        cells.append(f"{1 / alone:.3g}")
        for kind in _KINDS:
            found = row["seconds"].get(kind)
            cells.append(_relative(statistics.median(found), alone) if found else "–")
        different = row["different_bytes"]
        cells.append("yes" if not any(different.values()) else f"**no**, {max(different.values()):,} bytes")
        for ranks in RANKS:
            cells.append(_relative(alone + ring_seconds(size, ranks, bandwidth, latency), alone))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _relative(seconds: float, alone: float) -> str:
    """Steps a second, and the share of those of one process that they are."""
    return f"{1 / seconds:.3g} ({100 * alone / seconds:.0f} %)"

"""What the paper says beside what came out, as a Markdown table."""

from __future__ import annotations

from typing import Any

__all__ = ["table"]


def table(results: dict[str, Any]) -> str:
    """A row for each of ``results["claims"]``, with its keys claim, paper, ours, holds."""
    lines = ["| claim | paper | ours | holds |", "|---|---|---|---|"]
    for row in results["claims"]:
        cells = (str(row[key]).replace("|", "\\|") for key in ("claim", "paper", "ours"))
        lines.append(f"| {' | '.join(cells)} | {'yes' if row['holds'] else '**no**'} |")
    return "\n".join(lines)

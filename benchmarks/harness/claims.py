"""Claims: what is said of a result beside what came out, each judged by a rule that stands beside it."""

from __future__ import annotations

from typing import Any

__all__ = ["claim", "table"]

_COLUMNS = {"claim": "claim", "paper": "paper, or goal", "rule": "rule", "ours": "ours"}


def claim(text: str, said: str, rule: str, ours: str, holds: bool) -> dict[str, Any]:
    """A row of the table.

    Args:
        text: what is claimed.
        said: the words of the paper, or our own goal.
        rule: by which ``holds`` is decided, in a few words.
        ours: what came out.
        holds: whether it fulfils the rule.
    """
    return {"claim": text, "paper": said, "rule": rule, "ours": ours, "holds": bool(holds)}


def table(results: dict[str, Any]) -> str:
    """``results["claims"]`` as a Markdown table, a row for each of them as :func:`claim` makes it."""
    lines = [f"| {' | '.join(_COLUMNS.values())} | holds |", "|---|---|---|---|---|"]
    for row in results["claims"]:
        cells = (str(row[key]).replace("|", "\\|") for key in _COLUMNS)
        lines.append(f"| {' | '.join(cells)} | {'yes' if row['holds'] else '**no**'} |")
    return "\n".join(lines)

"""Figures of several origins side by side, as a Markdown table that is aligned for the terminal too."""

from __future__ import annotations

from typing import Any

__all__ = ["comparison"]


def comparison(columns: dict[str, dict[str, Any]], lines: list[tuple[str, str, str]]) -> str:
    """A Markdown table with a column for each origin, and lines (label, key, format) where any of them has the key."""
    cells = [["", *columns]]
    for label, key, form in lines:
        values = [column.get(key) for column in columns.values()]
        if all(value is None for value in values):
            continue
        cells.append([label, *("" if value is None else form.format(value) for value in values)])
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns) + 1)]
    rendered = []
    for first, *rest in cells:
        padded = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(rest, widths[1:], strict=True))]
        rendered.append("| " + " | ".join(padded) + " |")
    rule = "|" + "-" * (widths[0] + 2) + "|" + "".join("-" * (w + 1) + ":|" for w in widths[1:])
    return "\n".join([rendered[0], rule, *rendered[1:]])

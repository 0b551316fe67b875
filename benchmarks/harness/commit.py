"""Which code a result was made with."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["commit"]

_ROOT = Path(__file__).parents[2]


@cache
def commit() -> dict[str, Any]:
    """The hash of the commit, and whether files differed from it, when this was first called in the process.

    Results do not count as a difference, or every command after the first would be said to run on changed code.
    Outside a checkout of this repository the hash is "unknown", and ``dirty`` is None.
    """
    try:
        if Path(_git("rev-parse", "--show-toplevel")).resolve() != _ROOT.resolve():
            raise ValueError("this folder lies in a checkout of something else")
        changes = _git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
        return {"commit": _git("rev-parse", "HEAD"), "dirty": bool(changes)}
    except (OSError, ValueError, subprocess.SubprocessError):
        return {"commit": "unknown", "dirty": None}


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(_ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

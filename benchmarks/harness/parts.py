"""Results of the parts of a long run, kept in files, so that an interrupted run goes on with the first missing one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import p4flows

__all__ = ["part"]


def part(folder: Path, settings: dict[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """``compute()``, or what it returned earlier for equal settings; JSON throughout."""
    key = json.dumps({**settings, "p4flows": p4flows.__version__}, sort_keys=True, default=str)
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        result = compute()
        unfinished = path.with_suffix(".part")
        unfinished.write_text(json.dumps({"settings": json.loads(key), "result": result}))
        unfinished.replace(path)
    return json.loads(path.read_text())["result"]

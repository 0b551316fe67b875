"""Results of the parts of a long run, kept in files, so that an interrupted run goes on with the first missing one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import p4flows

__all__ = ["fingerprint", "part"]


def part(folder: Path, settings: dict[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """``compute()``, or what it returned earlier for equal settings; JSON throughout."""
    path = folder / f"{fingerprint(settings)}.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        result = compute()
        unfinished = path.with_suffix(".part")
        unfinished.write_text(json.dumps({"settings": json.loads(_key(settings)), "result": result}))
        unfinished.replace(path)
    return json.loads(path.read_text())["result"]


def fingerprint(settings: dict[str, Any]) -> str:
    """A short name for settings and the version of p4flows, for files that belong to these only."""
    return hashlib.sha256(_key(settings).encode()).hexdigest()[:16]


def _key(settings: dict[str, Any]) -> str:
    return json.dumps({**settings, "p4flows": p4flows.__version__}, sort_keys=True, default=str)

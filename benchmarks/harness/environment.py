"""Where and with what a result was measured."""

from __future__ import annotations

import json
import os
import platform
import re
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.commit import commit

__all__ = ["environment", "save"]


def environment() -> dict[str, Any]:
    """Machine, versions and commit."""
    versions = {}
    for package in ("p4flows", "torch", "numpy", "nflows", "openmm"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        **commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "system": platform.system()},
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def save(name: str, results: dict[str, Any], folder: Path) -> Path:
    """Write results with the environment to ``folder/name.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    text = json.dumps({"environment": environment(), **results}, indent=2)
    # Lists of numbers on one line each.
    text = re.sub(r"\[\s+([^\[\]{}]+?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    path.write_text(text + "\n")
    return path


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()

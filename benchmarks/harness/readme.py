"""Copies result tables into README.md, between the markers ``<!-- NAME -->`` and ``<!-- /NAME -->``."""

from __future__ import annotations

import json
import re
import sys
from argparse import ArgumentParser, Namespace
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.harness.output import RESULTS

__all__ = ["FILES", "add_arguments", "render", "run"]

FILES = ()

README = Path(__file__).parents[2] / "README.md"

# Modules whose functions `table` make them, of which that of claims has what the paper says beside what came out.
TABLES: dict[str, tuple[str, ...]] = {
    "demo": ("paper.demo",),
    "cost": ("speed.cost",),
    "merge": ("speed.merge",),
    "step": ("speed.step",),
    "drift": ("numerics.drift",),
    "mnist": ("harness.claims", "paper.mnist"),
    "swaps": ("harness.claims", "mixing.swaps"),
    "alanine_dipeptide": ("paper.alanine_dipeptide",),
    "bridge": ("speed.bridge",),
    "linear": ("harness.claims",),
    "density2d": ("harness.claims", "paper.density2d"),
}


def add_arguments(parser: ArgumentParser) -> None:
    pass


def run(args: Namespace) -> None:
    README.write_text(render(README.read_text()))
    print(README)


def render(text: str) -> str:
    """The README with every table made anew from its JSON; one whose command lacks a package here stays as it is."""
    for name, modules in TABLES.items():
        results = json.loads((RESULTS / f"{name}.json").read_text())
        try:
            tables = [import_module(f"benchmarks.{module}").table(results) for module in modules]
        except ModuleNotFoundError as error:
            print(f"{name}: left as it is, since {error.name} is not installed", file=sys.stderr)
            continue
        content = "\n\n".join([*tables, provenance(results["environment"])])
        block = f"<!-- {name} -->\n{content}\n<!-- /{name} -->"
        text, count = re.subn(
            f"<!-- {name} -->.*?<!-- /{name} -->", lambda _, block=block: block, text, flags=re.DOTALL
        )
        if count != 1:
            raise ValueError(f"README.md: expected one pair of markers for {name!r}, found {count}")
    return text


def provenance(environment: dict[str, Any]) -> str:
    """Where and with what a result was measured, in one line; results of old do not know their commit."""
    machine, versions = environment["machine"], environment["versions"]
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    parts = [f"{machine['cpu']}, {machine['cores']} cores", packages, environment["date"]]
    if environment.get("commit", "unknown") != "unknown":
        changed = " with changes" if environment["dirty"] else ""
        parts.insert(2, f"commit {environment['commit'][:10]}{changed}")
    return f"*{'; '.join(parts)}.*"

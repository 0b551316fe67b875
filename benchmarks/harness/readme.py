"""Copies result tables into README.md, between the markers ``<!-- NAME -->`` and ``<!-- /NAME -->``."""

from __future__ import annotations

import json
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness import claims
from benchmarks.harness.environment import RESULTS
from benchmarks.mixing import perturbation, swaps
from benchmarks.numerics import drift
from benchmarks.paper import alanine_dipeptide, demo, density2d, mnist
from benchmarks.speed import bridge, cost, merge, step

__all__ = ["add_arguments", "render", "run"]

README = Path(__file__).parents[2] / "README.md"


def _with_claims(table: Callable[[dict[str, Any]], str]) -> Callable[[dict[str, Any]], str]:
    return lambda results: f"{claims.table(results)}\n\n{table(results)}"


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "demo": demo.table,
    "cost": cost.table,
    "merge": merge.table,
    "step": step.table,
    "drift": drift.table,
    "mnist": _with_claims(mnist.table),
    "perturbation": perturbation.table,
    "swaps": swaps.table,
    "alanine_dipeptide": _with_claims(alanine_dipeptide.table),
    "bridge": bridge.table,
    "linear": claims.table,
    "density2d": _with_claims(density2d.table),
}


def add_arguments(parser: ArgumentParser) -> None:
    pass


def run(args: Namespace) -> None:
    README.write_text(render(README.read_text()))
    print(README)


def render(text: str) -> str:
    """The README with every table made anew from its JSON."""
    for name, table in TABLES.items():
        results = json.loads((RESULTS / f"{name}.json").read_text())
        block = f"<!-- {name} -->\n{table(results)}\n\n{_provenance(results['environment'])}\n<!-- /{name} -->"
        text, count = re.subn(
            f"<!-- {name} -->.*?<!-- /{name} -->", lambda _, block=block: block, text, flags=re.DOTALL
        )
        if count != 1:
            raise ValueError(f"README.md: expected one pair of markers for {name!r}, found {count}")
    return text


def _provenance(environment: dict[str, Any]) -> str:
    machine, versions = environment["machine"], environment["versions"]
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"*{machine['cpu']}, {machine['cores']} cores; {packages}; {environment['date']}.*"

"""Copies result tables into README.md and docs/, between the markers ``<!-- NAME -->`` and ``<!-- /NAME -->``."""

from __future__ import annotations

import json
import re
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.harness.claims import table as claims_table
from benchmarks.harness.output import RESULTS

__all__ = ["FILES", "README", "add_arguments", "check", "documents", "render", "run"]

FILES = ()

README = Path(__file__).parents[2] / "README.md"

# The module that makes each: its ``claims``, judged anew from the results, and its ``table``; of "NAME summary", its
# ``summary``, a shorter table of the same results.
TABLES = {
    "demo": "paper.demo",
    "linear": "paper.linear",
    "density2d": "paper.density2d",
    "recipe": "molecules.recipe",
    "validation": "molecules.validation",
    "alanine_dipeptide": "paper.alanine_dipeptide",
    "mnist": "paper.mnist",
    "cost": "speed.cost",
    "layer": "speed.layer",
    "layer summary": "speed.layer",
    "merge": "speed.merge",
    "step": "speed.step",
    "wide": "speed.wide",
    "ranks": "speed.ranks",
    "bridge": "speed.bridge",
    "drift": "numerics.drift",
    "swaps": "mixing.swaps",
    "swaps summary": "mixing.swaps",
    "splines": "mixing.splines",
    "perturbation": "mixing.perturbation",
    "properties": "properties.properties",
}


def add_arguments(parser: ArgumentParser) -> None:
    pass


def run(args: Namespace) -> None:
    texts = documents()
    check(texts)
    for path, text in texts.items():
        rendered = render(text)
        if rendered != text:
            path.write_text(rendered)
            print(path)


def documents() -> dict[Path, str]:
    """README.md and the pages of docs/, without what the site's build leaves there."""
    pages = (README.parent / "docs").rglob("*.md")
    return {path: path.read_text() for path in (README, *sorted(p for p in pages if "_build" not in p.parts))}


def check(texts: Mapping[Path, str]) -> None:
    """ValueError unless each table has one place."""
    for name in TABLES:
        count = sum(len(_between(name).findall(text)) for text in texts.values())
        if count != 1:
            raise ValueError(f"README.md and docs/: expected one pair of markers for {name!r}, found {count}")


def render(text: str) -> str:
    """The text with every table in it made anew from its JSON.

    A table stays as it is where there is no JSON yet, or where its command lacks a package here.
    """
    for name in TABLES:
        place = _between(name)
        content = _content(name) if place.search(text) else None
        if content is not None:
            block = f"<!-- {name} -->\n{content}\n<!-- /{name} -->"
            text = place.sub(lambda _, block=block: block, text)
    return text


def _between(name: str) -> re.Pattern[str]:
    return re.compile(f"<!-- {name} -->.*?<!-- /{name} -->", re.DOTALL)


def _content(name: str) -> str | None:
    command, _, short = name.partition(" ")
    path = RESULTS / f"{command}.json"
    if not path.exists():
        print(f"{name}: left as it is, since there is no {path.name} yet", file=sys.stderr)
        return None
    try:
        module = import_module(f"benchmarks.{TABLES[name]}")
    except ModuleNotFoundError as error:
        print(f"{name}: left as it is, since {error.name} is not installed", file=sys.stderr)
        return None
    results = json.loads(path.read_text())
    tables = []
    if short:
        tables.append(module.summary(results))
    else:
        if hasattr(module, "claims"):
            tables.append(claims_table({"claims": module.claims(results)}))
        if hasattr(module, "table"):
            tables.append(module.table(results))
    return tables[0] if short else "\n\n".join([*tables, provenance(results["environment"])])


def provenance(environment: dict[str, Any]) -> str:
    """Where and with what a result was measured, in one line; results of old do not know their commit."""
    machine, versions = environment["machine"], environment["versions"]
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    parts = [f"{machine['cpu']}, {machine['cores']} cores", packages, environment["date"]]
    if environment.get("commit", "unknown") != "unknown":
        changed = " with changes" if environment["dirty"] else ""
        parts.insert(2, f"commit {environment['commit'][:10]}{changed}")
    return f"*{'; '.join(parts)}.*"

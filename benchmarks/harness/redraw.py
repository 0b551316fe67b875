"""``--redraw``: a picture drawn again from its JSON, without measuring anything."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness.output import file_name

__all__ = ["add_redraw"]


def add_redraw(
    parser: ArgumentParser, name: str, run: Callable[[Namespace], Any], draw: Callable[[dict[str, Any], Path], Path]
) -> None:
    """Add the option to the parser of a command that ``run`` runs, and whose picture ``draw(results, path)`` draws."""

    def either(args: Namespace) -> Any:
        if not args.redraw:
            return run(args)
        stem = file_name(args)
        results = json.loads((args.out / f"{stem}.json").read_text())
        print(draw(results, args.out / f"{stem}.png"))
        return None

    text = f"measure nothing, but draw {name}.png again from the {name}.json in the folder of --out"
    parser.add_argument("--redraw", action="store_true", help=text)
    parser.set_defaults(function=either)

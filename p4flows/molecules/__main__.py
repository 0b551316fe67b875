"""``python -m p4flows.molecules cache`` lists the cache of simulations, and clears it."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence

from p4flows.molecules.cache import root
from p4flows.molecules.contents import cached_simulations, clear_cache


def main(arguments: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m p4flows.molecules", description="What simulations leave behind.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    text = "list the cached simulations, or remove some or all"
    command = commands.add_parser("cache", help=text, description=text)
    command.add_argument("--folder", help="of the cache (default: P4FLOWS_CACHE, or ~/.cache/p4flows)")
    command.add_argument("--clear", nargs="*", metavar="KEY", help="remove these, or all without a key")
    args = parser.parse_args(arguments)
    try:
        _list(args.folder) if args.clear is None else _clear(args.folder, args.clear)
    except (OSError, ValueError) as error:
        sys.exit(str(error))


def _list(folder: str | None) -> None:
    found = cached_simulations(folder)
    for simulation in found:
        print(simulation)
    size = sum(simulation.size for simulation in found) / 1e6
    print(f"{len(found)} simulation{'s' * (len(found) != 1)}, {size:.1f} MB in {root(folder) / 'md'}")


def _clear(folder: str | None, keys: list[str]) -> None:
    removed, left = clear_cache(folder, keys or None)
    print(f"removed {len(removed)} simulation{'s' * (len(removed) != 1)}, {sum(s.size for s in removed) / 1e6:.1f} MB")
    for simulation in left:
        print(f"left, since it is running: {simulation}")


if __name__ == "__main__":
    main()

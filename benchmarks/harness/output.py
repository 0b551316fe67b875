"""Where a command writes: settled and tried before anything is measured."""

from __future__ import annotations

import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

__all__ = ["RESULTS", "SCRATCH", "add_output", "file_name", "settle_output"]

RESULTS = Path(__file__).parents[1] / "results"
SCRATCH = Path("out")


def add_output(parser: ArgumentParser, name: str, files: Sequence[str], kept: str | None, committed: bool) -> None:
    """Add ``--out`` for the folder of ``files``, and an option for that of an unfinished run.

    Args:
        parser: that of the command, with all its other options.
        name: of the command.
        files: that it writes; the results are committed if ``committed`` says so, but never those of ``--quick``.
        kept: the option that names the folder from which an interrupted run goes on, None if there is no such thing.
    """
    quick = parser.get_default("quick") is not None
    if files:
        usual = f"{RESULTS.parent.name}/{RESULTS.name}" if committed else str(SCRATCH)
        default = f"{usual}; with --quick {SCRATCH}" if quick and committed else usual
        parser.add_argument("--out", type=Path, metavar="FOLDER", help=f"of {', '.join(files)} (default: {default})")
    if kept:
        default = f"{SCRATCH / name}" + (f"; with --quick {SCRATCH / 'quick' / name}" if quick else "")
        text = f"from which an interrupted run goes on (default: {default})"
        parser.set_defaults(kept_option=kept)
        parser.add_argument(kept, dest="kept", type=Path, metavar="FOLDER", help=text)
    parser.set_defaults(name=name, files=files, committed=committed)


def settle_output(args: Namespace) -> None:
    """Fill in the folders that were not named, and see to it that they can be written to.

    Raises:
        ValueError: if they cannot.
    """
    quick = getattr(args, "quick", False)
    if "out" in args:
        args.out = args.out or (RESULTS if args.committed and not quick else SCRATCH)
        _try("--out", args.out, args.files)
    if "kept" in args:
        args.kept = args.kept or (SCRATCH / "quick" if quick else SCRATCH) / args.name
        _try(args.kept_option, args.kept, ())


def file_name(args: Namespace) -> str:
    """That of a command's results, without ``.json``: those of a GPU lie beside those of the processor."""
    device = getattr(args, "device", None)
    return args.name if device is None or device.type == "cpu" else f"{args.name}_{device.type}"


def _try(option: str, folder: Path, files: Sequence[str]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        for path in (folder / name for name in files):
            if path.exists():
                path.open("ab").close()
    except OSError as error:
        raise ValueError(f"{option}: cannot write to {error.filename or folder}: {error.strerror}") from None

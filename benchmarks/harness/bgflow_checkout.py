"""bgflow is on no package index: where it is not installed, a checkout of its repository takes its place."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
import warnings
from pathlib import Path

__all__ = ["find_bgflow"]


def find_bgflow() -> bool:
    """Make bgflow importable, here and in processes started from here; False if there is none.

    The checkout is where the environment variable P4FLOWS_BGFLOW says, by default ``~/.cache/p4flows/bgflow``.
    """
    if importlib.util.find_spec("bgflow") is None:
        checkout = Path(os.environ.get("P4FLOWS_BGFLOW", Path.home() / ".cache" / "p4flows" / "bgflow"))
        if not (checkout / "bgflow" / "__init__.py").exists():
            return False
        sys.path.append(str(checkout))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(checkout)]))
    # Its own warnings, on import, are not ours to mend. The plug-in supplies the name that it misses in NumPy 2.
    with warnings.catch_warnings(), contextlib.suppress(ImportError):
        warnings.simplefilter("ignore")
        importlib.import_module("p4flows.bgflow")
        return True
    return False

import contextlib
import importlib.util
import os
import sys
import warnings
from pathlib import Path

import pytest
import torch

# The tests run in several processes; threads of small operations would fight over the cores.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _find_bgflow():
    """bgflow is on no package index: where it is not installed, take the checkout that P4FLOWS_BGFLOW names."""
    if importlib.util.find_spec("bgflow") is None:
        checkout = Path(os.environ.get("P4FLOWS_BGFLOW", Path.home() / ".cache" / "p4flows" / "bgflow"))
        if (checkout / "bgflow" / "__init__.py").exists():
            # The environment too, for the tests that start an interpreter of their own.
            sys.path.append(str(checkout))
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(checkout)]))
    # Its own warnings, on import, are not ours to mend.
    with warnings.catch_warnings(), contextlib.suppress(ImportError):
        warnings.simplefilter("ignore")
        importlib.import_module("bgflow")


_find_bgflow()

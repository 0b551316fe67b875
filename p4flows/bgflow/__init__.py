"""Layers of p4flows as bgflow flows, learned swaps, surgery on existing flows, and bridges to bgflow.

bgflow is on no package index: install it from its repository, ``pip install git+https://github.com/noegroup/bgflow``.
It reads the name ``numpy.infty``, which NumPy 2 no longer has, both on import and later. Where the name is missing,
importing :mod:`p4flows.bgflow` defines it as ``numpy.inf`` for the whole process, before it imports bgflow: import it
before bgflow itself.
"""

import warnings as _warnings

import numpy as _numpy

if "infty" not in vars(_numpy):
    vars(_numpy)["infty"] = _numpy.inf

try:
    with _warnings.catch_warnings():
        _warnings.simplefilter("ignore")  # deprecations of bgflow's own, which its users cannot mend
        import bgflow as _  # noqa: F401
except ImportError as error:
    raise ImportError(
        "p4flows.bgflow needs bgflow: pip install 'p4flows[bgflow]' for what it imports, and bgflow itself from its "
        "repository: pip install git+https://github.com/noegroup/bgflow"
    ) from error

from p4flows.bgflow.energy import as_bgflow_energy
from p4flows.bgflow.flows import (
    BentIdentityFlow,
    InvertibleLinearFlow,
    InvertibleSwap,
    P4InvFlow,
    P4InvSwap,
    P4OrthogonalFlow,
    P4OrthogonalSwap,
)
from p4flows.bgflow.pppp import from_pppp, to_pppp
from p4flows.bgflow.surgery import replace_swaps

__all__ = [
    "BentIdentityFlow",
    "InvertibleLinearFlow",
    "InvertibleSwap",
    "P4InvFlow",
    "P4InvSwap",
    "P4OrthogonalFlow",
    "P4OrthogonalSwap",
    "as_bgflow_energy",
    "from_pppp",
    "replace_swaps",
    "to_pppp",
]

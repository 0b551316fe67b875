"""Layers of p4flows as nflows transforms, and surgery on existing nflows flows.

The flows may be those of nflows, or of a library that carries a copy of its classes, as glasflow does, and nessai
through it.
"""

from p4flows.installing import missing

try:
    import nflows as _  # noqa: F401
except ImportError as error:
    raise missing("p4flows.nflows", "nflows", "nflows") from error

from p4flows.nflows.layers import BentIdentity, InvertibleLinear, P4InvLinear, P4OrthogonalLinear
from p4flows.nflows.surgery import replace_permutations

__all__ = ["BentIdentity", "InvertibleLinear", "P4InvLinear", "P4OrthogonalLinear", "replace_permutations"]

"""P4Inv and the Bent identity as bgflow flows, learned swaps, surgery on existing flows, and bridges to bgflow."""

try:
    import bgflow as _  # noqa: F401
except ImportError as error:
    raise ImportError("p4flows.bgflow needs bgflow: pip install 'p4flows[bgflow]'") from error
except AttributeError as error:
    raise ImportError("bgflow does not run with NumPy 2: pip install 'numpy<2'") from error

from p4flows.bgflow.energy import as_bgflow_energy
from p4flows.bgflow.flows import BentIdentityFlow, P4InvFlow, P4InvSwap
from p4flows.bgflow.pppp import from_pppp, to_pppp
from p4flows.bgflow.surgery import replace_swaps

__all__ = [
    "BentIdentityFlow",
    "P4InvFlow",
    "P4InvSwap",
    "as_bgflow_energy",
    "from_pppp",
    "replace_swaps",
    "to_pppp",
]

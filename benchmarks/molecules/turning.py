"""Which dihedrals of a molecule turn or hop, and which only vibrate."""

from __future__ import annotations

from torch import Tensor

from p4flows.molecules import MixedCoordinates

__all__ = ["turning"]

_STIFF = 15.0  # a dihedral whose circle is this many standard deviations long does not turn


def turning(coordinates: MixedCoordinates) -> Tensor:
    """The torsions that turn or hop, as positions in ``coordinates.torsions``."""
    torsions = coordinates.torsions
    return (torsions.high - torsions.low < _STIFF).nonzero().flatten()

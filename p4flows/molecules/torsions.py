"""Which coordinates are dihedrals, and where they come round again."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Torsions"]


@dataclass(frozen=True)
class Torsions:
    """The periodic ones among mixed coordinates z: what circular splines need to know of them.

    A dihedral comes round after 2π, and in units of z after ``high - low``. Structures at ``low`` and ``high`` are the
    same, and :meth:`MixedCoordinates.in_range` is true from ``low`` to just below ``high``. A flow that keeps these
    coordinates on the circle ``[low, high)``, for example by circular rational-quadratic splines (Rezende et al.
    2020), has no samples out of range by them, and its density is continuous where a cut one has two tails. Proper
    dihedrals turn freely or hop; improper ones hardly vary, and their ``high - low`` is large.

    Attributes:
        indices: (k,) positions in z, the last k.
        low, high: (k,) the range of each, in the type and on the device of the coordinates.
        atoms: (k, 4) the atoms of each dihedral, which are the rows of the z-matrix.
    """

    indices: Tensor
    low: Tensor
    high: Tensor
    atoms: Tensor

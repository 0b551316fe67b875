"""The handedness of a molecule, which a generator may lose: dynamics never turns an L-amino acid into a D one."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from openmm import app
from torch import Tensor

from p4flows.molecules.bond_graph import BondGraph, atom_name
from p4flows.molecules.units import positions_tensor

__all__ = ["Chirality", "stereocentres"]

_FLAT = 0.1  # of the handedness that edges of the same lengths could have


def stereocentres(graph: BondGraph, kinds: Sequence[object]) -> np.ndarray:
    """Atoms with four constitutionally different neighbours: rows (k, 5), the atom and its neighbours.

    ``kinds`` are the elements of the atoms. Centres that differ by the handedness of other centres only, as those of
    meso compounds may, axial and planar chirality, double bonds, and sulphur and phosphorus with three neighbours are
    not among them.
    """
    classes = graph.classes(kinds)
    rows = [
        (atom, *around)
        for atom, around in enumerate(graph.neighbours)
        if len(around) == 4 and len({classes[i] for i in around}) == 4
    ]
    return np.array(rows, dtype=np.int64).reshape(-1, 5)


class Chirality:
    """The stereocentres of a molecule, and their handedness in one structure of it.

    A flow knows nothing of handedness. Where it generates a structure with a stereocentre turned over, that is another
    molecule, whose energy may be just as low. Leave those out before weights are computed, with the structures that
    are out of range::

        x, volume = coordinates.inverse(z)
        usable = coordinates.in_range(z) & molecule.chirality.kept(x)
        weights = importance_weights(log_q, energy(x), volume, usable)

    Attributes:
        centres: (k, 5) atom indices: a stereocentre, and its four neighbours in ascending order.
        names: what the k centres are called.
        signs: (k,) 1.0 or -1.0: their handedness in the structure, as the sign of a triple product.

    Raises:
        ValueError: if a stereocentre is flat in the structure.
    """

    def __init__(self, topology: app.Topology, positions: np.ndarray) -> None:
        graph = BondGraph.from_topology(topology)
        elements = ["" if atom.element is None else atom.element.symbol for atom in topology.atoms()]
        self.n_atoms = len(elements)
        self.centres = stereocentres(graph, elements)
        self.names = [atom_name(topology, atom) for atom in self.centres[:, 0].tolist()]
        x = torch.as_tensor(np.asarray(positions, dtype=np.float64))
        self.signs = self._handedness(x).sign()
        flat = (self._flatness(x) < _FLAT).nonzero().flatten().tolist()
        if flat:
            raise ValueError(
                "positions: expected a structure in three dimensions, from which handedness can be taken, got flat "
                f"stereocentres: {', '.join(self.names[i] for i in flat)}"
            )

    def inverted(self, positions: Tensor | np.ndarray) -> Tensor:
        """Which centres have the other handedness; bool (..., k) for positions (..., n_atoms, 3) or (..., 3 n_atoms).

        A centre that is flat, or whose atoms have positions that are not finite, counts as inverted.
        """
        x = positions_tensor("positions", positions)
        if isinstance(x, Tensor) and x.shape[-1:] == (3 * self.n_atoms,):
            x = x.unflatten(-1, (self.n_atoms, 3))
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.shape[-2:] != (self.n_atoms, 3):
            given = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"positions: expected floating-point (..., {self.n_atoms}, 3), got {given}")
        return ~(self._handedness(x) * self.signs.to(x) > 0)

    def kept(self, positions: Tensor | np.ndarray) -> Tensor:
        """Which structures are of this molecule, with all its centres as they are; bool (...)."""
        return ~self.inverted(positions).any(-1)

    def check(self, positions: Tensor | np.ndarray) -> Tensor:
        """As :meth:`kept`, with a warning that says how many structures are another stereoisomer, and where."""
        kept = self.kept(positions)
        if not kept.all():
            warnings.warn(f"{self._report(positions)}; leave them out by `Chirality.kept`", stacklevel=2)
        return kept

    def require(self, name: str, positions: Tensor | np.ndarray) -> None:
        """ValueError unless all structures are of this molecule."""
        if not self.kept(positions).all():
            raise ValueError(f"{name}: expected structures of this molecule, got others: {self._report(positions)}")

    def _report(self, positions: Any) -> str:
        inverted = self.inverted(positions).reshape(-1, len(self.names))
        shares = [
            f"{share:.2%} at {name}"
            for share, name in zip(inverted.double().mean(0).tolist(), self.names, strict=True)
            if share
        ]
        count = int(inverted.any(-1).sum())
        return f"{count} of {len(inverted)} structures have the other handedness: {', '.join(shares)}"

    def _handedness(self, x: Tensor) -> Tensor:
        # By the first three neighbours against the fourth; the centre itself need not be on the usual side of them.
        u, v, w = self._edges(x)
        return (torch.linalg.cross(u, v) * w).sum(-1)

    def _flatness(self, x: Tensor) -> Tensor:
        """|handedness| over the product of the edges: 0 for four neighbours in a plane, 0.7 in a tetrahedron."""
        lengths = [torch.linalg.vector_norm(edge, dim=-1) for edge in self._edges(x)]
        return self._handedness(x).abs() / (lengths[0] * lengths[1] * lengths[2])

    def _edges(self, x: Tensor) -> list[Tensor]:
        """From the last neighbour of each centre to the other three, (..., k, 3)."""
        *others, last = (x[..., atoms, :] for atoms in torch.as_tensor(self.centres, device=x.device)[:, 1:].T)
        return [other - last for other in others]

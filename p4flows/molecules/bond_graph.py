"""The bonds of a molecule as a graph, from which its z-matrix and its stereocentres are read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from openmm import app

__all__ = ["BondGraph", "atom_name"]


class BondGraph:
    """An undirected graph of atoms 0 ... n_atoms - 1.

    Attributes:
        neighbours: for each atom, the atoms that it is bonded to, in ascending order.
    """

    def __init__(self, n_atoms: int, bonds: Iterable[tuple[int, int]]) -> None:
        found: list[set[int]] = [set() for _ in range(n_atoms)]
        for i, j in bonds:
            found[i].add(j)
            found[j].add(i)
        self.neighbours = [sorted(atoms) for atoms in found]

    @classmethod
    def from_topology(cls, topology: app.Topology) -> BondGraph:
        """The bonds that the topology lists."""
        return cls(topology.getNumAtoms(), ((bond[0].index, bond[1].index) for bond in topology.bonds()))

    @property
    def bonds(self) -> list[tuple[int, int]]:
        """All bonds (i, j) with i < j, in ascending order."""
        return [(i, j) for i, atoms in enumerate(self.neighbours) for j in atoms if i < j]

    def distances(self, atom: int) -> list[int]:
        """For each atom, the number of bonds on the shortest way from ``atom``; -1 if there is none."""
        result = [-1] * len(self.neighbours)
        result[atom] = 0
        front = [atom]
        while front:
            following = []
            for i in front:
                for j in self.neighbours[i]:
                    if result[j] < 0:
                        result[j] = result[i] + 1
                        following.append(j)
            front = following
        return result

    def components(self) -> list[list[int]]:
        """The molecules that the graph falls into: atoms in ascending order."""
        left, result = set(range(len(self.neighbours))), []
        while left:
            reached = [i for i, d in enumerate(self.distances(min(left))) if d >= 0]
            result.append(reached)
            left -= set(reached)
        return result

    def classes(self, kinds: Sequence[object]) -> list[int]:
        """A class for each atom, such that atoms which a symmetry of the graph exchanges have the same.

        Classes start from the ``kinds`` of the atoms, such as their elements, and are refined by those of the
        neighbours until nothing changes (Morgan 1965). Atoms of different classes are constitutionally different.
        """
        labels = _numbered(kinds)
        while True:
            refined = _numbered([(labels[i], *sorted(labels[j] for j in js)) for i, js in enumerate(self.neighbours)])
            if max(refined, default=0) == max(labels, default=0):
                return refined
            labels = refined


def _numbered(values: Sequence) -> list[int]:
    """Equal values get equal numbers, in the order in which they appear first."""
    numbers: dict = {}
    return [numbers.setdefault(value, len(numbers)) for value in values]


def atom_name(topology: app.Topology, index: int) -> str:
    """What a chemist calls an atom: its name, residue and index, for messages."""
    atom = next(atom for atom in topology.atoms() if atom.index == index)
    return f"{atom.name} of {atom.residue.name} {atom.residue.id} (atom {index})"

"""A z-matrix and a rigid block for any molecule, from its bond graph and one structure."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence

import numpy as np

from p4flows.molecules.bond_graph import BondGraph

__all__ = ["build_z_matrix"]

# Within this many degrees of 0 or 180, an angle's density sin θ and the dihedrals about it are next to undefined.
_NEAR_LINEAR = 15.0


def build_z_matrix(
    graph: BondGraph,
    masses: Sequence[float],
    positions: np.ndarray,
    constraints: Collection[tuple[int, int]] = (),
    backbone: Collection[int] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """The z-matrix (n_atoms - m, 4) and the rigid block (m,) of a connected molecule; the same for the same input.

    The block is a central atom with its neighbours: the atom from which the farthest one is the fewest bonds away,
    so that errors of one coordinate move few others. In a peptide it is an α-carbon. All other atoms are placed
    outwards along the bonds, ring atoms from the side that is nearer to the centre. The first branch at an atom is
    placed by a proper dihedral, and the others by improper ones with respect to the first, which hardly vary: so one
    coordinate turns a whole group. Along the backbone of a peptide the first branches are the backbone, and their
    dihedrals are φ, ψ and ω. Where the structure has a near-linear angle, other reference atoms are taken, if there
    are any.

    A constrained bond cannot be part of a block in Cartesian coordinates. Atoms with a constrained bond to the
    centre are left out of the block; where fewer than two neighbours remain, the block is the centre between two
    neighbours, with the centre in the middle.

    Args:
        graph: the bonds, of one connected molecule of at least 3 atoms.
        masses: of the atoms.
        positions: (n_atoms, 3), any length unit.
        constraints: pairs of atoms with a constrained distance.
        backbone: atoms that are preferred as the centre and as first branches. Those with two neighbours in the
            backbone, and at least one elsewhere, are candidates for the centre.

    Raises:
        ValueError: if all atoms lie on one line.
    """
    tree = _Tree(graph, masses, np.asarray(positions, dtype=np.float64), constraints, set(backbone))
    rows = [row for atom in tree.outwards for row in tree.rows(atom)]
    return np.array(rows, dtype=np.int64).reshape(-1, 4), np.array(tree.block, dtype=np.int64)


class _Tree:
    """The bonds along which atoms are placed, outwards from the centre of the block."""

    def __init__(
        self,
        graph: BondGraph,
        masses: Sequence[float],
        positions: np.ndarray,
        constraints: Collection[tuple[int, int]],
        backbone: set[int],
    ) -> None:
        self.graph, self.positions = graph, positions
        constrained = {frozenset(map(int, pair)) for pair in constraints}
        self.root, self.block = _centre(graph, positions, constrained, backbone)
        self.depth = graph.distances(self.root)
        atoms = range(len(self.depth))
        # Of two neighbours that are equally near to the centre, in a ring, the first one is the parent.
        nearer = [[j for j in graph.neighbours[i] if self.depth[j] < self.depth[i]] for i in atoms]
        self.parent = {i: nearer[i][0] for i in atoms if nearer[i]}
        size = [1] * len(self.depth)
        for i in sorted(self.parent, key=lambda i: -self.depth[i]):
            size[self.parent[i]] += size[i]
        #: which of several branches comes first
        self.rank = {i: (i not in backbone, -size[i], -masses[i], i) for i in atoms}
        self.outwards = sorted(atoms, key=lambda i: (self.depth[i], self.rank[i]))
        self.placed = list(self.block)

    def rows(self, parent: int) -> list[tuple[int, int, int, int]]:
        """The rows of the atoms that hang on ``parent``, and are not in the block."""
        children = sorted((i for i, p in self.parent.items() if p == parent), key=self.rank.__getitem__)
        rows = []
        for child in children:
            if child in self.block:
                continue
            c, d = self._references(parent)
            rows.append((child, parent, *self._bent(child, parent, c, d)))
            self.placed.append(child)
        return rows

    def _references(self, b: int) -> tuple[int, int]:
        """The second and third reference of an atom that is bonded to ``b``."""
        branches = sorted((i for i in self.placed if self.parent.get(i) == b), key=self.rank.__getitem__)
        if b == self.root:
            return branches[0], branches[1]
        c = self.parent[b]
        if branches:
            return c, branches[0]
        if c != self.root:
            return c, self.parent[c]
        others = (i for i in self.placed if self.parent.get(i) == c and i != b)
        return c, min(others, key=self.rank.__getitem__)

    def _bent(self, a: int, b: int, c: int, d: int) -> tuple[int, int]:
        """c and d, or others of the atoms that are placed, nearest to b, if angles a-b-c or b-c-d are near-linear."""
        if self._is_bent(a, b, c) and self._is_bent(b, c, d):
            return c, d
        far = self.graph.distances(b)
        others = sorted((i for i in self.placed if i != b), key=lambda i: (far[i], i))
        for x in others:
            for y in others:
                if x != y and self._is_bent(a, b, x) and self._is_bent(b, x, y):
                    return x, y
        warnings.warn(f"atom {a} has no reference atoms without a near-linear angle: {(a, b, c, d)}", stacklevel=5)
        return c, d

    def _is_bent(self, *atoms: int) -> bool:
        return _NEAR_LINEAR < _degrees(*self.positions[list(atoms)]) < 180 - _NEAR_LINEAR


def _centre(
    graph: BondGraph, positions: np.ndarray, constrained: set[frozenset[int]], backbone: set[int]
) -> tuple[int, list[int]]:
    """The centre of the molecule, and the block around it."""

    def is_inner(atom: int) -> bool:
        along = sum(j in backbone for j in graph.neighbours[atom])
        return atom in backbone and along == 2 and len(graph.neighbours[atom]) > 3

    inner = [i for i in sorted(backbone) if is_inner(i)] or range(len(graph.neighbours))
    choices = []
    for atom in inner:
        free = [j for j in graph.neighbours[atom] if frozenset((atom, j)) not in constrained]
        triangle = len(free) < 2
        block = _triangle(graph, atom, positions) if triangle else sorted([atom, *free])
        if len(block) > 3 or (len(block) == 3 and _is_triangle(positions[block])):
            terminal = sum(len(graph.neighbours[i]) == 1 for i in block)
            choices.append((triangle, max(graph.distances(atom)), -len(block), terminal, atom, block))
    if not choices:
        raise ValueError("positions: expected a structure that has a bent angle, got all bonds on one line")
    *_, atom, block = min(choices)
    return atom, block


def _triangle(graph: BondGraph, atom: int, positions: np.ndarray) -> list[int]:
    """Two neighbours with the atom between them, at the angle that is nearest to 90 degrees; [] without such."""
    around = graph.neighbours[atom]
    pairs = [(i, j) for n, i in enumerate(around) for j in around[n + 1 :]]
    if not pairs:
        return []
    i, j = min(pairs, key=lambda pair: abs(_degrees(*positions[[pair[0], atom, pair[1]]]) - 90))
    return [i, atom, j]


def _is_triangle(points: np.ndarray) -> bool:
    return all(_NEAR_LINEAR < _degrees(*np.roll(points, i, 0)) < 180 - _NEAR_LINEAR for i in range(3))


def _degrees(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> float:
    u, v = a - b, c - b
    return float(np.degrees(np.arctan2(np.linalg.norm(np.cross(u, v)), u @ v)))

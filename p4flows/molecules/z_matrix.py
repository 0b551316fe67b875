"""The atoms that a z-matrix and a rigid block name: checked, and put into an order in which they can be placed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["bond_and_angle_atoms", "check_atoms", "integers", "levels"]


def integers(name: str, value: np.ndarray | Tensor) -> Tensor:
    """An array of integers as int64 on the CPU; ValueError for anything else."""
    try:
        array = np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)
        if array.dtype.kind not in "iu":
            raise TypeError
        return torch.from_numpy(array.astype(np.int64))
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name}: expected integers, got {value!r}") from None


def check_atoms(z_matrix: Tensor, rigid_block: Tensor, in_data: int | None) -> int:
    """The number of atoms, each of which is either in the block or placed by one row of the z-matrix.

    ``in_data`` is the number of atoms that the data have, if their shape says so. Where it is larger than the number
    of atoms that are named, the z-matrix lacks rows, and the error says which.
    """
    if z_matrix.ndim != 2 or z_matrix.shape[1] != 4:
        raise ValueError(f"z_matrix: expected shape (rows, 4), got {tuple(z_matrix.shape)}")
    if rigid_block.ndim != 1 or len(rigid_block) < 3:
        raise ValueError(f"rigid_block: expected at least 3 atoms, got {rigid_block.tolist()}")
    named = [*rigid_block.tolist(), *z_matrix[:, 0].tolist()]
    n_atoms = max(len(named), in_data or 0)
    faults = {
        "without a row": sorted(set(range(n_atoms)) - set(named)),
        "twice": sorted({atom for atom in named if named.count(atom) > 1}),
        "unknown": sorted(set(named) - set(range(n_atoms))),
    }
    if any(faults.values()):
        found = "; ".join(f"{what}: {', '.join(map(str, atoms))}" for what, atoms in faults.items() if atoms)
        source = f" of data, which have {in_data} atoms," if in_data == n_atoms else ""
        raise ValueError(
            f"z_matrix and rigid_block: expected each atom 0 ... {n_atoms - 1} once{source or ','} got {found}"
        )
    return n_atoms


def levels(z_matrix: Tensor, rigid_block: Tensor) -> list[list[int]]:
    """Rows of the z-matrix in groups that can be placed at once."""
    rows = z_matrix.tolist()
    placed, left, result = set(rigid_block.tolist()), set(range(len(rows))), []
    while left:
        level = sorted(i for i in left if placed.issuperset(rows[i][1:]))
        if not level or any(len(set(rows[i])) < 4 for i in level):
            raise ValueError(
                f"z_matrix: rows {[rows[i] for i in sorted(left)]} cannot be placed from the atoms before them"
            )
        result.append(level)
        left -= set(level)
        placed |= {rows[i][0] for i in level}
    return result


def bond_and_angle_atoms(z_matrix: Tensor, triangle: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Pairs of atoms whose distances, and triples whose angles, are coordinates.

    They are those of the rows, followed by the two bonds and the angle of a block of three atoms, the second of which
    is in the middle, if there is one that internal coordinates describe.
    """
    bonds, angles = z_matrix[:, :2], z_matrix[:, :3]
    if triangle is None:
        return bonds, angles
    if len(triangle) != 3:
        raise ValueError(
            "rigid_block: expected 3 atoms where a bond within it is constrained, since Cartesian coordinates cannot "
            f"keep its length, got {triangle.tolist()}"
        )
    return torch.cat([bonds, triangle[:2][None], triangle[1:][None]]), torch.cat([angles, triangle[None]])

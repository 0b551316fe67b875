"""What mixed coordinates take from data: scales, whitened vibrations of a rigid block, cuts of the dihedrals."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from p4flows.molecules import geometry

__all__ = ["check_spread", "deviation", "fit_block", "widest_gap", "wrap"]

# OpenMM keeps constraints to a relative 1e-5, and float32 positions have 1e-7 nm. Bonds at 10 K vary by 0.5 %.
_SMALLEST_SPREAD = 1e-4


def fit_block(block: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean structure (m, 3); whitened vibrations (3m, 3m - 6); orthonormal directions of rotation (3m, 3)."""
    reference = block[0] - block[0].mean(0)
    for _ in range(10):
        reference = geometry.superpose(block, reference)[0].mean(0)
    m = len(reference)
    axes = torch.eye(3, dtype=block.dtype)
    rotations = torch.linalg.cross(axes[:, None].expand(3, m, 3), reference.expand(3, m, 3)).flatten(1).T
    translations = axes.repeat(m, 1)
    # Superposed points satisfy the Eckart conditions Σ r = 0 and Σ ref × r = 0, so that they vary in the
    # 3m - 6 directions orthogonal to translations and rotations of the reference, and in no other.
    Q, _ = torch.linalg.qr(torch.cat([translations, rotations], 1), mode="complete")
    complement, vibrations = Q[:, 3:6], Q[:, 6:]
    amplitudes = (geometry.superpose(block, reference)[0] - reference).flatten(1) @ vibrations
    _, spread, directions = torch.linalg.svd(amplitudes, full_matrices=False)
    return reference, vibrations @ directions.mT * (spread / math.sqrt(len(block) - 1)), complement


def check_spread(
    x: Tensor, rigid_block: Tensor, bonds: Tensor, angles: Tensor, dihedrals: Tensor, raw: Tensor, basis: Tensor
) -> None:
    """ValueError where a coordinate does not vary, so that it has no density that could be whitened.

    A constrained bond varies by the tolerance of the constraint only. Divided by this spread it would become a
    coordinate like any other, made of rounding errors, and add some hundred nats to the log-determinant.

    Args:
        x: positions (B, n_atoms, 3).
        rigid_block: atoms (m,) of the block; its distances are checked if it is described by Cartesian coordinates.
        bonds, angles, dihedrals: the atoms (k, 2), (k, 3), (k, 4) of the internal coordinates.
        raw: their values over x, (B, all of them).
        basis: whitened vibrations of the block, from :func:`fit_block`; none if it has internal coordinates.
    """
    pairs = torch.combinations(rigid_block, 2) if basis.shape[1] else rigid_block.new_empty(0, 2)
    lengths = geometry.distance(x[:, pairs[:, 0]], x[:, pairs[:, 1]])
    names = [f"the distance of atoms {i} and {j} of the block" for i, j in pairs.tolist()]
    for kind, atoms in (("bond", bonds), ("angle", angles), ("dihedral", dihedrals)):
        names += [f"the {kind} {'-'.join(map(str, row))}" for row in atoms.tolist()]
    names += [f"vibration {i} of the block" for i in range(basis.shape[1])]
    vibrations = torch.linalg.svdvals(basis)
    std = torch.cat([deviation(lengths), deviation(raw), vibrations])
    # A length is compared with its mean, an angle with a radian, a vibration with the size of the block.
    radians = raw.new_ones(len(angles) + len(dihedrals))
    size = lengths.mean().expand(len(vibrations))
    scale = torch.cat([lengths.mean(0), raw[:, : len(bonds)].mean(0), radians, size])
    units = ["nm"] * (len(pairs) + len(bonds)) + ["rad"] * len(radians) + ["nm"] * len(vibrations)
    still = (~(std > _SMALLEST_SPREAD * scale)).nonzero().flatten().tolist()
    if still:
        shown = ", ".join(f"{names[i]} (by {std[i]:.1g} {units[i]})" for i in still[:3])
        more = f" and {len(still) - 3} more" if len(still) > 3 else ""
        raise ValueError(
            f"data: expected every coordinate to vary over the frames, by more than {_SMALLEST_SPREAD:g} of its size; "
            f"got {shown}{more}. Constrained bonds and virtual sites have no density: make the coordinates of the "
            "Molecule, MixedCoordinates(molecule, data), which leave constrained bonds out, or create the system with "
            "constraints=None and rigidWater=False and a model without virtual sites, and simulate it again"
        )


def deviation(values: Tensor) -> Tensor:
    """The standard deviation of each column; of no column, none, where torch would warn."""
    return values.std(0) if values.shape[1] else values.new_empty(0)


def widest_gap(dihedrals: Tensor) -> Tensor:
    """For each column, the middle of the widest stretch of the circle with the fewest data."""
    bins = 60
    cuts = []
    for column in dihedrals.T:
        counts = torch.histc(column, bins, -math.pi, math.pi)
        # A window of a tenth of the circle, so that one empty bin within a mode does not win.
        window = counts.repeat(3).unfold(0, 7, 1).sum(-1)[bins - 3 : 2 * bins - 3]
        best = (window == window.min()).nonzero().flatten()
        runs = torch.tensor_split(best, (best.diff() > 1).nonzero().flatten() + 1)
        longest = max(runs, key=len)
        cuts.append(-math.pi + (longest.double().mean() + 0.5) * 2 * math.pi / bins)
    return torch.stack(cuts) if cuts else dihedrals.new_empty(0)


def wrap(phi: Tensor, cut: Tensor | float) -> Tensor:
    """phi + 2π k in [cut, cut + 2π)."""
    return cut + torch.remainder(phi - cut, 2 * math.pi)

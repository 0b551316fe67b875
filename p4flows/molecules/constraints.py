"""Bonds of constant length: which coordinates they fix, and what they do to the density of the others."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import openmm
import torch
from openmm import unit
from torch import Tensor, nn

from p4flows.molecules import geometry

__all__ = ["Constraints", "constraints_of", "fixed_bonds"]

# OpenMM keeps constraints to a relative 1e-5; xtc files round positions to 0.001 nm, which is 0.5 % of a bond.
_TOLERANCE = 1e-2


def constraints_of(system: openmm.System) -> tuple[np.ndarray, np.ndarray]:
    """The constrained pairs of atoms (k, 2) of a system, and their distances (k,) in nm."""
    found = [system.getConstraintParameters(i) for i in range(system.getNumConstraints())]
    pairs = np.array([(i, j) for i, j, _ in found], dtype=np.int64).reshape(-1, 2)
    return pairs, np.array([distance.value_in_unit(unit.nanometer) for *_, distance in found], dtype=np.float64)


def fixed_bonds(bonds: Iterable[tuple[int, int]], constraints: np.ndarray) -> list[int]:
    """For each constraint, the index of the coordinate that it fixes among the bond lengths ``bonds``.

    Raises:
        ValueError: for constraints between atoms whose distance is no coordinate.
    """
    index = {frozenset(map(int, bond)): i for i, bond in enumerate(bonds)}
    pairs = [frozenset(map(int, pair)) for pair in constraints]
    lacking = [tuple(sorted(pair)) for pair in pairs if pair not in index]
    if lacking:
        shown = ", ".join(f"{i}-{j}" for i, j in lacking[:5]) + (" ..." if len(lacking) > 5 else "")
        raise ValueError(
            f"constraints: expected those of bonds that are coordinates, got the pairs {shown}. Only bonds by which a "
            "row of the z-matrix places an atom, or the two of a block of three atoms, can be constrained: not angles "
            "(constraints=HAngles), the bond that closes a ring (AllBonds), or one within a larger block. "
            "constraints=HBonds always can, and so can constraints=None"
        )
    return [index[pair] for pair in pairs]


class Constraints(nn.Module):
    r"""Constrained bonds of a molecule, and the volume that constrained dynamics gives to its configurations.

    Dynamics with constraints do not sample the density that very stiff bonds would have. With the momenta along the
    constraints gone, what remains of the kinetic energy gives configurations the volume of the metric of masses
    (Fixman 1974). Relative to stiff bonds it is

    .. math:: \sqrt{\det C}, \qquad C_{kl} = \frac{Z_{kl}}{\sqrt{Z_{kk} Z_{ll}}}, \qquad
        Z_{kl} = \sum_i \frac{1}{m_i}
        \frac{\partial \sigma_k}{\partial x_i} \cdot \frac{\partial \sigma_l}{\partial x_i}

    for bond lengths :math:`\sigma`. C is one on its diagonal, and differs from zero elsewhere only for bonds that
    share an atom; it depends on the angle between them. For bonds to hydrogen the effect is below 0.01 kT; for a chain
    of carbons with all bonds constrained it is some 0.1 kT.

    Args:
        pairs: (k, 2) atoms.
        lengths: (k,) in nm.
        masses: (n_atoms,), in any unit.
    """

    pairs: Tensor
    lengths: Tensor
    weights: Tensor

    def __init__(self, pairs: np.ndarray, lengths: np.ndarray, masses: np.ndarray) -> None:
        super().__init__()
        incidence = torch.zeros(len(pairs), len(masses), dtype=torch.float64)
        rows = torch.arange(len(pairs))
        incidence[rows, torch.as_tensor(pairs[:, 0])] = 1.0
        incidence[rows, torch.as_tensor(pairs[:, 1])] = -1.0
        weights = (incidence / torch.as_tensor(masses, dtype=torch.float64)) @ incidence.T
        scale = weights.diagonal().rsqrt()
        # Not part of the state: they come from the molecule, as the z-matrix does.
        self.register_buffer("pairs", torch.as_tensor(pairs), persistent=False)
        self.register_buffer("lengths", torch.as_tensor(lengths), persistent=False)
        self.register_buffer("weights", weights * scale[:, None] * scale, persistent=False)
        self._clusters = _clusters(self.weights.ne(0))

    def log_metric(self, x: Tensor) -> Tensor:
        r""":math:`\tfrac12 \ln \det C`, (...), for positions (..., n_atoms, 3)."""
        bonds = torch.nn.functional.normalize(x[..., self.pairs[:, 0], :] - x[..., self.pairs[:, 1], :], dim=-1)
        result = x.new_zeros(x.shape[:-2])
        # A cluster is a determinant of its own. Those of one size are computed together.
        for cluster in self._clusters:
            inside = bonds[..., cluster, :]
            C = inside @ inside.mT * self.weights[cluster[:, :, None], cluster[:, None, :]]
            result = result + torch.linalg.slogdet(C).logabsdet.sum(-1) / 2
        return result

    def check(self, name: str, x: Tensor) -> None:
        """ValueError for positions (..., n_atoms, 3) in which a constrained bond has another length."""
        found = geometry.distance(x[..., self.pairs[:, 0], :], x[..., self.pairs[:, 1], :]).reshape(-1, len(self.pairs))
        wrong = ((found / self.lengths.to(found) - 1).abs() > _TOLERANCE).nonzero()
        if len(wrong):
            frame, k = wrong[0].tolist()
            i, j = self.pairs[k].tolist()
            raise ValueError(
                f"{name}: expected the constrained bond {i}-{j} to be {self.lengths[k]:.4f} nm long, got "
                f"{found[frame, k]:.4f} nm in frame {frame}; {len(wrong)} such bonds in all"
            )


def _clusters(share: Tensor) -> list[Tensor]:
    """Index sets (count, size) of constraints that share atoms, directly or through others; one tensor a size."""
    left = set(range(len(share)))
    by_size: dict[int, list[list[int]]] = {}
    while left:
        cluster: set[int] = set()
        front = {min(left)}
        while front:
            cluster |= front
            front = {j for i in front for j in share[i].nonzero().flatten().tolist()} - cluster
        left -= cluster
        by_size.setdefault(len(cluster), []).append(sorted(cluster))
    return [torch.tensor(clusters) for size, clusters in sorted(by_size.items()) if size > 1]

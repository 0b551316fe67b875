"""What may stand between two couplings: fixed permutations, dense matrices, and P4Inv."""

from __future__ import annotations

import torch
from nflows.flows import Flow
from nflows.transforms import LULinear, Permutation, RandomPermutation, ReversePermutation, Transform
from torch import Tensor, nn

from p4flows.nflows import replace_permutations

__all__ = ["MIXES", "Dense", "put_between"]


class Dense(Transform):
    """Any invertible matrix, trained as it is: slogdet and solve, O(n³), in every pass."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(features).flip(0))
        self.bias = nn.Parameter(torch.zeros(features))

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return inputs @ self.weight.T + self.bias, self._logabsdet(inputs)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return torch.linalg.solve(self.weight, (inputs - self.bias).T).T, -self._logabsdet(inputs)

    def _logabsdet(self, inputs: Tensor) -> Tensor:
        return torch.linalg.slogdet(self.weight)[1].expand(len(inputs))


def _halves(features: int) -> Permutation:
    """The halves exchanged: no more than alternating masks."""
    return Permutation(torch.arange(features).roll(features // 2))


MIXES = {
    "alternating masks": _halves,
    "reversed": ReversePermutation,
    "random": RandomPermutation,
    "LU": lambda n: LULinear(n, identity_init=True),
    "dense": Dense,
    "P4Inv": ReversePermutation,
}


def put_between(flow: Flow, features: int, mix: str, rank: int = 1, seed: int = 0) -> Flow:
    """Replace the reversed permutations of a flow by one of MIXES; the dense and the P4Inv ones start as such."""
    if mix not in MIXES:
        raise ValueError(f"mix: expected one of {', '.join(MIXES)}, got {mix!r}")
    transforms = flow._transform._transforms
    for i, transform in enumerate(transforms):
        if isinstance(transform, ReversePermutation):
            transforms[i] = MIXES[mix](features)
    if mix == "P4Inv":
        replace_permutations(flow, rank, seed=seed)
    return flow

"""What may stand between two couplings: a permutation, fixed or as the start of an LU, dense or P4Inv layer."""

from __future__ import annotations

from functools import partial

import torch
from nflows.flows import Flow
from nflows.transforms import (
    CompositeTransform,
    LULinear,
    Permutation,
    RandomPermutation,
    ReversePermutation,
    Transform,
)
from torch import Tensor, nn

from benchmarks.mixing.masked_lu import MaskedLU
from p4flows.nflows import InvertibleLinear, P4InvLinear, replace_permutations

__all__ = ["MIXES", "PERMUTATIONS", "Dense", "put_between"]


class Dense(Transform):
    """Any invertible matrix, trained from a permutation: slogdet and solve, O(n³), in every pass."""

    def __init__(self, start: Permutation) -> None:
        super().__init__()
        p = start._permutation
        self.weight = nn.Parameter(torch.eye(len(p))[p])
        self.bias = nn.Parameter(torch.zeros(len(p)))

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return inputs @ self.weight.T + self.bias, self._logabsdet(inputs)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return torch.linalg.solve(self.weight, (inputs - self.bias).T).T, -self._logabsdet(inputs)

    def _logabsdet(self, inputs: Tensor) -> Tensor:
        return torch.linalg.slogdet(self.weight)[1].expand(len(inputs))


def _halves(features: int) -> Permutation:
    """The halves exchanged: no more than alternating masks."""
    return Permutation(torch.arange(features).roll(features // 2))


PERMUTATIONS = {"alternating masks": _halves, "reversed": ReversePermutation, "random": RandomPermutation}
_LU = {"LU": partial(LULinear, identity_init=True), "masked LU": MaskedLU}
_P4 = {"P4Inv": P4InvLinear, "InvertibleLinear": InvertibleLinear}
MIXES = (*PERMUTATIONS, *_LU, "dense", *_P4)


def put_between(
    flow: Flow, features: int, mix: str, rank: int | None = None, seed: int = 0, start: str = "reversed"
) -> Flow:
    """Replace the permutations of a flow by one of MIXES; those that are learned start as a permutation."""
    if mix not in MIXES:
        raise ValueError(f"mix: expected one of {', '.join(MIXES)}, got {mix!r}")
    transforms = flow._transform._transforms
    for i, transform in enumerate(transforms):
        if isinstance(transform, Permutation):
            permutation = PERMUTATIONS[mix if mix in PERMUTATIONS else start](features)
            if mix in _LU:
                transforms[i] = CompositeTransform([permutation, _LU[mix](features)])
            else:
                transforms[i] = Dense(permutation) if mix == "dense" else permutation
    if mix in _P4:
        replace_permutations(flow, rank, layer=_P4[mix], seed=seed)
    return flow

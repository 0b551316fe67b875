"""A plain linear layer whose matrix follows a dense weight by low-rank updates, with error feedback."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from p4flows import MergeOutcome, P4Layer
from p4flows.tracking.noise import directions

__all__ = ["Following"]


class Following(P4Layer):
    """``y = A x + b``, in which A follows the trained weight W as that of ``p4flows.InvertibleLinear`` does.

    After each optimizer step A moves by nearly the best update of rank k of ``W - A``; the rest remains for the next.
    It has the numbers and the optimizer state of a dense layer, and so is no layer of the package: it is here to tell
    what the price of low rank is made of.
    """

    merge_every, deferred = 1, True

    def __init__(self, layer: nn.Linear, rank: int, seed: int = 0) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight = nn.Parameter(layer.weight.detach().clone())
        self.bias = nn.Parameter(layer.bias.detach().clone())
        self.register_buffer("A", layer.weight.detach().clone())
        number = torch.tensor(seed)
        self.register_buffer("directions", directions(number, 0 * number, self.in_features, rank).to(self.A))

    @property
    def perturbation(self) -> tuple[nn.Parameter, ...]:
        return (self.weight,)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.A + (self.weight - self.weight.detach()), self.bias)

    @torch.no_grad()
    def merge(self, force: bool = False) -> Tensor:
        """A step of subspace iteration (PowerSGD, arXiv:1905.13727): ``P = orth(E Q)``, ``Q ← Eᵀ P``, ``A += P Qᵀ``."""
        if not self.weight.isfinite().all():
            return torch.tensor(int(MergeOutcome.SKIPPED))
        E = self.weight - self.A
        P = torch.linalg.qr(E @ self.directions).Q
        Q = E.mT @ P
        self.A.addmm_(P, Q.mT)
        size = torch.linalg.vector_norm(Q, dim=0)
        self.directions.copy_(torch.where(size > 0, Q / size, self.directions))
        return torch.tensor(int(MergeOutcome.MERGED))

    @torch.no_grad()
    def reset(self) -> None:
        self.weight.copy_(self.A)

    def violation(self) -> Tensor:
        return torch.where(self.A.isfinite().all(), 0.0, torch.inf).double()

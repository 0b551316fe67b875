"""Orthogonal matrices perturbed by pairs of Householder reflections: what P4Orthogonal could be instead."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from p4flows import LowRank, MergeOutcome, P4Layer
from p4flows.layers.frozen import Frozen
from p4flows.tracking.rotation import defect

__all__ = ["Reflections"]


class Reflections(Frozen, LowRank, P4Layer):
    """``y = H(v₁ + u₁) H(v₁) ... H(vₖ + uₖ) H(vₖ) A x``, where the reflections of each pair cancel at u = 0.

    The product is ``I - W T Wᵀ`` (the compact WY form) with the 2k vectors as columns of W and
    ``T⁻¹ = striu(WᵀW) + diag(WᵀW) / 2``. U is scaled so that at rest a step of it does the same as in
    P4Orthogonal.
    """

    exact_name, exact_dtype = "A_double", torch.float64

    def __init__(self, features: int, rank: int, seed: int = 0) -> None:
        super().__init__()
        self.features = features
        self.register_frozen(torch.eye(features), torch.get_default_dtype())
        self.register_perturbation(self.A, rank, torch.tensor(seed), bias=False)

    def _factors(self, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
        V = V / torch.linalg.vector_norm(V, dim=0)
        scale = (self.features / U.shape[1]) ** 0.5 / 4
        W = torch.stack([V + scale * U, V], -1).flatten(1)
        gram = W.mT @ W
        return W, gram.triu(1) + torch.diag(gram.diagonal() / 2)

    def _reflect(self, rows: Tensor, U: Tensor, V: Tensor) -> Tensor:
        W, T_inv = self._factors(U, V)
        return rows - torch.linalg.solve_triangular(T_inv, (rows @ W).mT, upper=True).mT @ W.mT

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._reflect(linear(x, self.A), self.U, self.V), x.new_zeros(x.shape[:-1])

    @property
    def matrix(self) -> Tensor:
        return self._reflect(self.A.mT, self.U, self.V).mT

    @torch.no_grad()
    def merge(self, force: bool = False) -> Tensor:
        finite = self.U.isfinite().all() & self.V.isfinite().all()
        if finite:
            self.set_frozen(self._reflect(self.exact.mT, self.U.double(), self.V.double()).mT)
        self.reset()
        return torch.where(finite, int(MergeOutcome.MERGED), int(MergeOutcome.RESET))

    def violation(self) -> Tensor:
        return defect(self.A)

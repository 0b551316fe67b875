"""Lipschitz continuous layers in an invertible residual network: the bound, the likelihood, and the inverse."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from benchmarks.paper.toy_densities import DISTRIBUTIONS
from p4flows import MergeScheduler, P4Layer, P4Lipschitz

__all__ = ["METHODS", "ResidualFlow", "train"]

_BOUND = 0.9  # of each linear layer
_TEST = 5_000
_FIXED_POINT = 100  # iterations of an inverse


class _Scaled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return _BOUND * weight


def _spectral_norm(n: int, m: int, seed: int) -> nn.Module:
    """torch's parametrization, times the bound: the weight over an estimate of its norm."""
    layer = parametrizations.spectral_norm(nn.Linear(n, m, bias=False))
    nn.utils.parametrize.register_parametrization(layer, "weight", _Scaled(), unsafe=True)
    return layer


def _plain(n: int, m: int, seed: int) -> nn.Module:
    return nn.Linear(n, m, bias=False)


def _p4(rank: int | None) -> Callable[[int, int, int], nn.Module]:
    def make(n: int, m: int, seed: int) -> nn.Module:
        return P4Lipschitz(n, m, _BOUND, None if rank is None else min(rank, n, m), bias=False, seed=seed)

    return make


METHODS: dict[str, tuple[Callable[[int, int, int], nn.Module], int | None]] = {
    "P4Lipschitz, N = 10": (_p4(None), 10),
    "P4Lipschitz, N = 1": (_p4(None), 1),
    "P4Lipschitz, rank 1, N = 10": (_p4(1), 10),
    "torch, spectral_norm": (_spectral_norm, None),
    "no bound": (_plain, None),
}
"""How the linear layers are made, and the merge interval."""


class _Block(nn.Module):
    """``x + f(x)`` in two dimensions, f of three linear layers with ELU between, and log|det| of its derivative."""

    def __init__(self, make: Callable[[int, int, int], nn.Module], hidden: int, seed: int) -> None:
        super().__init__()
        sizes = [2, hidden, hidden, 2]
        self.linear = nn.ModuleList(make(n, m, seed + i) for i, (n, m) in enumerate(pairwise(sizes)))
        self.bias = nn.ParameterList(torch.zeros(m) for m in sizes[1:])

    def residual(self, x: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
        """f(x) for x (B, 2), and its derivatives along tangents (k, B, 2)."""
        for i, (linear, bias) in enumerate(zip(self.linear, self.bias, strict=True)):
            both = linear(torch.cat([x[None], tangents]))
            x, tangents = both[0] + bias, both[1:]
            if i < 2:
                slope = torch.where(x > 0, 1, x.clamp(max=0).exp())
                x, tangents = nn.functional.elu(x), slope * tangents
        return x, tangents

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        directions = torch.eye(2)[:, None].expand(2, len(x), 2)
        f, (a, b) = self.residual(x, directions)
        det = (1 + a[:, 0]) * (1 + b[:, 1]) - a[:, 1] * b[:, 0]
        return x + f, det.abs().log()

    def inverse(self, y: Tensor, iterations: int) -> Tensor:
        """By iteration of ``x ← y - f(x)``, which converges where f is a contraction."""
        x, none = y, y.new_zeros(0, *y.shape)
        for _ in range(iterations):
            x = y - self.residual(x, none)[0]
        return x


class ResidualFlow(nn.Module):
    """An invertible residual network (Behrmann et al. 2019, arXiv:1811.00995) of two dimensions."""

    def __init__(self, make: Callable[[int, int, int], nn.Module], blocks: int, hidden: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block(make, hidden, 10 * i) for i in range(blocks))
        self.log_scale = nn.Parameter(torch.zeros(2))

    def log_prob(self, x: Tensor) -> Tensor:
        total = self.log_scale.sum()
        for block in self.blocks:
            x, logabsdet = block(x)
            total = total + logabsdet
        return total - (x * self.log_scale.exp()).square().sum(-1) / 2 - math.log(2 * math.pi)

    def round_trip(self, x: Tensor) -> float:
        """The largest ``|x - F⁻¹(F(x))|``, infinity where it diverges."""
        y = x
        for block in self.blocks:
            y = block(y)[0]
        for block in reversed(self.blocks):
            y = block.inverse(y, _FIXED_POINT)
        error = (x - y).abs().max().item()
        return error if math.isfinite(error) else math.inf

    def norms(self, effective: bool = True) -> float:
        """The largest spectral norm of a linear layer over the bound: as it is used, or of the frozen matrices."""
        found = []
        for module in self.modules():
            if isinstance(module, P4Layer):
                found.append(module.matrix if effective else module.A)
            elif isinstance(module, nn.Linear):
                found.append(module.weight)
        return max(torch.linalg.matrix_norm(M.detach().double(), 2).item() for M in found) / _BOUND


def train(
    method: str, data: str, rate: float, steps: int, blocks: int, hidden: int, batch: int, points: int
) -> dict[str, Any]:
    """Maximum likelihood by Adam on a cosine; NLLs of a validation and a test set, norms over the bound, round trip."""
    torch.manual_seed(0)
    make, every = METHODS[method]
    flow = ResidualFlow(make, blocks, hidden)
    optimizer = torch.optim.Adam([p for p in flow.parameters() if p.requires_grad], lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    scheduler = MergeScheduler(flow, optimizer, every).attach() if every else None
    generator = torch.Generator().manual_seed(1)
    test, validation = (DISTRIBUTIONS[data].sample(_TEST, torch.Generator().manual_seed(seed)) for seed in (2, 3))
    curve: dict[str, Any] = {"step": [], "validation": [], "nll": [], "effective": [], "frozen": []}
    every_point = max(10, steps // points // 10 * 10)
    for step in range(steps + 1):
        # Just before a merge, where a perturbation is oldest; and at the end just after one.
        if step in (0, steps) or (step + 1) % every_point == 0:
            if scheduler is not None and step == steps:
                scheduler.merge()
            flow.eval()
            with torch.no_grad():
                nlls = (-flow.log_prob(x).mean().item() for x in (validation, test))
                values = (step, *nlls, flow.norms(), flow.norms(effective=False))
            flow.train()
            for key, value in zip(curve, values, strict=True):
                curve[key].append(value)
        if step < steps:
            optimizer.zero_grad()
            (-flow.log_prob(DISTRIBUTIONS[data].sample(batch, generator)).mean()).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        error = flow.eval().round_trip(test[:500])
    counters = scheduler.counters if scheduler is not None else None
    return {**curve, "round_trip": min(error, 1e300), "counters": counters}

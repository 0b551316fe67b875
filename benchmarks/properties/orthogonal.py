"""Orthogonal layers: learning a rotation of SO(128), unmixing independent sources, and drift over merges."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from benchmarks.paper.linear import targets
from benchmarks.properties.reflections import Reflections
from p4flows import MergeScheduler, P4Layer, P4Orthogonal

__all__ = ["METHODS", "drift", "forward", "ica", "optimizer_of", "sources", "train_ica", "train_rotation"]

_POINTS = 60  # of a curve


def _parametrized(orthogonal_map: str, n: int) -> nn.Module:
    layer = parametrizations.orthogonal(nn.Linear(n, n, bias=False), orthogonal_map=orthogonal_map)
    layer.weight = torch.eye(n)
    return layer


def _geotorch(n: int) -> nn.Module:
    import geotorch

    layer = nn.Linear(n, n, bias=False)
    geotorch.orthogonal(layer, "weight")
    layer.weight = torch.eye(n)
    return layer


def _p4(rank: int | None, n: int) -> nn.Module:
    return P4Orthogonal(n, None if rank is None else min(rank, n), bias=False, seed=1)


METHODS: dict[str, Callable[[int], nn.Module]] = {
    "P4Orthogonal, rank 1": partial(_p4, 1),
    "P4Orthogonal, rank 8": partial(_p4, 8),
    "P4Orthogonal": partial(_p4, None),
    "reflections, rank 8": lambda n: Reflections(n, min(n, 8), seed=1),
    "torch, matrix_exp": partial(_parametrized, "matrix_exp"),
    "torch, cayley": partial(_parametrized, "cayley"),
    "torch, householder": partial(_parametrized, "householder"),
    "geotorch": _geotorch,
}
"""Layers of width n, which start as the identity."""


def forward(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)[0] if isinstance(layer, P4Layer) else layer(x)


def matrix(layer: nn.Module) -> Tensor:
    return (layer.matrix if isinstance(layer, P4Layer) else layer.weight).detach().double()


def optimizer_of(layer: nn.Module, rate: float) -> torch.optim.Optimizer:
    """Adam on what is trained, with merges where there are some."""
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=rate)
    if isinstance(layer, P4Layer):
        MergeScheduler(layer, optimizer).attach()
    return optimizer


def train_rotation(method: str, rate: float, steps: int, n: int, batch: int) -> dict[str, Any]:
    """Fit y = T x for a T of SO(n), from the identity; the expected loss ``|M - T|² / n`` on the way."""
    T = targets()["orthogonal"] if n == 128 else _rotation(n)
    layer, generator = METHODS[method](n), torch.Generator().manual_seed(2)

    def loss(x: Tensor) -> Tensor:
        return (forward(layer, x) - x @ T32.T).square().mean()

    T32 = T.float()
    curve = _train(
        layer, rate, steps, lambda: torch.randn(batch, n, generator=generator), loss,
        lambda: (matrix(layer) - T).square().sum().item() / n,
    )  # fmt: skip
    return {**curve, "defect": _defect(matrix(layer))}


def sources(n: int, count: int, generator: torch.Generator) -> Tensor:
    """Independent sources of variance 1 (count, n): logistic ones, whose tails are heavier than those of a normal."""
    u = torch.rand(count, n, generator=generator, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
    return (u / (1 - u)).log() * (math.sqrt(3) / math.pi)


def ica(n: int, count: int = 20_000) -> tuple[Tensor, Tensor]:
    """Whitened mixtures of sources (count, n), and the matrix (n, n) of which an unmixing matrix is the inverse."""
    generator = torch.Generator().manual_seed(3)
    s = sources(n, count, generator)
    mixed = s @ torch.randn(n, n, generator=generator, dtype=torch.float64).T
    mixed -= mixed.mean(0)
    values, vectors = torch.linalg.eigh(mixed.T @ mixed / count)
    whitening = vectors / values.sqrt() @ vectors.T
    z = mixed @ whitening
    return z, torch.linalg.lstsq(s - s.mean(0), z).solution.T


def amari(W: Tensor, mixing: Tensor) -> float:
    """Amari's distance of ``W mixing`` from a permutation with signs: 0 where all is unmixed, 1 at most."""
    P = (W @ mixing).abs()
    n = len(P)
    rows = (P / P.amax(1, keepdim=True)).sum(1) - 1
    columns = (P / P.amax(0, keepdim=True)).sum(0) - 1
    return (rows.sum() + columns.sum()).item() / (2 * n * (n - 1))


def train_ica(method: str, rate: float, steps: int, n: int, batch: int) -> dict[str, Any]:
    """Unmix whitened data by maximum likelihood, with an orthogonal matrix; Amari's distance on the way."""
    z, mixing = ica(n)
    z32, layer, generator = z.float(), METHODS[method](n), torch.Generator().manual_seed(4)

    def loss(x: Tensor) -> Tensor:
        # The density of a logistic variable of variance 1, but for a constant.
        s = forward(layer, x) * (math.pi / math.sqrt(3) / 2)
        return 2 * (nn.functional.softplus(2 * s) - s).mean()

    curve = _train(
        layer, rate, steps, lambda: z32[torch.randint(len(z32), (batch,), generator=generator)], loss,
        lambda: amari(matrix(layer), mixing),
    )  # fmt: skip
    return {**curve, "defect": _defect(matrix(layer))}


def fast_ica(n: int) -> float:
    """Amari's distance that sklearn's FastICA gets to with the same data."""
    from sklearn.decomposition import FastICA

    z, mixing = ica(n)
    found = FastICA(whiten=False, fun="logcosh", random_state=0, tol=1e-6, max_iter=1000).fit(z.numpy())
    return amari(torch.tensor(found.components_), mixing)


def _train(
    layer: nn.Module,
    rate: float,
    steps: int,
    draw: Callable[[], Tensor],
    loss: Callable[[Tensor], Tensor],
    measure: Callable[[], float],
) -> dict[str, Any]:
    """Adam, on a cosine to zero; what is measured at some of the steps."""
    optimizer = optimizer_of(layer, rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    every = max(1, steps // _POINTS)
    curve: dict[str, Any] = {"step": [], "error": []}
    for step in range(steps + 1):
        if step % every == 0 or step == steps:
            curve["step"].append(step)
            curve["error"].append(measure())
        if step < steps:
            optimizer.zero_grad()
            loss(draw()).backward()
            optimizer.step()
            schedule.step()
    return curve


def drift(n: int, rank: int, merges: int, points: int) -> dict[str, Any]:
    """The spectral norm of ``AᵀA - I`` of a P4Orthogonal in float32 over merges of random perturbations."""
    layer, generator = P4Orthogonal(n, rank), torch.Generator().manual_seed(0)
    curve: dict[str, list] = {"merges": [], "defect": []}
    every = max(1, merges // points)
    for i in range(merges + 1):
        if i % every == 0 or i == merges:
            curve["merges"].append(i)
            curve["defect"].append(_defect(layer.A.double()))
        with torch.no_grad():
            layer.U.copy_(0.1 * torch.randn(layer.U.shape, generator=generator))
        layer.merge()
    return curve


def _defect(M: Tensor) -> float:
    return torch.linalg.matrix_norm(M.T @ M - torch.eye(len(M), dtype=M.dtype), 2).item()


def _rotation(n: int) -> Tensor:
    Q = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    Q[0] *= torch.linalg.det(Q).sign()
    return Q

"""Errors of inverse and log-determinant on the way through a real training in float32, for `drift`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from p4flows import InvertibleLinear, MergeScheduler, P4Inv

__all__ = ["LAYERS", "STEPS", "follow_training"]

LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "P4Inv, default rank": lambda n: P4Inv(n, bias=False),
    "InvertibleLinear": lambda n: InvertibleLinear(n, bias=False),
}
STEPS = {64: 20_000, 512: 5_000}
_BATCH = 128
_RATE = 1e-3


def follow_training(
    name: str, n: int, steps: int, points: int, errors_of: Callable[[Tensor, Tensor, Tensor], dict[str, float]]
) -> dict[str, Any]:
    """Maximum likelihood and, in the same steps, the inverse direction, on correlated Gaussian data.

    The optimum is the inverse of a matrix of condition 100, up to a rotation. Errors at ``points`` steps.
    """
    torch.manual_seed(0)
    layer = LAYERS[name](n)
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=_RATE)
    scheduler = MergeScheduler(layer, optimizer)
    Q, _ = torch.linalg.qr(torch.randn(n, n))
    mixing = Q * torch.logspace(-1, 1, n)
    measured = {round(steps * (i + 1) / points) for i in range(points)} | {1}
    errors, merge_s, start = [], 0.0, time.process_time()
    measuring = 0.0
    for i in tqdm(range(1, steps + 1), desc=f"n = {n}, {name}, trained", mininterval=5):
        optimizer.zero_grad()
        z, forward = layer(torch.randn(_BATCH, n) @ mixing.T)
        x, backward = layer.inverse(torch.randn(_BATCH, n))
        energy = (x @ Q / torch.logspace(-1, 1, n)).square().sum(-1) / 2
        ((z.square().sum(-1) / 2 - forward).mean() + 0.1 * (energy - backward).mean()).backward()
        optimizer.step()
        before = time.process_time()
        scheduler.step()
        merge_s += time.process_time() - before
        if i in measured:
            before = time.process_time()
            errors.append({"merges": i, **errors_of(layer.A, layer.A_inv, layer.logabsdet_A)})
            measuring += time.process_time() - before
    return {
        "n": n,
        "method": name,
        "dtype": "float32",
        "perturbations": "trained",
        "errors": errors,
        "merge_s": merge_s,
        "step_s": time.process_time() - start - merge_s - measuring,
        "counters": scheduler.counters,
    }

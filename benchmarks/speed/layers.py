"""Every linear layer whose speed is compared, with its two directions, and a training evaluation of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from p4flows import InvertibleLinear, P4Inv

__all__ = ["LAYERS", "METHODS", "Evaluation", "Layer", "Make", "p4inv"]

Map = Callable[[Tensor], tuple[Tensor, Tensor]]
Evaluation = Callable[[Tensor], object]


class Layer(NamedTuple):
    """A layer and its directions, each to values and log|det|; the inverse is None if it has none."""

    module: nn.Module
    forward: Map
    inverse: Map | None


Make = Callable[[int, torch.device], Layer]


def p4inv(rank: int | None) -> Make:
    """What makes a P4Inv of this rank, None for its default."""

    def make(n: int, device: torch.device) -> Layer:
        if rank is not None and rank > n:
            raise ValueError(f"rank {rank} is larger than the width")
        layer = P4Inv(n, rank, device=device)
        return Layer(layer, layer, layer.inverse)

    return make


def _invertible_linear(n: int, device: torch.device) -> Layer:
    layer = InvertibleLinear(n, device=device)
    return Layer(layer, layer, layer.inverse)


def _linear(n: int, device: torch.device) -> Layer:
    layer = nn.Linear(n, n, device=device)
    return Layer(layer, lambda x: (layer(x), x.new_zeros(())), None)


class _Dense(nn.Module):
    """A plain weight; log|det|, inverse and solution by LU."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linalg.qr(torch.randn(n, n)).Q)
        self.bias = nn.Parameter(torch.zeros(n))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return nn.functional.linear(x, self.weight, self.bias), torch.linalg.slogdet(self.weight).logabsdet

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x = (y - self.bias) @ torch.linalg.inv(self.weight).T
        return x, -torch.linalg.slogdet(self.weight).logabsdet

    def solve(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.linalg.solve(self.weight, (y - self.bias).T).T
        return x, -torch.linalg.slogdet(self.weight).logabsdet


def _dense(inverse: str) -> Make:
    def make(n: int, device: torch.device) -> Layer:
        layer = _Dense(n).to(device)
        return Layer(layer, layer, getattr(layer, inverse))

    return make


def _geotorch(n: int, device: torch.device) -> Layer:
    import geotorch

    layer = _Dense(n).to(device)
    geotorch.invertible(layer, "weight")
    with torch.no_grad():
        layer.weight = torch.eye(n, device=device)
    return Layer(layer, layer, layer.solve)


def _nflows(name: str, **options: Any) -> Make:
    def make(n: int, device: torch.device) -> Layer:
        from nflows import transforms

        if name in ("QRLinear", "SVDLinear"):
            if n > 1024:
                raise MemoryError("autograd keeps the batch once for each of n reflections: tens of GiB")
            options["num_householder"] = n - n % 2  # the full group
        layer = getattr(transforms, name)(n, **options).to(device)
        return Layer(layer, layer, layer.inverse)

    return make


def _normflows(n: int, device: torch.device) -> Layer:
    """Its inverse goes from data to noise, as everyone else's forward direction."""
    from normflows.flows import LULinearPermute

    layer = LULinearPermute(n).to(device)
    return Layer(layer, layer.inverse, layer)


def _zuko(n: int, device: torch.device) -> Layer:
    from zuko.transforms import LULinearTransform

    layer = nn.ParameterDict({"LU": torch.eye(n) + 0.01 * torch.randn(n, n) / n**0.5}).to(device)

    def apply(x: Tensor) -> tuple[Tensor, Tensor]:
        return LULinearTransform(layer["LU"]).call_and_ladj(x)

    def invert(y: Tensor) -> tuple[Tensor, Tensor]:
        return LULinearTransform(layer["LU"]).inv.call_and_ladj(y)

    return Layer(layer, apply, invert)


def _bgflow(n: int, device: torch.device) -> Layer:
    from bgflow import InvertiblePPPP

    layer = InvertiblePPPP(n, penalty_parameter=0.0).to(device)
    return Layer(layer, layer, lambda y: layer(y, inverse=True))


_OURS: dict[str, Make] = {
    "P4Inv rank 1": p4inv(1),
    "P4Inv rank 8": p4inv(8),
    "InvertibleLinear": _invertible_linear,
}
_PEERS: dict[str, Make] = {
    "nn.Linear": _linear,
    "dense inv": _dense("inverse"),
    "dense solve": _dense("solve"),
    "bgflow InvertiblePPPP": _bgflow,
    "nflows LULinear": _nflows("LULinear", identity_init=True),
    "nflows QRLinear": _nflows("QRLinear"),
    "nflows SVDLinear": _nflows("SVDLinear"),
    "nflows NaiveLinear": _nflows("NaiveLinear"),
    "geotorch GLp": _geotorch,
    "normflows LULinearPermute": _normflows,
    "zuko LULinearTransform": _zuko,
}
LAYERS = {**_OURS, **_PEERS}


def _evaluations(make: Make) -> Callable[[int, torch.device], tuple[Evaluation, Evaluation]]:
    def make_both(n: int, device: torch.device) -> tuple[Evaluation, Evaluation]:
        module, forward, inverse = make(n, device)
        for name, parameter in module.named_parameters():
            if name in ("U", "u"):  # perturbations are zero only at the start, and after a merge
                nn.init.normal_(parameter, std=0.01)
        return _evaluation(module, forward), _evaluation(module, inverse or forward)

    return make_both


def _evaluation(module: nn.Module, apply: Map) -> Evaluation:
    parameters = list(module.parameters())

    def evaluate(x: Tensor) -> None:
        for parameter in parameters:
            parameter.grad = None
        y, logabsdet = apply(x.detach().requires_grad_())
        (y.square().sum() / 2 - logabsdet.sum()).backward()

    return evaluate


def _limit(n: int, device: torch.device) -> tuple[Evaluation, Evaluation]:
    A, u = torch.randn(n, n, device=device), torch.randn(n, device=device)

    def evaluate(x: Tensor) -> tuple[Tensor, ...]:
        return x @ A.T, x @ A, A @ u, u @ A

    return evaluate, evaluate


# In both directions.
METHODS: dict[str, Callable[[int, torch.device], tuple[Evaluation, Evaluation]]] = {
    **{name: _evaluations(make) for name, make in _OURS.items()},
    "limit": _limit,
    **{name: _evaluations(make) for name, make in _PEERS.items()},
}

"""One training evaluation (value, log-det, backward) of every linear layer that is compared, in both directions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from p4flows import InvertibleLinear, P4Inv

__all__ = ["METHODS", "Evaluation"]

Evaluation = Callable[[Tensor], object]


def _training(layer: nn.Module, apply: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Evaluation:
    parameters = list(layer.parameters())

    def evaluate(x: Tensor) -> None:
        for parameter in parameters:
            parameter.grad = None
        y, logabsdet = apply(x.detach().requires_grad_())
        (y.square().sum() / 2 - logabsdet.sum()).backward()

    return evaluate


def _p4inv(rank: int) -> Callable[[int, torch.device], tuple[Evaluation, Evaluation]]:
    def make(n: int, device: torch.device) -> tuple[Evaluation, Evaluation]:
        if rank > n:
            raise ValueError(f"rank {rank} is larger than the width")
        layer = P4Inv(n, rank, device=device)
        nn.init.normal_(layer.U, std=0.01)
        return _training(layer, layer), _training(layer, layer.inverse)

    return make


def _invertible_linear(n: int, device: torch.device) -> tuple[Evaluation, Evaluation]:
    layer = InvertibleLinear(n, device=device)
    return _training(layer, layer), _training(layer, layer.inverse)


def _limit(n: int, device: torch.device) -> tuple[Evaluation, Evaluation]:
    A, u = torch.randn(n, n, device=device), torch.randn(n, device=device)

    def evaluate(x: Tensor) -> tuple[Tensor, ...]:
        return x @ A.T, x @ A, A @ u, u @ A

    return evaluate, evaluate


def _linear(n: int, device: torch.device) -> tuple[Evaluation, Evaluation]:
    layer = nn.Linear(n, n, device=device)
    evaluation = _training(layer, lambda x: (layer(x), x.new_zeros(())))
    return evaluation, evaluation


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


def _dense(inverse: str) -> Callable[[int, torch.device], tuple[Evaluation, Evaluation]]:
    def make(n: int, device: torch.device) -> tuple[Evaluation, Evaluation]:
        layer = _Dense(n).to(device)
        return _training(layer, layer), _training(layer, getattr(layer, inverse))

    return make


def _geotorch(n: int, device: torch.device) -> tuple[Evaluation, Evaluation]:
    import geotorch

    layer = _Dense(n).to(device)
    geotorch.invertible(layer, "weight")
    with torch.no_grad():
        layer.weight = torch.eye(n, device=device)
    return _training(layer, layer), _training(layer, layer.solve)


def _nflows(name: str, **options: int) -> Callable[[int, torch.device], tuple[Evaluation, Evaluation]]:
    def make(n: int, device: torch.device) -> tuple[Evaluation, Evaluation]:
        from nflows import transforms

        if name in ("QRLinear", "SVDLinear"):
            if n > 1024:
                raise MemoryError("autograd keeps the batch once for each of n reflections: tens of GiB")
            options["num_householder"] = n - n % 2  # the full group
        layer = getattr(transforms, name)(n, **options).to(device)
        return _training(layer, layer), _training(layer, layer.inverse)

    return make


def _normflows(n: int, device: torch.device) -> tuple[Evaluation, Evaluation]:
    from normflows.flows import LULinearPermute

    layer = LULinearPermute(n).to(device)
    return _training(layer, layer.inverse), _training(layer, layer)


def _zuko(n: int, device: torch.device) -> tuple[Evaluation, Evaluation]:
    from zuko.transforms import LULinearTransform

    layer = nn.ParameterDict({"LU": torch.eye(n) + 0.01 * torch.randn(n, n) / n**0.5}).to(device)

    def apply(x: Tensor) -> tuple[Tensor, Tensor]:
        return LULinearTransform(layer["LU"]).call_and_ladj(x)

    def invert(y: Tensor) -> tuple[Tensor, Tensor]:
        return LULinearTransform(layer["LU"]).inv.call_and_ladj(y)

    return _training(layer, apply), _training(layer, invert)


def _bgflow(n: int, device: torch.device) -> tuple[Evaluation, Evaluation]:
    from bgflow import InvertiblePPPP

    layer = InvertiblePPPP(n, penalty_parameter=0.0).to(device)
    nn.init.normal_(layer.u, std=0.01)
    return _training(layer, layer), _training(layer, lambda y: layer(y, inverse=True))


METHODS: dict[str, Callable[[int, torch.device], tuple[Evaluation, Evaluation]]] = {
    "P4Inv rank 1": _p4inv(1),
    "P4Inv rank 8": _p4inv(8),
    "InvertibleLinear": _invertible_linear,
    "limit": _limit,
    "nn.Linear": _linear,
    "dense inv": _dense("inverse"),
    "dense solve": _dense("solve"),
    "bgflow InvertiblePPPP": _bgflow,
    "nflows LULinear": _nflows("LULinear"),
    "nflows QRLinear": _nflows("QRLinear"),
    "nflows SVDLinear": _nflows("SVDLinear"),
    "nflows NaiveLinear": _nflows("NaiveLinear"),
    "geotorch GLp": _geotorch,
    "normflows LULinearPermute": _normflows,
    "zuko LULinearTransform": _zuko,
}

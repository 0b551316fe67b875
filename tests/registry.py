"""Every invertible layer, by name: a constructor that takes dtype and seed. The harness runs over all of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import p4flows
from p4flows import BentIdentity, Inverse, InvertibleLinear, MergeScheduler, P4Inv, P4InvStack, P4Layer
from p4flows.layers.perturbed import PerturbedInverse

N = 6
PERMUTATION = torch.tensor([2, 0, 1, 5, 3, 4])


def matrix(n: int, seed: int = 0) -> Tensor:
    """A well-conditioned matrix with a negative determinant."""
    generator = torch.Generator().manual_seed(seed)
    M = torch.eye(n, dtype=torch.float64) + 0.3 * torch.randn(n, n, generator=generator, dtype=torch.float64)
    M[0] *= -1
    return M


def _p4inv(cls: type = P4Inv, **options) -> Callable[..., nn.Module]:
    return lambda **more: cls(N, **{"seed": 7, **options, **more})


def _activation(cls: type) -> Callable[..., nn.Module]:
    return lambda dtype=None, device=None: cls()


class WideP4InvStack(P4InvStack):
    """Layer by layer, as wide stacks are run."""

    narrow = 0


class _Leaky(nn.Module):
    """A bijection with a parameter, and without formulas for its slope."""

    def __init__(self) -> None:
        super().__init__()
        self.log_slope = nn.Parameter(torch.tensor(-0.3, dtype=torch.float64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a = torch.where(x > 0, 0, self.log_slope.to(x))
        return x * a.exp(), a.sum(-1)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        a = -torch.where(y > 0, 0, self.log_slope.to(y))
        return y * a.exp(), a.sum(-1)


def _dense(cls: type = InvertibleLinear, **options) -> Callable[..., nn.Module]:
    return lambda **more: cls(N, **{"seed": 7, **options, **more})


LAYERS: dict[str, Callable[..., nn.Module]] = {
    "P4Inv": _p4inv(),
    "P4Inv-rank3": _p4inv(rank=3),
    "P4Inv-rank-n": _p4inv(rank=N),
    "P4Inv-no-bias": _p4inv(bias=False),
    "P4Inv-reverse": _p4inv(init="reverse"),
    "P4Inv-orthogonal": _p4inv(init="orthogonal", rank=2),
    "P4Inv-permutation": _p4inv(init=PERMUTATION),
    "P4Inv-matrix": _p4inv(init=matrix(N)),
    "InvertibleLinear": _dense(),
    "InvertibleLinear-rank2": _dense(rank=2, init=matrix(N)),
    "InvertibleLinear-no-bias": _dense(bias=False, init="reverse", rank=1),
    "P4InvStack": lambda **more: P4InvStack(N, 5, **{"seed": 7, **more}),
    "P4InvStack-1": lambda **more: P4InvStack(N, 1, 2, False, "orthogonal", **{"seed": 7, **more}),
    "P4InvStack-wide": lambda **more: WideP4InvStack(N, 3, 2, **{"seed": 7, **more}),
    "P4InvStack-plain": lambda **more: P4InvStack(N, 4, activations=[_Leaky()], **{"seed": 7, **more}),
    "Inverse": lambda dtype=None, device=None: Inverse(BentIdentity()),
    "BentIdentity": _activation(p4flows.BentIdentity),
}

try:
    import p4flows.nflows
except ImportError:
    pass
else:
    LAYERS["nflows.P4InvLinear"] = _p4inv(p4flows.nflows.P4InvLinear, rank=2)
    LAYERS["nflows.InvertibleLinear"] = _dense(p4flows.nflows.InvertibleLinear, init=PERMUTATION)
    LAYERS["nflows.BentIdentity"] = _activation(p4flows.nflows.BentIdentity)

try:
    import bgflow

    import p4flows.bgflow
except ImportError:
    BGFLOW = False
else:
    BGFLOW = True
    LAYERS["bgflow.P4InvFlow"] = _p4inv(p4flows.bgflow.P4InvFlow, rank=2)
    LAYERS["bgflow.BentIdentityFlow"] = _activation(p4flows.bgflow.BentIdentityFlow)
    LAYERS["bgflow.P4InvSwap"] = lambda **more: p4flows.bgflow.P4InvSwap(2, N - 2, **{"seed": 7, **more})


def apply(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The forward direction of any framework's layer, on whole vectors, log|det| (...)."""
    return _flow(layer, x, False) if BGFLOW and isinstance(layer, bgflow.Flow) else layer(x)


def invert(layer: nn.Module, y: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse direction of any framework's layer, on whole vectors, log|det| (...)."""
    return _flow(layer, y, True) if BGFLOW and isinstance(layer, bgflow.Flow) else layer.inverse(y)


def _flow(flow: nn.Module, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    channels = [x]
    if isinstance(flow, p4flows.bgflow.P4InvSwap) and isinstance(x, Tensor):
        first = flow.dim1 if inverse else flow.dim0
        channels = [x[..., :first], x[..., first:]]
    *y, dlogp = flow(*channels, inverse=inverse)
    assert dlogp.shape == (*y[0].shape[:-1], 1)
    return torch.cat(y, -1), dlogp[..., 0]


def perturb(layer: nn.Module, scale: float = 0.1) -> nn.Module:
    """Put noise on U and the bias, so that nothing is at its special starting value."""
    with torch.no_grad():
        for module in layer.modules():
            if isinstance(module, PerturbedInverse):
                module.U.normal_(std=scale)
            if isinstance(module, InvertibleLinear):
                module.weight.add_(scale * torch.randn_like(module.weight))
            if isinstance(module, P4Layer) and module.bias is not None:
                module.bias.normal_()
    return layer


def train(layer: nn.Module, steps: int = 40) -> nn.Module:
    """Maximum likelihood and the reverse direction on random data, with merges; leaves a live perturbation."""
    parameters = [p for p in layer.parameters() if p.requires_grad]
    if not parameters:
        return layer
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    scheduler = MergeScheduler(layer, optimizer, every=7, force_every=2, correct_every=3)
    mixing = matrix(N, 1).to(parameters[0].dtype)
    for _ in range(steps):
        optimizer.zero_grad()
        data = torch.randn(32, N, dtype=mixing.dtype) @ mixing
        z, logabsdet = apply(layer, data)
        x, inverse_logabsdet = invert(layer, torch.randn_like(data))
        (z.square().sum(-1) / 2 - logabsdet + x.square().sum(-1) / 20 - 0.1 * inverse_logabsdet).mean().backward()
        optimizer.step()
        scheduler.step()
    if steps >= 14:
        assert scheduler.counters["merged"] + scheduler.counters["forced"] >= 2
    return layer


STATES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "new": lambda layer: layer,
    "perturbed": perturb,
    "trained": train,
}

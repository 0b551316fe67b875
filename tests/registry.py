"""Every layer, by name: a constructor that takes its width n, dtype and seed. The harnesses run over all of them.

A new implementation of the P4 contract takes one line: in LAYERS if it is invertible, otherwise in OTHER_LAYERS.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import p4flows
from p4flows import (
    BentIdentity,
    Inverse,
    InvertibleLinear,
    MergeScheduler,
    P4Conv2d,
    P4Inv,
    P4InvStack,
    P4Layer,
    P4Linear,
    P4Lipschitz,
    P4Orthogonal,
)

N = 6
PERMUTATION = torch.tensor([2, 0, 1, 5, 3, 4])


def matrix(n: int, seed: int = 0) -> Tensor:
    """The identity and noise, with the first row turned around."""
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(seed)
        M = torch.eye(n, dtype=torch.float64) + 0.3 * torch.randn(n, n, generator=generator, dtype=torch.float64)
    M[0] *= -1
    return M


def _layer(cls: type, **options) -> Callable[..., nn.Module]:
    """A layer of width n; a rank beyond that is n, and what depends on the width is a function of it."""

    def make(n: int = N, **more) -> nn.Module:
        at_width = {name: value(n) if callable(value) else value for name, value in options.items()}
        if "rank" in options:
            at_width["rank"] = min(at_width["rank"], n)
        return cls(n, **{"seed": 7, **at_width, **more})

    return make


def _permutation(n: int) -> Tensor:
    return PERMUTATION if n == N else torch.arange(n, device="cpu").roll(1)


def _input(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(shape[-1]), device="cpu")


def _activation(cls: type) -> Callable[..., nn.Module]:
    return lambda n=N, dtype=None, device=None: cls()


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


LAYERS: dict[str, Callable[..., nn.Module]] = {
    "P4Inv": _layer(P4Inv),
    "P4Inv-rank1": _layer(P4Inv, rank=1),
    "P4Inv-rank3": _layer(P4Inv, rank=3),
    "P4Inv-no-bias": _layer(P4Inv, bias=False),
    "P4Inv-rank1-no-bias": _layer(P4Inv, rank=1, bias=False, init="reverse"),
    "P4Inv-reverse": _layer(P4Inv, init="reverse"),
    "P4Inv-orthogonal": _layer(P4Inv, init="orthogonal", rank=2),
    "P4Inv-permutation": _layer(P4Inv, init=_permutation),
    "P4Inv-matrix": _layer(P4Inv, init=matrix),
    "InvertibleLinear": _layer(InvertibleLinear),
    "InvertibleLinear-rank1": _layer(InvertibleLinear, rank=1, init="orthogonal"),
    "InvertibleLinear-rank2": _layer(InvertibleLinear, rank=2, init=matrix),
    "InvertibleLinear-no-bias": _layer(InvertibleLinear, bias=False, init="reverse"),
    "P4InvStack": _layer(P4InvStack, depth=5),
    "P4InvStack-rank1": _layer(P4InvStack, depth=5, rank=1),
    "P4InvStack-1": _layer(P4InvStack, depth=1, rank=2, bias=False, init="orthogonal"),
    "P4InvStack-wide": _layer(WideP4InvStack, depth=3, rank=2),
    "P4InvStack-wide-rank1": _layer(WideP4InvStack, depth=3, rank=1),
    "P4InvStack-plain": _layer(P4InvStack, depth=4, activations=lambda n: [_Leaky()]),
    "P4Orthogonal": _layer(P4Orthogonal),
    "P4Orthogonal-rank1": _layer(P4Orthogonal, rank=1, init=_permutation),
    "P4Orthogonal-rank5": _layer(P4Orthogonal, rank=5, init="orthogonal"),
    "Inverse": lambda n=N, dtype=None, device=None: Inverse(BentIdentity()),
    "BentIdentity": _activation(BentIdentity),
}

try:
    import p4flows.nflows
except ImportError:
    pass
else:
    LAYERS["nflows.P4InvLinear"] = _layer(p4flows.nflows.P4InvLinear, rank=2)
    LAYERS["nflows.InvertibleLinear"] = _layer(p4flows.nflows.InvertibleLinear, init=_permutation)
    LAYERS["nflows.P4OrthogonalLinear"] = _layer(p4flows.nflows.P4OrthogonalLinear, init=_permutation)
    LAYERS["nflows.BentIdentity"] = _activation(p4flows.nflows.BentIdentity)

try:
    import bgflow

    import p4flows.bgflow
except ImportError:
    BGFLOW = False
else:
    BGFLOW = True
    LAYERS["bgflow.P4InvFlow"] = _layer(p4flows.bgflow.P4InvFlow, rank=2)
    LAYERS["bgflow.InvertibleLinearFlow"] = _layer(p4flows.bgflow.InvertibleLinearFlow, init=_permutation)
    LAYERS["bgflow.P4OrthogonalFlow"] = _layer(p4flows.bgflow.P4OrthogonalFlow, init=_permutation)
    LAYERS["bgflow.BentIdentityFlow"] = _activation(p4flows.bgflow.BentIdentityFlow)
    for name, swap in (
        ("bgflow.P4InvSwap", p4flows.bgflow.P4InvSwap),
        ("bgflow.InvertibleSwap", p4flows.bgflow.InvertibleSwap),
        ("bgflow.P4OrthogonalSwap", p4flows.bgflow.P4OrthogonalSwap),
    ):
        LAYERS[name] = lambda n=N, swap=swap, **more: swap(n // 3, n - n // 3, **{"seed": 7, **more})

try:
    import p4flows.normflows
except ImportError:
    pass
else:
    LAYERS["normflows.P4InvLinear"] = _layer(p4flows.normflows.P4InvLinear, rank=2)
    LAYERS["normflows.InvertibleLinear"] = _layer(p4flows.normflows.InvertibleLinear, init=_permutation)

OTHER_LAYERS: dict[str, tuple[Callable[[], P4Layer], Tensor]] = {
    "P4Linear": (lambda: P4Linear(7, 3, seed=7), _input(5, 7)),
    "P4Linear-rank3": (lambda: P4Linear(3, 7, 3, seed=7), _input(5, 3)),
    "P4Conv2d": (lambda: P4Conv2d(2, 4, 3, rank=2, seed=7), _input(2, 2, 5, 5)),
    "P4Lipschitz": (lambda: P4Lipschitz(6, 4, 0.7, seed=7), _input(5, 6)),
    "P4Lipschitz-rank1": (lambda: P4Lipschitz(4, 6, 2.0, rank=1, seed=7, dtype=torch.float64), _input(5, 4)),
}
"""Implementations of the P4 contract that have no inverse: a constructor, and an input."""


def contract_cases() -> dict[str, tuple[Callable[[], P4Layer], Tensor | tuple[Tensor, ...]]]:
    """Every implementation of the P4 contract, by name: a constructor, and an input."""
    found = {}
    for name, make in LAYERS.items():
        layer = make(N)
        if isinstance(layer, P4Layer):
            parts = (layer.dim0, layer.dim1) if hasattr(layer, "dim0") else (N,)
            channels = tuple(_input(5, part) for part in parts)
            found[name] = lambda make=make: make(N, dtype=torch.float64), channels
            if name in ("P4Inv", "InvertibleLinear", "P4InvStack", "P4Orthogonal"):
                found[f"{name} of width one"] = lambda make=make: make(1, dtype=torch.float64), _input(5, 1)
    return found | OTHER_LAYERS


# A swap of one feature has nothing to swap, and orthogonal matrices of one entry, -1 and 1, nothing to train.
CASES = [(name, n) for n in (N, 1) for name in LAYERS if n > 1 or not ("Swap" in name or "Orthogonal" in name)]
"""Every layer of LAYERS at its usual width, and at width one."""


def apply(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The forward direction of any framework's layer, on whole vectors, log|det| (...)."""
    return _flow(layer, x, False) if BGFLOW and isinstance(layer, bgflow.Flow) else layer(x)


def invert(layer: nn.Module, y: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse direction of any framework's layer, on whole vectors, log|det| (...)."""
    return _flow(layer, y, True) if BGFLOW and isinstance(layer, bgflow.Flow) else layer.inverse(y)


def _flow(flow: nn.Module, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    channels = [x]
    if hasattr(flow, "dim0") and isinstance(x, Tensor):
        first = flow.dim1 if inverse else flow.dim0
        channels = [x[..., :first], x[..., first:]]
    *y, dlogp = flow(*channels, inverse=inverse)
    assert dlogp.shape == (*y[0].shape[:-1], 1)
    return torch.cat(y, -1), dlogp[..., 0]


def perturb(layer: nn.Module, scale: float = 0.1) -> nn.Module:
    """Put noise on the perturbation and the bias, so that nothing is at its special starting value."""
    with torch.no_grad():
        for module in layer.modules():
            if isinstance(module, P4Layer):
                redrawn = {id(p) for p in module.redrawn}
                for p in module.perturbation:
                    if id(p) not in redrawn:
                        p.add_(scale * torch.randn_like(p))
                if module.bias is not None:
                    module.bias.normal_()
    return layer


def width(layer: nn.Module) -> int:
    """That of its linear layers, or the usual one."""
    return next((module.features for module in layer.modules() if isinstance(module, P4Layer)), N)


def train(layer: nn.Module, steps: int = 40) -> nn.Module:
    """Maximum likelihood and the reverse direction on random data, with merges; leaves a live perturbation."""
    parameters = [p for p in layer.parameters() if p.requires_grad]
    if not parameters:
        return layer
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    scheduler = MergeScheduler(layer, optimizer, every=7, force_every=2, correct_every=3)
    n = width(layer)
    mixing = matrix(n, 1).to(parameters[0].dtype)
    for _ in range(steps):
        optimizer.zero_grad()
        data = torch.randn(32, n, dtype=mixing.dtype) @ mixing
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

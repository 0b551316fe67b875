"""A flow of rational-quadratic splines over mixed coordinates that keeps dihedrals which turn on their circle."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from nflows.distributions import Distribution
from nflows.flows import Flow
from nflows.nn.nets import ResidualNet
from nflows.transforms import CompositeTransform, Permutation, Transform
from torch import Tensor, nn
from zuko.transforms import MonotonicRQSTransform

from benchmarks.molecules.turning import turning
from p4flows.molecules import MixedCoordinates
from p4flows.molecules.spread import wrap
from p4flows.nflows import InvertibleLinear, P4InvLinear

__all__ = ["MIXES", "NormalAndUniform", "Part", "SplineCoupling", "circular_flow"]

_BINS, _TAIL = 12, 6.0  # on standardised coordinates

# What stands between two couplings, made of a permutation and a seed.
MIXES = {
    "reversed": lambda order, seed: Permutation(torch.arange(len(order)).flip(0)),
    "random": lambda order, seed: Permutation(order),
    "P4Inv": lambda order, seed: P4InvLinear(len(order), init=order, seed=seed),
    "InvertibleLinear": lambda order, seed: InvertibleLinear(len(order), init=order, seed=seed),
}


class Part(Transform):
    """A transform of some of the features, by their indices; the others stay as they are."""

    def __init__(self, transform: Transform, indices: Tensor, features: int) -> None:
        super().__init__()
        self.transform = transform
        others = torch.ones(features, dtype=torch.bool)
        others[indices] = False
        order = torch.cat([indices, others.nonzero().flatten()])
        self.count = len(indices)
        self.register_buffer("order", order)
        self.register_buffer("back", order.argsort())

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._apply_to_part(inputs, self.transform)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._apply_to_part(inputs, self.transform.inverse)

    def _apply_to_part(self, inputs: Tensor, function: nn.Module) -> tuple[Tensor, Tensor]:
        ordered = inputs[:, self.order]
        outputs, logabsdet = function(ordered[:, : self.count])
        return torch.cat([outputs, ordered[:, self.count :]], -1)[:, self.back], logabsdet


class _ToCircle(Transform):
    """Angles between ``low`` and ``high`` in units of z, to the circle [-π, π)."""

    def __init__(self, low: Tensor, high: Tensor) -> None:
        super().__init__()
        self.register_buffer("middle", (low + high) / 2)
        self.register_buffer("scale", 2 * math.pi / (high - low))

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return (inputs - self.middle) * self.scale, self.scale.log().sum().expand(len(inputs))

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return inputs / self.scale + self.middle, -self.scale.log().sum().expand(len(inputs))


class SplineCoupling(Transform):
    r"""Splines of Durkan et al. 2019 on the second half of the features, and on every other one of the last, angles.

    On the angles they are circular (Rezende et al. 2020): a rotation by a trained angle, and a spline of [-π, π] onto
    itself whose slope is one at both ends. The parameters of all splines come from a residual network of the features
    that stay as they are, of which angles enter by cosine and sine.

    Args:
        plain: number of features that are no angles, and come first.
        angles: number of angles, which come last.
        parity: 0 or 1; the angles whose number among them has it are transformed.
        hidden: width of the network.
        compiled: whether it runs compiled, for each size of batch anew. One coupling is one graph, the same for all of
            a flow; that of a whole flow takes minutes to make, and is no faster.
    """

    def __init__(self, plain: int, angles: int, parity: int, hidden: int = 96, compiled: bool = False) -> None:
        super().__init__()
        self.sizes = (plain // 2, plain - plain // 2, angles)
        numbers = torch.arange(angles)
        turned = numbers % 2 == parity
        self.register_buffer("turned", numbers[turned])
        self.register_buffer("kept", numbers[~turned])
        self.register_buffer("back", torch.cat([self.kept, self.turned]).argsort())
        self.rotation = nn.Parameter(torch.zeros(len(self.turned)))
        outputs = self.sizes[1] + len(self.turned)
        self.net = ResidualNet(self.sizes[0] + 2 * len(self.kept), outputs * (3 * _BINS - 1), hidden_features=hidden)
        # As in nflows: the outputs of a wide network are large at the start, and would make rugged splines.
        self.scale = 1 / math.sqrt(hidden)
        self.compiled = compiled

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._fast(SplineCoupling._forward)(self, inputs)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._fast(SplineCoupling._inverse)(self, inputs)

    def _fast(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return _compiled(function) if self.compiled else function

    def _forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        first, second, angles = inputs.split(self.sizes, -1)
        kept, turned = angles[:, self.kept], angles[:, self.turned]
        spline, circular = self._splines(first, kept)
        second, logabsdet = spline.call_and_ladj(second)
        turned, of_angles = circular.call_and_ladj(wrap(turned + self.rotation, -math.pi))
        return self._joined(first, second, kept, turned), logabsdet.sum(-1) + of_angles.sum(-1)

    def _inverse(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        first, second, angles = inputs.split(self.sizes, -1)
        kept, turned = angles[:, self.kept], angles[:, self.turned]
        spline, circular = self._splines(first, kept)
        second, turned = spline.inv(second), circular.inv(turned)
        logabsdet = spline.call_and_ladj(second)[1].sum(-1) + circular.call_and_ladj(turned)[1].sum(-1)
        return self._joined(first, second, kept, wrap(turned - self.rotation, -math.pi)), -logabsdet

    def _splines(self, first: Tensor, kept: Tensor) -> tuple[MonotonicRQSTransform, MonotonicRQSTransform]:
        parameters = self.net(torch.cat([first, kept.cos(), kept.sin()], -1)).unflatten(-1, (-1, 3 * _BINS - 1))
        widths, heights, slopes = parameters.split((_BINS, _BINS, _BINS - 1), -1)
        parts = zip(
            *(part.split((self.sizes[1], len(self.turned)), 1) for part in (widths, heights, slopes)), strict=True
        )
        plain, circular = (
            partial(MonotonicRQSTransform, width * self.scale, height * self.scale, slope)
            for width, height, slope in parts
        )
        return plain(bound=_TAIL), circular(bound=math.pi)

    def _joined(self, first: Tensor, second: Tensor, kept: Tensor, turned: Tensor) -> Tensor:
        return torch.cat([first, second, torch.cat([kept, turned], -1)[:, self.back]], -1)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


class NormalAndUniform(Distribution):
    """Normal of mean zero over the first features, with one standard deviation, and uniform over ``angles`` last.

    With the standard deviation √(T'/T) a flow that is right at T, and nearly linear, is nearly right at T'.
    """

    def __init__(self, plain: int, angles: int) -> None:
        super().__init__()
        self.sizes = (plain, angles)
        self.register_buffer("deviation", torch.ones(()))

    def _log_prob(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        plain, angles = self.sizes
        squares = (inputs[:, :plain] / self.deviation).square().sum(-1)
        constant = plain * (self.deviation.log() + math.log(2 * math.pi) / 2) + angles * math.log(2 * math.pi)
        return -squares / 2 - constant

    def draw(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        plain, angles = self.sizes
        normal = torch.randn(count, plain, generator=generator) * self.deviation
        return torch.cat([normal, (2 * torch.rand(count, angles, generator=generator) - 1) * math.pi], -1)

    def _sample(self, num_samples: int, context: Tensor | None = None) -> Tensor:
        return self.draw(num_samples)


def circular_flow(
    coordinates: MixedCoordinates,
    couplings: int,
    mix: str,
    circular: bool = True,
    hidden: int = 96,
    seed: int = 0,
    compiled: bool = False,
) -> Flow:
    """Spline couplings, each followed by one of MIXES over what is no angle; torsions that turn are circular, or cut.

    The permutation from which a learned swap starts is the random one of the same seed.
    """
    generator = torch.Generator().manual_seed(seed)
    n, torsions = coordinates.n_coordinates, coordinates.torsions
    which = turning(coordinates) if circular else torch.arange(0)
    angles = torsions.indices[which]
    others = torch.ones(n, dtype=torch.bool)
    others[angles] = False
    plain = n - len(angles)
    transforms: list[nn.Module] = [Permutation(torch.cat([others.nonzero().flatten(), angles]))]
    transforms.append(Part(_ToCircle(torsions.low[which], torsions.high[which]), torch.arange(plain, n), n))
    torch.manual_seed(seed)
    for i in range(couplings):
        swap = MIXES[mix](torch.randperm(plain, generator=generator), seed + i)
        transforms += [SplineCoupling(plain, len(angles), i % 2, hidden, compiled), Part(swap, torch.arange(plain), n)]
    return Flow(CompositeTransform(transforms), NormalAndUniform(plain, len(angles)))

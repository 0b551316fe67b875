"""A flow of rational-quadratic spline couplings, made of nflows parts: what resolves the basins of a small molecule."""

from __future__ import annotations

import torch.nn.functional as F
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from nflows.nn.nets import ResidualNet
from nflows.transforms import (
    CompositeTransform,
    PiecewiseRationalQuadraticCouplingTransform,
    RandomPermutation,
)
from nflows.utils import create_mid_split_binary_mask
from torch import nn

__all__ = ["spline_flow"]

_BINS, _TAIL = 12, 6.0  # on standardised coordinates


def spline_flow(features: int, couplings: int, hidden: int = 96) -> Flow:
    """Couplings of Durkan et al. 2019 (arXiv:1906.04032) with linear tails, a random permutation after each.

    The parameters of the splines of one half are those of residual networks of the other half.
    """

    def net(inputs: int, outputs: int) -> nn.Module:
        return ResidualNet(inputs, outputs, hidden_features=hidden, activation=F.relu)

    transforms: list[nn.Module] = []
    for _ in range(couplings):
        mask = create_mid_split_binary_mask(features)
        coupling = PiecewiseRationalQuadraticCouplingTransform(mask, net, _BINS, tails="linear", tail_bound=_TAIL)
        transforms += [coupling, RandomPermutation(features)]
    return Flow(CompositeTransform(transforms), StandardNormal([features]))

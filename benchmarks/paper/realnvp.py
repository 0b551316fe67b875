"""The RealNVP of Appendix H and Figure 9, made of nflows parts."""

from __future__ import annotations

import torch
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from nflows.transforms import AffineCouplingTransform, CompositeTransform, ReversePermutation
from nflows.utils import create_mid_split_binary_mask
from torch import Tensor, nn

__all__ = ["Coupling", "real_nvp"]


class _Conditioner(nn.Module):
    """Shift t with ReLU and log-scale s with tanh, two hidden layers each; both from the same input."""

    def __init__(self, inputs: int, outputs: int, hidden: int) -> None:
        super().__init__()
        self.t, self.s = (
            nn.Sequential(
                nn.Linear(inputs, hidden), act(), nn.Linear(hidden, hidden), act(), nn.Linear(hidden, outputs // 2)
            )
            for act in (nn.ReLU, nn.Tanh)
        )
        self.log_alpha = nn.Parameter(-torch.ones(1))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return torch.cat([self.t(x), self.log_alpha.exp() * torch.tanh(self.s(x))], -1)


class Coupling(AffineCouplingTransform):
    """``y2 = x2 exp(α tanh s(x1)) + t(x1)``; nflows' own scale is a sigmoid, which can only contract."""

    def __init__(self, features: int, hidden: int = 60) -> None:
        super().__init__(
            create_mid_split_binary_mask(features), lambda inputs, outputs: _Conditioner(inputs, outputs, hidden)
        )

    def _scale_and_shift(self, transform_params: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = transform_params.chunk(2, -1)
        return log_scale.exp(), shift


def real_nvp(features: int, couplings: int, hidden: int = 60) -> Flow:
    """Couplings with a reversed permutation after each, on a standard normal distribution.

    With 60 features and 50 couplings it has the paper's 735,050 parameters.
    """
    transforms: list[nn.Module] = []
    for _ in range(couplings):
        transforms += [Coupling(features, hidden), ReversePermutation(features)]
    return Flow(CompositeTransform(transforms), StandardNormal([features]))

"""Finished layers as plain ``nn.Linear`` modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["as_linear"]


@torch.no_grad()
def as_linear(layer: Any, M: Tensor, inverse: bool = False) -> nn.Linear:
    """``y = M x + b``, b the layer's bias, or its inverse, as an ``nn.Linear`` of the layer's dtype without gradients.

    M (n, n) in float64; for the inverse it is inverted in float64.
    """
    if inverse:
        M = torch.linalg.inv(M)
    n = layer.features
    linear = nn.Linear(n, n, layer.bias is not None, layer.A.device, layer.A.dtype)
    linear.weight.copy_(M)
    if layer.bias is not None:
        bias = layer.bias.double()
        linear.bias.copy_(-(M @ bias) if inverse else bias)
    return linear.requires_grad_(False).train(layer.training)

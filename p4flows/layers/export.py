"""Finished layers as plain ``nn.Linear`` modules, and layers that start from one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["FromLinear", "as_linear"]


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


class FromLinear:
    """A square layer that can start from an ``nn.Linear``; its constructor takes features, bias, init and more."""

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: Any) -> Self:
        """A layer that starts as the function of a square ``nn.Linear``, with its bias, dtype, device and mode.

        Further arguments are those of the constructor: ``rank``, ``seed`` and the bounds.

        Raises:
            ValueError: for anything but an ``nn.Linear`` with an invertible weight.
        """
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"linear: expected an nn.Linear, got {type(linear).__name__}")
        n = linear.in_features
        if linear.out_features != n:
            raise ValueError(f"linear: expected as many outputs as inputs, got {n} to {linear.out_features}")
        weight, bias = linear.weight.detach(), linear.bias
        like = {"bias": bias is not None, "device": weight.device, "dtype": weight.dtype}
        layer: Any = cls(n, init=weight, **like, **options)  # type: ignore[call-arg]
        if bias is not None:
            with torch.no_grad():
                layer.bias.copy_(bias)
        return layer.train(linear.training)

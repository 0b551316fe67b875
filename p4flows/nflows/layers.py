"""Layers of p4flows as nflows transforms of rows."""

from __future__ import annotations

from nflows.transforms import Transform
from torch import Tensor

from p4flows.layers.activations import BentIdentity as _BentIdentity
from p4flows.layers.dense import InvertibleLinear as _InvertibleLinear
from p4flows.layers.invertible import P4Inv

__all__ = ["LAYERS", "BentIdentity", "InvertibleLinear", "P4InvLinear"]


class _OnRows:
    """nflows' calls, for a layer with ``forward`` and ``inverse`` that comes next in the order of resolution."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The forward direction of rows (N, features), and its log|det| (N,)."""
        return super().forward(_rows(inputs))

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The inverse direction of rows (N, features), and its log|det| (N,)."""
        return super().inverse(_rows(inputs))


class P4InvLinear(_OnRows, P4Inv, Transform):
    """:class:`p4flows.P4Inv` as an nflows ``Transform``: inputs (N, features), log|det| (N,), context ignored.

    >>> import torch
    >>> from nflows.transforms import CompositeTransform
    >>> transform = CompositeTransform([P4InvLinear(4, init="reverse"), P4InvLinear(4, rank=2, seed=1)])
    >>> y, logabsdet = transform(torch.randn(8, 4))
    >>> y.shape, logabsdet.shape
    (torch.Size([8, 4]), torch.Size([8]))
    """


class InvertibleLinear(_OnRows, _InvertibleLinear, Transform):
    """:class:`p4flows.InvertibleLinear` as an nflows ``Transform``: inputs (N, features), log|det| (N,).

    >>> import torch
    >>> y, logabsdet = InvertibleLinear(4, init="reverse")(torch.randn(8, 4))
    >>> y.shape, logabsdet.shape
    (torch.Size([8, 4]), torch.Size([8]))
    """


class BentIdentity(_OnRows, _BentIdentity, Transform):
    """:class:`p4flows.BentIdentity` as an nflows ``Transform``: inputs (N, features), log|det| (N,)."""


LAYERS: dict[type, type] = {
    **{P4Inv: P4InvLinear, P4InvLinear: P4InvLinear},
    **{_InvertibleLinear: InvertibleLinear, InvertibleLinear: InvertibleLinear},
}
"""The class of this module for a class of the package or of this module."""


def _rows(inputs: Tensor) -> Tensor:
    if isinstance(inputs, Tensor) and inputs.ndim != 2:
        raise ValueError(f"inputs: expected shape (N, features), got {tuple(inputs.shape)}")
    return inputs

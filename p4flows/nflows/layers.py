"""Layers of p4flows as nflows transforms of rows."""

from __future__ import annotations

from nflows.transforms import Transform

from p4flows.layers.activations import BentIdentity as _BentIdentity
from p4flows.layers.dense import InvertibleLinear as _InvertibleLinear
from p4flows.layers.invertible import P4Inv
from p4flows.layers.orthogonal import P4Orthogonal
from p4flows.rows import OnRows

__all__ = ["MADE_OF", "BentIdentity", "InvertibleLinear", "P4InvLinear", "P4OrthogonalLinear"]


class P4InvLinear(OnRows, P4Inv, Transform):
    """:class:`p4flows.P4Inv` as an nflows ``Transform``: inputs (N, features), log|det| (N,), context ignored.

    >>> import torch
    >>> from nflows.transforms import CompositeTransform
    >>> transform = CompositeTransform([P4InvLinear(4, init="reverse"), P4InvLinear(4, rank=2, seed=1)])
    >>> y, logabsdet = transform(torch.randn(8, 4))
    >>> y.shape, logabsdet.shape
    (torch.Size([8, 4]), torch.Size([8]))
    """


class InvertibleLinear(OnRows, _InvertibleLinear, Transform):
    """:class:`p4flows.InvertibleLinear` as an nflows ``Transform``: inputs (N, features), log|det| (N,).

    >>> import torch
    >>> y, logabsdet = InvertibleLinear(4, init="reverse")(torch.randn(8, 4))
    >>> y.shape, logabsdet.shape
    (torch.Size([8, 4]), torch.Size([8]))
    """


class P4OrthogonalLinear(OnRows, P4Orthogonal, Transform):
    """:class:`p4flows.P4Orthogonal` as an nflows ``Transform`` that preserves volume: inputs (N, features), zeros (N,).

    >>> import torch
    >>> y, logabsdet = P4OrthogonalLinear(4, init="reverse")(torch.randn(8, 4))
    >>> y.shape, logabsdet.tolist()
    (torch.Size([8, 4]), [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    """


class BentIdentity(OnRows, _BentIdentity, Transform):
    """:class:`p4flows.BentIdentity` as an nflows ``Transform``: inputs (N, features), log|det| (N,)."""


MADE_OF = {P4Inv: P4InvLinear, _InvertibleLinear: InvertibleLinear, P4Orthogonal: P4OrthogonalLinear}
"""The linear layers, by the classes of p4flows that they are made of."""

"""Layers of p4flows as bgflow flows, of one channel or as swaps of two."""

from __future__ import annotations

from typing import Any

import torch
from bgflow import Flow
from torch import Tensor

from p4flows.checks import integer
from p4flows.layers.activations import BentIdentity
from p4flows.layers.dense import InvertibleLinear
from p4flows.layers.invertible import P4Inv
from p4flows.layers.orthogonal import P4Orthogonal

__all__ = [
    "SWAPS",
    "BentIdentityFlow",
    "InvertibleLinearFlow",
    "InvertibleSwap",
    "P4InvFlow",
    "P4InvSwap",
    "P4OrthogonalFlow",
    "P4OrthogonalSwap",
]


# What super() is in these two classes depends on the class that comes next to them, which mypy cannot know.


class _OneChannel:
    """bgflow's calls, for a layer with ``forward`` and ``inverse`` that comes next in the order of resolution."""

    forward = Flow.forward

    def _forward(self, x: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        y, logabsdet = super().forward(x)  # type: ignore[misc]
        return y, logabsdet[..., None]

    def _inverse(self, y: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        x, logabsdet = super().inverse(y)  # type: ignore[misc]
        return x, logabsdet[..., None]


class P4InvFlow(_OneChannel, P4Inv, Flow):
    """:class:`p4flows.P4Inv` as a bgflow ``Flow``: ``flow(x) -> (y, dlogp)``, ``flow(y, inverse=True)``.

    x is (..., features) and dlogp (..., 1). Arguments are those of :class:`p4flows.P4Inv`.

    >>> flow = P4InvFlow(4, init="reverse")
    >>> y, dlogp = flow(torch.randn(8, 4))
    >>> y.shape, dlogp.shape
    (torch.Size([8, 4]), torch.Size([8, 1]))
    """


class InvertibleLinearFlow(_OneChannel, InvertibleLinear, Flow):
    """:class:`p4flows.InvertibleLinear` as a bgflow ``Flow``: ``flow(x) -> (y, dlogp)``, ``flow(y, inverse=True)``.

    x is (..., features) and dlogp (..., 1). Arguments are those of :class:`p4flows.InvertibleLinear`.

    >>> flow = InvertibleLinearFlow(4, init="reverse")
    >>> y, dlogp = flow(torch.randn(8, 4))
    >>> y.shape, dlogp.shape
    (torch.Size([8, 4]), torch.Size([8, 1]))
    """


class P4OrthogonalFlow(_OneChannel, P4Orthogonal, Flow):
    """:class:`p4flows.P4Orthogonal` as a bgflow ``Flow`` that preserves volume: ``flow(x) -> (y, dlogp)``, dlogp zero.

    x is (..., features) and dlogp (..., 1). Arguments are those of :class:`p4flows.P4Orthogonal`.

    >>> flow = P4OrthogonalFlow(4, init="reverse")
    >>> y, dlogp = flow(torch.randn(2, 4))
    >>> y.shape, dlogp.tolist()
    (torch.Size([2, 4]), [[0.0], [0.0]])
    """


class BentIdentityFlow(_OneChannel, BentIdentity, Flow):
    """:class:`p4flows.BentIdentity` as a bgflow ``Flow``: x (..., n) and dlogp (..., 1)."""


class _Swap:
    """Two channels, concatenated, mapped by the layer that comes next in the order of resolution, and split."""

    forward = Flow.forward

    def __init__(
        self, dim0: int, dim1: int, rank: int | None = None, init: str | Tensor = "swap", **options: Any
    ) -> None:
        dim0, dim1 = integer("dim0", dim0, 1), integer("dim1", dim1, 1)
        if isinstance(init, str) and init == "swap":
            init = torch.arange(dim0 + dim1, device="cpu").roll(dim1)
        super().__init__(dim0 + dim1, rank=rank, init=init, **options)  # type: ignore[call-arg]
        self.dim0, self.dim1 = dim0, dim1

    def _forward(self, *xs: Tensor, **_: Any) -> tuple[Tensor, ...]:
        y, logabsdet = super().forward(_concatenate(xs, self.dim0, self.dim1))  # type: ignore[misc]
        return (*y.split([self.dim1, self.dim0], -1), *xs[2:], logabsdet[..., None])

    def _inverse(self, *ys: Tensor, **_: Any) -> tuple[Tensor, ...]:
        x, logabsdet = super().inverse(_concatenate(ys, self.dim1, self.dim0))  # type: ignore[misc]
        return (*x.split([self.dim0, self.dim1], -1), *ys[2:], logabsdet[..., None])


class P4InvSwap(_Swap, P4Inv, Flow):
    """A learned swap of two channels (Figure 9): ``(x0, x1, *rest) -> (y0, y1, *rest, dlogp)``.

    x0 (..., dim0) and x1 (..., dim1) are concatenated, mapped by a P4Inv layer, and split into y0 (..., dim1) and
    y1 (..., dim0). A dense map is no diffeomorphism of a torus: do not put one on channels that hold raw dihedrals
    and feed a circular transform.

    Args:
        dim0, dim1: sizes of the two channels.
        rank: of the perturbation; None for the default of :class:`p4flows.P4Inv`.
        init: "swap" starts as bgflow's ``SwapFlow``, "reverse" as the reversed permutation of the paper; or
            anything else :class:`p4flows.P4Inv` takes.
        options: further arguments of :class:`p4flows.P4Inv`.

    >>> swap = P4InvSwap(1, 2)
    >>> y0, y1, dlogp = swap(torch.tensor([[1.0]]), torch.tensor([[2.0, 3.0]]))
    >>> y0.tolist(), y1.tolist()
    ([[2.0, 3.0]], [[1.0]])
    """


class InvertibleSwap(_Swap, InvertibleLinear, Flow):
    """A learned swap of two channels, as :class:`P4InvSwap`, made of a dense weight that is followed after every step.

    x0 (..., dim0) and x1 (..., dim1) are concatenated, mapped by an InvertibleLinear layer, and split into y0
    (..., dim1) and y1 (..., dim0). As for :class:`P4InvSwap`, do not put one on channels that hold raw dihedrals.

    Args:
        dim0, dim1: sizes of the two channels.
        rank: that the weight is followed with; None for the default of :class:`p4flows.InvertibleLinear`.
        init: "swap" starts as bgflow's ``SwapFlow``; or anything else :class:`p4flows.InvertibleLinear` takes.
        options: further arguments of :class:`p4flows.InvertibleLinear`.

    >>> swap = InvertibleSwap(1, 2)
    >>> y0, y1, dlogp = swap(torch.tensor([[1.0]]), torch.tensor([[2.0, 3.0]]))
    >>> y0.tolist(), y1.tolist()
    ([[2.0, 3.0]], [[1.0]])
    """


class P4OrthogonalSwap(_Swap, P4Orthogonal, Flow):
    """A learned swap of two channels, as :class:`P4InvSwap`, that preserves volume as bgflow's ``SwapFlow`` does.

    x0 (..., dim0) and x1 (..., dim1) are concatenated, mapped by a P4Orthogonal layer, and split into y0 (..., dim1)
    and y1 (..., dim0). As for :class:`P4InvSwap`, do not put one on channels that hold raw dihedrals.

    Args:
        dim0, dim1: sizes of the two channels.
        rank: of the perturbation; None for the default of :class:`p4flows.P4Orthogonal`.
        init: "swap" starts as bgflow's ``SwapFlow``; or anything else :class:`p4flows.P4Orthogonal` takes.
        options: further arguments of :class:`p4flows.P4Orthogonal`.

    >>> swap = P4OrthogonalSwap(1, 2)
    >>> y0, y1, dlogp = swap(torch.tensor([[1.0]]), torch.tensor([[2.0, 3.0]]))
    >>> y0.tolist(), y1.tolist()
    ([[2.0, 3.0]], [[1.0]])
    """


SWAPS = {P4Inv: P4InvSwap, InvertibleLinear: InvertibleSwap, P4Orthogonal: P4OrthogonalSwap}
"""The swaps, by the classes of p4flows that they are made of."""


def _concatenate(channels: tuple[Tensor, ...], dim0: int, dim1: int) -> Tensor:
    shapes = [tuple(getattr(x, "shape", ())) for x in channels[:2]]
    if [shape[-1:] for shape in shapes] != [(dim0,), (dim1,)] or shapes[0][:-1] != shapes[1][:-1]:
        raise ValueError(f"input: expected tensors of shapes (..., {dim0}) and (..., {dim1}), got {shapes}")
    return torch.cat(channels[:2], -1)

"""The tensors of many layers of one shape under one leading dimension, and back to each layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from p4flows.tracking import algebra

__all__ = ["Group", "Matrices"]

# Up to this width layers are handled in one batched call, on copies of their tensors; beyond it each by itself, in
# place.
_STACKED_WIDTH = 128

_SCALARS = ("sign", "logabsdet", "rounding")


class Matrices:
    """L tracked matrices under a leading dimension, and what their layers have beside them.

    Attributes: A, A_inv (L, n, n) and sign, logabsdet, rounding (L) in float64, to be changed in place; dtype, what the
    layers compute with; own, other tensors of the layers by name, (L, ...). Changes count after :meth:`store`.
    rounded_A (L, n, n) is A as the layer has it, where it is at hand: for wide layers that are not in float64.
    """

    def __init__(self, tensors: dict[str, Tensor], targets: dict[str, list[Tensor]], dtype: torch.dtype) -> None:
        self.own = dict(tensors)
        self.A, self.A_inv, self.sign, self.logabsdet, self.rounding = (
            self.own.pop(name) for name in ("A", "A_inv", *_SCALARS)
        )
        self.dtype = dtype
        self._targets = targets
        at_hand = targets.get("A rounded", []) if len(self.A) == 1 and dtype.itemsize >= 4 else []
        self.rounded_A = at_hand[0][None] if at_hand and at_hand[0].shape[-1] > _STACKED_WIDTH else None

    def add(self, name: str, L: Tensor, R: Tensor) -> None:
        """``M += L R`` for the named one of A and A_inv, in float64 and, rounded, in the layers."""
        targets = self._targets.get(f"{name} rounded")
        one = targets[0] if targets and len(self.A) == 1 and name not in self._targets else None
        algebra.low_rank_update_(getattr(self, name), L, R, one)
        if one is None:
            self.store(name)

    def set(self, A: Tensor, A_inv: Tensor, sign: Tensor, logabsdet: Tensor, rounding: Tensor) -> None:
        """Replace all of them, in float64 and, rounded, in the layers."""
        new = {"A": A, "A_inv": A_inv, "sign": sign, "logabsdet": logabsdet, "rounding": rounding}
        for name, value in new.items():
            if name in self._targets:  # ours is a copy
                setattr(self, name, value)
            else:
                getattr(self, name).copy_(value)
        self.store(*new)

    def store(self, *names: str) -> None:
        """Hand the named changes to the layers; those of "A" and "A_inv" also in the layers' own precision."""
        for name in names:
            value = self.own[name] if name in self.own else getattr(self, name)
            for target in (name, f"{name} rounded"):
                if target in self._targets:
                    torch._foreach_copy_(self._targets[target], list(value.unbind()))


class Group(list):
    """Layers of one shape, each of which has a :class:`p4flows.tracking.matrix.TrackedMatrix` as ``layer.tracked``.

    ``names`` are other parameters and buffers of the layers that are wanted with it, where they are not None.
    """

    def __init__(self, layers: Iterable[Any], names: Sequence[str] = ()) -> None:
        super().__init__(layers)
        # A module keeps these dicts for life; looking its attributes up takes much longer.
        self._tracked = [layer.tracked.__dict__["_buffers"] for layer in self]
        names = [name for name in names if getattr(self[0], name) is not None]
        kinds = {name: "_parameters" if name in self[0]._parameters else "_buffers" for name in names}
        self._own = {name: [layer.__dict__[kind] for layer in self] for name, kind in kinds.items()}

    def states(self) -> Iterator[Matrices]:
        """The layers' tensors under one leading dimension, in order: all at once if narrow, else one by one."""
        first = self._tracked[0]
        rounded = first["A_double"] is not None
        layers = {name: [each[name] for each in holders] for name, holders in self._own.items()}
        layers |= {name: [each[name] for each in self._tracked] for name in _SCALARS}
        for name in ("A", "A_inv"):
            layers[name] = [each[f"{name}_double" if rounded else name] for each in self._tracked]
        targets = {}
        if rounded:
            targets = {f"{name} rounded": [each[name] for each in self._tracked] for name in ("A", "A_inv")}
        batch = first["A"].ndim - 2
        dtype = first["A"].dtype
        if len(self) > 1 and batch == 0 and first["A"].shape[-1] <= _STACKED_WIDTH:
            yield Matrices({name: torch.stack(each) for name, each in layers.items()}, layers | targets, dtype)
            return
        for i in range(len(self)):
            here = {name: _leading(each[i], batch) for name, each in layers.items()}
            yield Matrices(here, {name: [*_leading(each[i], batch)] for name, each in targets.items()}, dtype)


def _leading(tensor: Tensor, batch: int) -> Tensor:
    """A view (L, ...) of a tensor (*batch, ...)."""
    tensor = tensor.detach()
    return tensor.view(-1, *tensor.shape[batch:]) if batch else tensor[None]

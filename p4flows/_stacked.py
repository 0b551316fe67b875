"""Tensors of one shape kept side by side in one storage, so that many can be handled as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Stacked"]


class Stacked:
    """A stack that shares its memory with the tensors it was made of.

    The first call of :meth:`of` moves the tensors' values into one new storage and lets each tensor point there; later
    calls find them there and copy nothing. A tensor that has moved since (``.to()``, a loaded optimizer state) is
    noticed by its address, and everything is moved anew. The tensors keep their identity.
    """

    def __init__(self) -> None:
        self._whole = torch.empty(0)
        self._pointers: list[int] = []

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        """The tensors as one, (len(tensors), ...); in-place changes reach them at once, unnoticed by autograd."""
        # The storage is kept alive here, so that an equal address can only be the same memory.
        if list(map(Tensor.data_ptr, tensors)) != self._pointers:
            self._whole = torch.stack([t.detach() for t in tensors])
            views = self._whole.unbind()
            for tensor, view in zip(tensors, views, strict=True):
                tensor.data = view
            self._pointers = [view.data_ptr() for view in views]
        return self._whole

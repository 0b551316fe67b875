"""A frozen matrix in the layer's precision, and beside it the one that it is rounded from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from p4flows.outcomes import Correction
from p4flows.tracking.matrix import moved

__all__ = ["Frozen"]


class Frozen(nn.Module):
    """A layer with a frozen matrix ``A`` (m, n) that merges update, for one that derives from this and from a module.

    The layer calls :meth:`register_frozen` in its constructor. A is a buffer in the layer's dtype. Where that is too
    coarse for many small updates to add up, a second buffer in ``exact_dtype``, named ``exact_name``, holds what A is
    rounded from; otherwise it is None. Conversions of the module and state dicts of other dtypes round it in no case.
    """

    exact_name: ClassVar[str] = "A_float"
    exact_dtype: ClassVar[torch.dtype] = torch.float32

    A: Tensor

    def register_frozen(self, start: Tensor, dtype: torch.dtype) -> None:
        """Create the buffers, from what A starts as."""
        self.register_buffer("A", start.to(dtype, copy=True))
        exact = start.to(self.exact_dtype, copy=True) if self._is_coarse(dtype) else None
        self.register_buffer(self.exact_name, exact)

    @property
    def exact(self) -> Tensor:
        """What merges update: the matrix that A is rounded from, or A itself."""
        exact = getattr(self, self.exact_name)
        return self.A if exact is None else exact

    def checked(self, M: Any) -> Tensor:
        """M on the layer's device; ValueError unless it is a real tensor of A's shape that its dtype can hold."""
        if not isinstance(M, Tensor) or M.shape != self.A.shape or M.is_complex() or M.is_meta:
            raise ValueError(f"M: expected a real tensor of shape {tuple(self.A.shape)}, got {M!r}")
        if not M.to(self.A.dtype).isfinite().all():
            raise ValueError("M: expected a matrix whose entries are finite")
        return M.to(self.A.device)

    def set_frozen(self, M: Tensor) -> None:
        """Make M (m, n) the matrix A, in place."""
        self.exact.copy_(M)
        self.round_frozen()

    def round_frozen(self) -> None:
        """Round A anew, after a change of :attr:`exact`."""
        if self.exact is not self.A:
            self.A.copy_(self.exact)

    @classmethod
    def correct_all(cls, layers: Sequence[Any], where_needed: bool = False) -> Tensor:
        """Correct all layers, or none with ``where_needed``, since merges leave nothing to correct; (len(layers),)."""
        if where_needed:
            return torch.stack([torch.full_like(layer.merges, int(Correction.NONE)) for layer in layers])
        return torch.stack([layer.correct() for layer in layers])

    def refusal(self, M: Tensor) -> str | None:
        """Why a state with the matrix M (m, n) is not loaded: what was expected and what it is; None if it is."""
        return None if M.isfinite().all() else "expected a matrix whose entries are finite"

    @classmethod
    def _is_coarse(cls, dtype: torch.dtype) -> bool:
        return dtype.itemsize < cls.exact_dtype.itemsize

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # .half() and .to(dtype) must not round what A is rounded from, and .double() gives it back.
        dtype, exact = self.A.dtype, self.exact
        super()._apply(fn, recurse)
        coarse, now = self._is_coarse(self.A.dtype), getattr(self, self.exact_name)
        if coarse and (now is None or now.dtype != self.exact_dtype):
            setattr(self, self.exact_name, moved(exact, self.A.device).to(self.exact_dtype))
        if self.A.dtype != dtype:
            self.A = moved(exact, self.A.device).to(self.A.dtype)
            if not coarse:
                setattr(self, self.exact_name, None)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        name, A = prefix + self.exact_name, state_dict.get(prefix + "A")
        stored = A if state_dict.get(name) is None else state_dict[name]
        if stored is not None and stored.shape == self.A.shape and not stored.is_meta:
            wrong = self.refusal(stored)
            if wrong is not None:
                arguments[-1].append(f"{prefix}A: {wrong}")  # of which load_state_dict makes one error
                return
        if self.exact is self.A and state_dict.get(name) is not None:
            state_dict[prefix + "A"] = state_dict.pop(name)
        elif self.exact is not self.A and state_dict.get(name) is None and A is not None:
            state_dict[name] = A.to(self.exact_dtype, copy=True)
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        if not self.A.is_meta:
            self.round_frozen()  # whatever the state says of A beside it

"""A matrix beside its inverse and determinant: in float64 for updates, rounded for the layer that computes with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from p4flows.tracking import algebra
from p4flows.tracking.initial import InitialMatrix

__all__ = ["TrackedMatrix", "moved"]


class TrackedMatrix(nn.Module):
    """A frozen invertible matrix A with A⁻¹, sign and ln|det A|, or many of them under leading dimensions *batch.

    Attributes, all buffers: A, A_inv (*batch, n, n) in the layer's dtype; A_double, A_inv_double (*batch, n, n), what
    these are rounded from, or None where the dtype is float64 itself; logabsdet, sign (*batch) in float64 whatever the
    dtype, and rounding (*batch), the part of logabsdet that is owed to the rounding of A.

    Conversions of the module (``.to``, ``.float``, ``.half``, ``.double``) round neither the determinant nor the
    float64 pair. Updates are made in place by :mod:`p4flows.tracking.merging` and its neighbours.
    """

    A: Tensor
    A_inv: Tensor
    A_double: Tensor | None
    A_inv_double: Tensor | None
    sign: Tensor
    logabsdet: Tensor
    rounding: Tensor

    def __init__(self, start: InitialMatrix, dtype: torch.dtype) -> None:
        super().__init__()
        for name, exact in (("A", start.A), ("A_inv", start.A_inv)):
            self.register_buffer(name, exact.to(dtype, copy=True))
            self.register_buffer(f"{name}_double", None if dtype == torch.float64 else exact.clone())
        self.register_buffer("sign", start.sign.clone())
        self.register_buffer("logabsdet", start.logabsdet.clone())
        self.register_buffer("rounding", torch.zeros_like(start.logabsdet))

    @property
    def exact(self) -> tuple[Tensor, Tensor]:
        """A and A⁻¹ in float64."""
        return (
            self.A if self.A_double is None else self.A_double,
            self.A_inv if self.A_inv_double is None else self.A_inv_double,
        )

    @torch.no_grad()
    def set(self, M: Tensor, name: str = "M") -> None:
        """Make M (*batch, n, n) the matrix A. It is inverted in float64, which costs O(n³).

        Raises ValueError, and changes nothing, if M has another shape, is not finite or is singular, also numerically.
        """
        if not isinstance(M, Tensor) or M.shape != self.A.shape or M.is_complex() or M.is_meta:
            raise ValueError(f"{name}: expected a real tensor of shape {tuple(self.A.shape)}, got {M!r}")
        M = M.to(self.A.device, torch.float64)
        sign, logabsdet = torch.linalg.slogdet(M)
        M_inv, info = torch.linalg.inv_ex(M)
        rounded = M.to(self.A.dtype), M_inv.to(self.A.dtype)
        if info.any() or not all(T.isfinite().all() for T in (*rounded, logabsdet)):
            raise ValueError(f"{name}: expected invertible matrices whose entries and inverses are finite")
        if algebra.residual(M, M_inv).abs().max() > algebra.SINGULAR:
            raise ValueError(f"{name}: expected invertible matrices, got one that is numerically singular")
        for target, value in zip((*self.exact, self.A, self.A_inv), (M, M_inv, *rounded), strict=True):
            target.copy_(value)
        self.sign.copy_(sign)
        self.logabsdet.copy_(logabsdet)
        self.rounding.zero_()

    @torch.no_grad()
    def residual(self) -> Tensor:
        """``max|A A⁻¹ - I|`` of the rounded pair, (*batch). A diagnostic, O(n³)."""
        return algebra.residual(self.A, self.A_inv).abs().amax((-2, -1))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TrackedMatrix:
        # .float(), .half() and .to(dtype) must round neither the determinant nor what A and A_inv are rounded from.
        dtype = self.A.dtype
        names = ("A", "A_inv") if dtype == torch.float64 else ("A_double", "A_inv_double")
        scalars = ("sign", "logabsdet", "rounding")
        exact = {name: getattr(self, name) for name in (*names, *scalars)}
        super()._apply(fn, recurse)
        for name in scalars if self.A.dtype != dtype else exact:
            if getattr(self, name).dtype != exact[name].dtype:
                setattr(self, name, moved(exact[name], self.A.device))
        if self.A.dtype != dtype:
            self.logabsdet = self.logabsdet - self.rounding  # it belongs to other rounding errors from now on
            self.rounding = torch.zeros_like(self.rounding)
            for name, old in zip(("A", "A_inv"), names, strict=True):
                double = moved(exact[old], self.A.device)
                setattr(self, name, double.to(self.A.dtype))
                setattr(self, f"{name}_double", None if self.A.dtype == torch.float64 else double)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        A, A_inv = (state_dict.get(prefix + name) for name in ("A", "A_inv"))
        exact = [state_dict.get(f"{prefix}{name}_double") for name in ("A", "A_inv")]
        if A is not None and A_inv is not None and None in exact:
            # A layer in float64 has one pair only. Of version 1, which had none in float64, A is what counts.
            exact = [A, A_inv] if A.dtype == torch.float64 else [*_inverted(A, A_inv)]
        for name, value in zip(("A", "A_inv"), exact, strict=True):
            state_dict.pop(f"{prefix}{name}_double", None)
            if value is not None:
                # Into a layer in float64 goes the exact pair.
                both = self.A_double is not None
                state_dict |= {f"{prefix}{name}_double" if both else prefix + name: value.to(torch.float64, copy=True)}
        logabsdet, rounding = (state_dict.get(prefix + key) for key in ("logabsdet", "rounding"))
        if logabsdet is not None and (rounding is None or self.A_double is None):
            total = logabsdet if rounding is None else logabsdet - rounding
            state_dict |= {prefix + "logabsdet": total, prefix + "rounding": torch.zeros_like(total)}
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on another device.

    Nothing can be copied out of the meta device: from there it is an empty one, as whoever leaves it (``to_empty``)
    loads a state next.
    """
    return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)


def _inverted(A: Tensor, A_inv: Tensor) -> list[Tensor]:
    """A and its inverse in float64; where A is singular to working accuracy, the inverse that was given."""
    exact = A.double()
    found, info = torch.linalg.inv_ex(exact)
    usable = (info == 0) & found.isfinite().all(-1).all(-1)
    return [exact, torch.where(usable[..., None, None], found, A_inv.double())]

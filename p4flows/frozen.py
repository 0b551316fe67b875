"""The frozen matrices of P4Inv layers: in float64 for merges, rounded for the layer, through conversions and files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from p4flows.initial import InitialMatrix
from p4flows.perturbation import P4Layer

__all__ = ["FrozenMatrices"]

Self = TypeVar("Self", bound="FrozenMatrices")


class FrozenMatrices(P4Layer):
    """One pair of A and its inverse, or many under leading dimensions *batch.

    Attributes, one or *batch of each, all buffers: A, A_inv (n, n); A_double, A_inv_double (n, n), what these are
    rounded from, or None where the layer is in float64 itself; logabsdet_A, sign_A (), float64 whatever the layer's
    dtype, and rounding (), the part of logabsdet_A that is owed to the rounding of A.
    """

    _version = 2  # of the state dict; version 1 had no A_double, A_inv_double and rounding

    A: Tensor
    A_inv: Tensor
    A_double: Tensor | None
    A_inv_double: Tensor | None
    sign_A: Tensor
    logabsdet_A: Tensor
    rounding: Tensor

    def _register_frozen(self, start: InitialMatrix) -> None:
        for name, value in (("A", start.A), ("A_inv", start.A_inv)):
            self.register_buffer(name, value)
            self.register_buffer(f"{name}_double", value.double() if value.dtype != torch.float64 else None)
        self.register_buffer("sign_A", start.sign)
        self.register_buffer("logabsdet_A", start.logabsdet)
        self.register_buffer("rounding", torch.zeros_like(start.logabsdet))

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # .float(), .half() and .to(dtype) must round neither the log-determinant nor what A and A_inv are rounded from.
        dtype = self.A.dtype
        names = ("A", "A_inv") if dtype == torch.float64 else ("A_double", "A_inv_double")
        scalars = ("sign_A", "logabsdet_A", "rounding")
        exact = {name: getattr(self, name) for name in (*names, *scalars)}
        super()._apply(fn, recurse)
        for name in scalars if self.A.dtype != dtype else exact:
            if getattr(self, name).dtype != exact[name].dtype:
                setattr(self, name, exact[name].to(self.A.device))
        if self.A.dtype != dtype:
            self.logabsdet_A = self.logabsdet_A - self.rounding  # that of other rounding errors from now on
            self.rounding = torch.zeros_like(self.rounding)
            for name, old in zip(("A", "A_inv"), names, strict=True):
                double = exact[old].to(self.A.device)
                setattr(self, name, double.to(self.A.dtype))
                setattr(self, f"{name}_double", None if self.A.dtype == torch.float64 else double)
        return self

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *arguments: Any) -> None:
        for name in ("A", "A_inv"):
            stored, exact = state_dict.get(prefix + name), state_dict.pop(f"{prefix}{name}_double", None)
            exact = stored if exact is None else exact
            if exact is not None:
                # Of a layer in float64 or of version 1 there is one matrix; into a layer in float64 goes the exact one.
                both = getattr(self, f"{name}_double") is not None
                state_dict |= {f"{prefix}{name}_double": exact.double()} if both else {prefix + name: exact}
        logabsdet, rounding = (state_dict.get(prefix + key) for key in ("logabsdet_A", "rounding"))
        if logabsdet is not None and (rounding is None or self.A_double is None):
            exact = logabsdet if rounding is None else logabsdet - rounding
            state_dict |= {prefix + "logabsdet_A": exact, prefix + "rounding": torch.zeros_like(exact)}
        super()._load_from_state_dict(state_dict, prefix, *arguments)

"""Both directions of InvertibleLinear, with gradients at A that go to the weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.nn.functional import linear

from p4flows.layers.autocast import autocasting
from p4flows.layers.gradients import differentiable, expand, on_rows

__all__ = ["forward_map", "inverse_map", "straight_through"]


def forward_map(
    weight: Tensor, bias: Tensor | None, x: Tensor, A: Tensor, A_inv: Tensor, logabsdet: Tensor
) -> tuple[Tensor, Tensor]:
    """x (..., n) to ``A x + b`` (..., n), and log|det| (...)."""
    return _map(_Forward, _plain_forward, weight, bias, x, A, A_inv, logabsdet)


def inverse_map(
    weight: Tensor, bias: Tensor | None, y: Tensor, A: Tensor, A_inv: Tensor, logabsdet: Tensor
) -> tuple[Tensor, Tensor]:
    """y (..., n) to ``A⁻¹ (y - b)`` (..., n), and its log|det| (...)."""
    return _map(_Inverse, _plain_inverse, weight, bias, y, A, A_inv, logabsdet)


def _map(function: type[Function], plain: Any, weight: Tensor, bias: Tensor | None, x: Tensor, *frozen: Tensor):
    if not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    ):
        return on_rows(lambda rows: plain(weight, bias, rows, *frozen), x)
    if autocasting(x):
        # The products with a batch are made in this precision, what belongs to log|det| in that of the layer.
        x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if bias is None else bias.to(x.dtype)
    return on_rows(lambda rows: function.apply(weight, bias, rows, *frozen), x)


class _Forward(Function):
    @staticmethod
    def forward(ctx: Any, weight, bias, x, A, A_inv, logabsdet):
        ctx.save_for_backward(weight, bias, x, A, A_inv, logabsdet)
        return linear(x, A.to(x.dtype), bias), expand(logabsdet, x)

    @staticmethod
    def backward(ctx: Any, gy, gl):
        weight, bias, x, A, A_inv, logabsdet = ctx.saved_tensors
        if torch.is_grad_enabled():
            return differentiable(_plain_forward, ctx, (weight, bias, x, A, A_inv, logabsdet), (gy, gl))
        gW = gb = gx = None
        if ctx.needs_input_grad[0]:
            gW = _weight_gradient(gy, x, A_inv, gl.sum(), weight)
        if ctx.needs_input_grad[1]:
            gb = gy.sum(0)
        if ctx.needs_input_grad[2]:
            gx = gy.mm(A.to(gy.dtype))
        return gW, gb, gx, None, None, None


class _Inverse(Function):
    @staticmethod
    def forward(ctx: Any, weight, bias, y, A, A_inv, logabsdet):
        x = linear(y if bias is None else y - bias, A_inv.to(y.dtype))
        ctx.save_for_backward(weight, bias, y, A, A_inv, logabsdet, x)
        return x, expand(-logabsdet, y)

    @staticmethod
    def backward(ctx: Any, gx, gl):
        weight, bias, y, A, A_inv, logabsdet, x = ctx.saved_tensors
        if torch.is_grad_enabled():
            return differentiable(_plain_inverse, ctx, (weight, bias, y, A, A_inv, logabsdet), (gx, gl))
        gy = gx.mm(A_inv.to(gx.dtype))
        gW = _weight_gradient(-gy, x, A_inv, -gl.sum(), weight) if ctx.needs_input_grad[0] else None
        gb = -gy.sum(0) if ctx.needs_input_grad[1] else None
        return gW, gb, gy, None, None, None


def _weight_gradient(gy: Tensor, x: Tensor, A_inv: Tensor, total: Tensor, weight: Tensor) -> Tensor:
    """``gyᵀ x + total A⁻ᵀ``."""
    if total.is_cpu and gy.dtype == A_inv.dtype and not torch.compiler.is_compiling():
        # As one call, since each pass over n × n numbers counts; a tensor as factor would mean waiting elsewhere.
        return torch.addmm(A_inv.t(), gy.t(), x, beta=total.item()).to(weight.dtype)
    return gy.t().mm(x).to(A_inv.dtype).addcmul_(A_inv.t(), total.to(A_inv.dtype)).to(weight.dtype)


def straight_through(weight: Tensor, A: Tensor) -> Tensor:
    """A, with derivatives that go to the weight, whatever that is."""
    finite = weight.nan_to_num()
    return A + (finite - finite.detach())


def _effective(weight: Tensor, A: Tensor) -> Tensor:
    """The value of A with the derivatives of the weight, as wide as linear algebra needs it."""
    return straight_through(weight, A).to(torch.promote_types(A.dtype, torch.float32))


def _plain_logabsdet(M: Tensor, logabsdet: Tensor) -> Tensor:
    found = torch.linalg.slogdet(M)[1]
    return logabsdet + (found - found.detach())


def _plain_forward(weight, bias, x, A, A_inv, logabsdet):
    M = _effective(weight, A)
    return linear(x, M.to(x.dtype), bias), expand(_plain_logabsdet(M, logabsdet), x)


def _plain_inverse(weight, bias, y, A, A_inv, logabsdet):
    M = _effective(weight, A)
    shifted = y if bias is None else y - bias
    # Not torch.linalg.solve, whose second derivatives are wrong under vmap of forward mode (torch 2.13).
    x = (torch.linalg.inv(M) @ shifted.to(M.dtype).mT).mT.to(y.dtype)
    return x, expand(-_plain_logabsdet(M, logabsdet), y)

"""Both directions of P4Inv with hand-written gradients: the eager fast path.

The same maps as :mod:`p4flows.tracking.algebra` composes them, with fewer calls and fewer passes over the n × n
matrices. Rows are vectors; ``Wt = Uᵀ A⁻ᵀ`` (k, n) and ``Ct = I + Wt V`` (k, k) are the transposes of W and of the
capacitance, since a product of a few rows with a large matrix is much faster than one of the matrix with a few columns.

The inverse direction multiplies the batch and Uᵀ with A⁻¹ in one product, and so does its gradient: two passes over
A⁻¹ in all. The forward direction makes two passes over A and, for the log-determinant, two thin ones over A⁻¹.
Rank one is written with vectors and scalars: for narrow layers the number of calls is the cost, not the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.nn.functional import linear

from p4flows.layers.autocast import autocasting, without_autocast
from p4flows.tracking import algebra

__all__ = ["differentiable", "expand", "forward_map", "in_full_precision", "inverse_map", "on_rows"]


def forward_map(
    A: Tensor, A_inv: Tensor, logabsdet_A: Tensor, U: Tensor, V: Tensor, bias: Tensor | None, x: Tensor
) -> tuple[Tensor, Tensor]:
    """x (..., n) to ``(A + U Vᵀ) x + b`` (..., n), and log|det| (...)."""
    if not _applicable(x):
        return _plain_forward(A, A_inv, logabsdet_A, U, V, bias, x)
    function = _ForwardRankOne if U.shape[1] == 1 else _Forward
    return on_rows(lambda rows: function.apply(A, A_inv, logabsdet_A, U, V, bias, rows), x)


def inverse_map(
    A_inv: Tensor, logabsdet_A: Tensor, U: Tensor, V: Tensor, bias: Tensor | None, y: Tensor
) -> tuple[Tensor, Tensor]:
    """y (..., n) to ``(A + U Vᵀ)⁻¹ (y - b)`` (..., n), and its log|det| (...)."""
    if not _applicable(y):
        return _plain_inverse(A_inv, logabsdet_A, U, V, bias, y)
    function = _InverseRankOne if U.shape[1] == 1 and len(U) < _STACKED else _Inverse
    return on_rows(lambda rows: function.apply(A_inv, logabsdet_A, U, V, bias, rows), y)


# The width from which a pass over A⁻¹ that is saved is worth the copy of the batch that it takes.
_STACKED = 1024


def _applicable(x: Tensor) -> bool:
    """Whether eager autograd alone is at work."""
    return not torch.compiler.is_compiling() and in_full_precision(x)


def in_full_precision(x: Tensor) -> bool:
    """Whether a hand-written gradient will do: no transform, no forward mode, no autocast, no half precision."""
    if x.dtype.itemsize < 4 or autocasting(x):
        return False
    # A compiler takes its own way through transforms.
    return torch.compiler.is_compiling() or not (
        torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    )


def on_rows(function: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor) -> tuple[Tensor, Tensor]:
    if x.ndim == 2:
        return function(x)
    y, logabsdet = function(x.reshape(-1, x.shape[-1]))
    return y.reshape(x.shape), logabsdet.reshape(x.shape[:-1])


def expand(logabsdet: Tensor, rows: Tensor) -> Tensor:
    """log|det| () as one number a row (..., n): (...), in the rows' dtype, or float32 if that is narrower."""
    dtype = rows.dtype if rows.dtype.itemsize >= 4 else torch.float32
    # A copy, since compilers lose the gradient of a result that is a view of a buffer.
    return logabsdet.to(dtype, copy=True).expand(rows.shape[:-1])


def _capacitance(Wt: Tensor, V: Tensor, logabsdet_A: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of Ct (k, k), and log|det| of the whole."""
    Ct = Wt.mm(V)
    Ct.diagonal().add_(1)
    if len(Ct) == 1:
        return Ct.reciprocal(), Ct.double().abs_().log_().add_(logabsdet_A)[0, 0]
    # One factorisation for both. In float64 it takes no longer, and its inverse less long than one in float32.
    LU, pivots, _ = torch.linalg.lu_factor_ex(Ct.double())
    logabsdet = LU.diagonal().abs().log_().sum().add_(logabsdet_A)
    identity = torch.eye(len(Ct), dtype=LU.dtype, device=LU.device)
    return torch.linalg.lu_solve(LU, pivots, identity).to(Ct.dtype), logabsdet


class _Forward(Function):
    @staticmethod
    def forward(ctx: Any, A, A_inv, logabsdet_A, U, V, bias, x):
        Wt = U.t().mm(A_inv.t())
        Ct_inv, logabsdet = _capacitance(Wt, V, logabsdet_A)
        y = x.mm(A.t()) if bias is None else torch.addmm(bias, x, A.t())
        t = x.mm(V)
        y.addmm_(t, U.t())
        ctx.save_for_backward(A, A_inv, logabsdet_A, U, V, bias, x, Wt, Ct_inv, t)
        return y, expand(logabsdet, x)

    @staticmethod
    def backward(ctx: Any, gy, gl):
        A, A_inv, logabsdet_A, U, V, bias, x, Wt, Ct_inv, t = ctx.saved_tensors
        if torch.is_grad_enabled():
            return differentiable(_plain_forward, ctx, (A, A_inv, logabsdet_A, U, V, bias, x), (gy, gl))
        gU = gV = gb = gx = None
        r = gy.mm(U)
        if ctx.needs_input_grad[6]:
            gx = gy.mm(A).addmm_(r, V.t())
        if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
            S = Ct_inv * gl.sum()
            gU = gy.t().mm(t).addmm_(V.t().mm(A_inv).t(), S)
            if ctx.needs_input_grad[4]:
                gV = x.t().mm(r).addmm_(Wt.t(), S.t())
        if ctx.needs_input_grad[5]:
            gb = gy.sum(0)
        return None, None, None, gU, gV, gb, gx


class _Inverse(Function):
    @staticmethod
    def forward(ctx: Any, A_inv, logabsdet_A, U, V, bias, y):
        shifted = y if bias is None else y - bias
        z, Wt = torch.cat([shifted, U.t()]).mm(A_inv.t()).split([len(y), U.shape[1]])
        Ct_inv, logabsdet = _capacitance(Wt, V, logabsdet_A)
        q = z.mm(V).mm(Ct_inv)
        ctx.save_for_backward(A_inv, logabsdet_A, U, V, bias, y, z, Wt, Ct_inv, q)
        return torch.addmm(z, q, Wt, alpha=-1), expand(-logabsdet, y)

    @staticmethod
    def backward(ctx: Any, gx, gl):
        A_inv, logabsdet_A, U, V, bias, y, z, Wt, Ct_inv, q = ctx.saved_tensors
        if torch.is_grad_enabled():
            return differentiable(_plain_inverse, ctx, (A_inv, logabsdet_A, U, V, bias, y), (gx, gl))
        # q = t Ct⁻¹ with t = z V; so the gradient of Ct is -Ct⁻ᵀ Σ gl - Ct⁻ᵀ tᵀ gq Ct⁻ᵀ.
        gq = gx.mm(Wt.t()).neg_()
        gt = gq.mm(Ct_inv.t())
        gCt = (Ct_inv.t() * gl.sum() + q.t().mm(gt)).neg_()
        gWt = torch.addmm(gCt.mm(V.t()), q.t(), gx, alpha=-1)
        gz = torch.addmm(gx, gt, V.t())
        gy, gUt = torch.cat([gz, gWt]).mm(A_inv).split([len(gz), len(gWt)])
        gV = z.t().mm(gt).addmm_(Wt.t(), gCt) if ctx.needs_input_grad[3] else None
        gb = gy.sum(0).neg_() if ctx.needs_input_grad[4] else None
        return None, None, gUt.t(), gV, gb, gy


class _ForwardRankOne(Function):
    @staticmethod
    def forward(ctx: Any, A, A_inv, logabsdet_A, U, V, bias, x):
        u, v = U.view(-1), V.view(-1)
        w = algebra.matrix_vector(A_inv, u)
        G = torch.dot(w, v).add_(1)
        y = linear(x, A, bias)
        t = torch.mv(x, v)
        y.addr_(t, u)
        ctx.save_for_backward(A, A_inv, logabsdet_A, U, V, bias, x, w, G, t)
        return y, expand(G.abs().log() + logabsdet_A, x)

    @staticmethod
    def backward(ctx: Any, gy, gl):
        A, A_inv, logabsdet_A, U, V, bias, x, w, G, t = ctx.saved_tensors
        if torch.is_grad_enabled():
            return differentiable(_plain_forward, ctx, (A, A_inv, logabsdet_A, U, V, bias, x), (gy, gl))
        u, v = U.view(-1), V.view(-1)
        gU = gV = gb = gx = None
        r = torch.mv(gy, u)
        if ctx.needs_input_grad[6]:
            gx = torch.mm(gy, A).addr_(r, v)
        if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
            s = gl.sum().div(G)
            gU = torch.mv(gy.t(), t).addcmul_(algebra.vector_matrix(v, A_inv), s).view_as(U)
            gV = torch.mv(x.t(), r).addcmul_(w, s).view_as(V)
        if ctx.needs_input_grad[5]:
            gb = gy.sum(0)
        return None, None, None, gU, gV, gb, gx


class _InverseRankOne(Function):
    @staticmethod
    def forward(ctx: Any, A_inv, logabsdet_A, U, V, bias, y):
        u, v = U.view(-1), V.view(-1)
        w = algebra.matrix_vector(A_inv, u)
        G = torch.dot(w, v).add_(1)
        z = linear(y if bias is None else y - bias, A_inv)
        q = torch.mv(z, v).div_(G)
        ctx.save_for_backward(A_inv, logabsdet_A, U, V, bias, y, z, w, G, q)
        return torch.addr(z, q, w, alpha=-1), expand(-(G.abs().log() + logabsdet_A), y)

    @staticmethod
    def backward(ctx: Any, gx, gl):
        A_inv, logabsdet_A, U, V, bias, y, z, w, G, q = ctx.saved_tensors
        if torch.is_grad_enabled():
            return differentiable(_plain_inverse, ctx, (A_inv, logabsdet_A, U, V, bias, y), (gx, gl))
        v = V.view(-1)
        gt = torch.mv(gx, w).div_(G).neg_()
        gG = (gl.sum().div_(G) + torch.dot(q, gt)).neg_()
        gw = torch.mv(gx.t(), q).neg_().addcmul_(v, gG)
        gy = torch.mm(torch.addr(gx, gt, v), A_inv)
        gV = torch.mv(z.t(), gt).addcmul_(w, gG).view_as(V)
        gb = gy.sum(0).neg_() if ctx.needs_input_grad[4] else None
        return None, None, algebra.vector_matrix(gw, A_inv).view_as(U), gV, gb, gy


def _plain_forward(A, A_inv, logabsdet_A, U, V, bias, x):
    _, _, log_G = _plain_capacitance(A_inv, U, V, x)
    y = algebra.perturbed_product(A, U, V, x)
    return y if bias is None else y + bias, expand(log_G + logabsdet_A, x)


def _plain_inverse(A_inv, logabsdet_A, U, V, bias, y):
    W, C, log_G = _plain_capacitance(A_inv, U, V, y)
    x = algebra.perturbed_inverse_product(A_inv, V, W, C, y if bias is None else y - bias)
    return x, expand(-log_G - logabsdet_A, y)


def _plain_capacitance(A_inv, U, V, x):
    with without_autocast(x):
        W, C = algebra.capacitance(A_inv, U, V)
        return W, C, algebra.sign_and_logabsdet(C)[1]


def differentiable(plain: Callable, ctx: Any, inputs: tuple, gradients: tuple) -> tuple:
    """The gradients once more, by autograd on the plain operations, where they are to be differentiated again."""
    wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
    # Inputs may depend on each other, as where a layer is applied twice; what is wanted are derivatives at this place
    # alone, with respect to each input by itself.
    views = [T.view_as(T) if isinstance(T, Tensor) and T.requires_grad else T for T in inputs]
    # An output that depends on nothing that is trained, such as a constant log|det|, has no derivative.
    outputs = [(out, g) for out, g in zip(plain(*views), gradients, strict=True) if out.requires_grad]
    found = torch.autograd.grad(
        [out for out, _ in outputs],
        [views[i] for i in wanted],
        [g for _, g in outputs],
        create_graph=True,
        allow_unused=True,
    )
    result: list[Tensor | None] = [None] * len(inputs)
    for i, gradient in zip(wanted, found, strict=True):
        result[i] = gradient
    return tuple(result)

"""A chain of affine maps and elementwise bijections, with its gradient written by hand.

Step by step only what depends on the step before is done: an affine map and f(x) on the way there, one multiply-add
and one product on the way back. Slopes, log-determinants and the gradients of all matrices are computed for all steps
at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from p4flows.layers.activations import Elementwise, Inverse
from p4flows.layers.gradients import differentiable, in_full_precision

__all__ = ["Step", "bijection", "chain"]

Step = tuple[Any, bool]
"""A bijection, which is a module with ``forward`` and ``inverse``, and whether it is run backwards."""


def bijection(step: Step, x: Tensor) -> tuple[Tensor, Tensor]:
    """Its value and log|det|."""
    module, inverted = step
    return module.inverse(x) if inverted else module(x)


def chain(x: Tensor, M: Tensor, b: Tensor, steps: Sequence[Step | None], period: int) -> tuple[Tensor, Tensor]:
    """``f_L(M_L ... f_1(M_1 x + b_1) ... + b_L)`` of rows, and Σ log|det f_i|.

    x (N, n), M (L, n, n), b (L, n); or x (m, N, n), M (L, m, n, n), b (L, m, 1, n). ``steps`` are the f, and repeat
    with ``period``; None for the last is the identity.
    """
    formulas = [_formulas(step) for step in steps[:period] if step is not None]
    if None in formulas or not in_full_precision(x):
        return _plain(x, M, b, steps, formulas)
    return _Chain.apply(x, M, b, steps, formulas)


def _formulas(step: Step) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], tuple[Tensor, Tensor]]] | None:
    """The value and the slopes (see :class:`Elementwise`) of a step, or None where there are none."""
    module, inverted = step
    while isinstance(module, Inverse):
        module, inverted = module.bijection, not inverted
    if not isinstance(module, Elementwise) or any(p.requires_grad for p in module.parameters()):
        return None
    return (module.inverse_value, partial(_inverse_slope, module)) if inverted else (module.value, module.slope)


def _inverse_slope(module: Elementwise, y: Tensor) -> tuple[Tensor, Tensor]:
    slope, change = module.slope(module.inverse_value(y))
    return 1 / slope, -change / slope


def _plain(x: Tensor, M: Tensor, b: Tensor, steps: Sequence[Step | None], _: Any) -> tuple[Tensor, Tensor]:
    affine = torch.addmm if x.ndim == 2 else torch.baddbmm
    total = x.new_zeros(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))
    for m, c, step in zip(M.mT.unbind(), b.unbind(), steps, strict=True):
        x = affine(c, x, m)
        if step is not None:
            x, logabsdet = bijection(step, x)
            total = total + logabsdet
    return x, total


class _Chain(Function):
    @staticmethod
    def forward(ctx: Any, x, M, b, steps, formulas):
        affine = torch.addmm if x.ndim == 2 else torch.baddbmm
        inputs, mapped, period = [], [], len(formulas)
        y = x
        for i, (m, c, step) in enumerate(zip(M.mT.unbind(), b.unbind(), steps, strict=True)):
            inputs.append(y)
            y = affine(c, y, m)
            mapped.append(y)
            if step is not None:
                y = formulas[i % period][0](y)
        H, X = torch.stack(inputs), torch.stack(mapped)
        D, E = torch.ones_like(X), torch.zeros_like(X)
        last = len(steps) - (steps[-1] is None)
        for i, (_, slope) in enumerate(formulas):
            D[i:last:period], E[i:last:period] = slope(X[i:last:period])
        ctx.save_for_backward(x, M, b, H, D, E)
        ctx.steps, ctx.formulas = steps, formulas
        return y, D.abs().log().sum((0, -1))

    @staticmethod
    def backward(ctx: Any, gy, gl):
        x, M, b, H, D, E = ctx.saved_tensors
        if torch.is_grad_enabled():
            return differentiable(_plain, ctx, (x, M, b, ctx.steps, ctx.formulas), (gy, gl))
        product = torch.mm if x.ndim == 2 else torch.bmm
        gradients = []
        for m, d, e in zip(*(reversed(T.unbind()) for T in (M, D, E * gl.unsqueeze(-1))), strict=True):
            gradients.append(torch.addcmul(e, gy, d))
            gy = product(gradients[-1], m)
        G = torch.stack(gradients[::-1])
        gM = G.mT @ H if ctx.needs_input_grad[1] else None
        gb = G.sum(-2, keepdim=b.ndim > 2) if ctx.needs_input_grad[2] else None
        return gy, gM, gb, None, None

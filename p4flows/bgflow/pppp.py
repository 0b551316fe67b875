"""Conversion between bgflow's own ``InvertiblePPPP`` and P4Inv; part of :mod:`p4flows.bgflow`."""

from __future__ import annotations

import torch
from bgflow import InvertiblePPPP
from torch import nn

from p4flows.bgflow.flows import P4InvFlow
from p4flows.layers.invertible import P4Inv

__all__ = ["from_pppp", "to_pppp"]


def from_pppp(layer: InvertiblePPPP) -> P4InvFlow:
    """bgflow's ``InvertiblePPPP`` as a :class:`P4InvFlow` of rank one with the same function and bounds.

    The function is the one that bgflow's layer computes in training mode, A + u vᵀ: in ``eval()`` it leaves the
    perturbation out. Inverse and log-determinant are computed anew from A, in float64, since what it stores may have
    drifted, over- or underflowed.
    """
    if not isinstance(layer, InvertiblePPPP):
        raise ValueError(f"layer: expected a bgflow InvertiblePPPP, got {type(layer).__name__}")
    low, high = layer.min_logdet.item(), layer.max_logdet.item()
    new = P4InvFlow(
        layer.dim,
        rank=1,
        bias=isinstance(layer.b, nn.Parameter),
        init=layer.A,
        bounds_update=(low - 4, None),
        bounds_det=(low - 0.5, high + 0.5),
        bounds_penalty=(low, high),
        penalty_weight=layer.penalty_parameter.item(),
        device=layer.A.device,
        dtype=layer.A.dtype,
    )
    with torch.no_grad():
        new.U.copy_(layer.u[:, None])
        new.V.copy_(layer.v[:, None])
        if new.bias is not None:
            new.bias.copy_(layer.b)
    new.training = layer.training
    return new


def to_pppp(layer: P4Inv) -> InvertiblePPPP:
    """A P4Inv layer as bgflow's ``InvertiblePPPP`` with the same function.

    The perturbation of a layer of rank one stays a perturbation; a higher rank goes into A. bgflow has one pair of
    bounds, which is taken from ``bounds_penalty`` (the paper's values for a missing one).

    Raises ValueError where the determinant is not a number of the layer's dtype, as bgflow stores it itself.
    """
    if not isinstance(layer, P4Inv):
        raise ValueError(f"layer: expected a P4Inv layer, got {type(layer).__name__}")
    low, high = (
        default if bound is None else bound for bound, default in zip(layer.bounds_penalty, (-2, 15), strict=True)
    )
    new = InvertiblePPPP(
        layer.features,
        shift=layer.bias is not None,
        penalty_parameter=layer.penalty_weight,
        min_logdet=low,
        max_logdet=high,
    ).to(layer.A)
    with torch.no_grad():
        keep = layer.rank == 1
        A, A_inv = (layer.A, layer.A_inv) if keep else (layer.matrix, layer.inverse_matrix)
        sign, logabsdet = (layer.sign_A, layer.logabsdet_A) if keep else (layer.sign, layer.logabsdet)
        det = (sign * logabsdet.exp()).to(A.dtype)
        if not det.isfinite() or det == 0:
            raise ValueError(f"layer: ln|det A| = {logabsdet:.6g} is out of reach of bgflow's {A.dtype} determinant")
        new.A.copy_(A)
        new.Ainv.copy_(A_inv)
        new.detA.copy_(det)
        if keep:
            new.u.copy_(layer.U[:, 0])
            new.v.copy_(layer.V[:, 0])
        if layer.bias is not None:
            new.b.copy_(layer.bias)
    new.training = layer.training  # train() would merge
    return new

"""P4Inv and InvertibleLinear as normflows flows, and surgery that puts them into an existing normflows model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from p4flows import surgery
from p4flows.checks import flag
from p4flows.installing import missing
from p4flows.layers.dense import InvertibleLinear as _InvertibleLinear
from p4flows.layers.invertible import P4Inv
from p4flows.rows import OnRows

try:
    from normflows import MultiscaleFlow
    from normflows.flows import Flow, Invertible1x1Conv, InvertibleAffine, LULinearPermute, Permute
except ImportError as error:
    raise missing("p4flows.normflows", "normflows", "normflows") from error

__all__ = ["InvertibleLinear", "P4InvLinear", "replace_permutations"]


class P4InvLinear(OnRows, P4Inv, Flow):
    """:class:`p4flows.P4Inv` as a normflows ``Flow``: z (N, features) to x and log|det| (N,), context ignored.

    >>> import normflows, torch
    >>> base = normflows.distributions.DiagGaussian(4)
    >>> model = normflows.NormalizingFlow(base, [P4InvLinear(4, init="reverse"), P4InvLinear(4, rank=2, seed=1)])
    >>> model.log_prob(torch.randn(8, 4)).shape
    torch.Size([8])
    """


class InvertibleLinear(OnRows, _InvertibleLinear, Flow):
    """:class:`p4flows.InvertibleLinear` as a normflows ``Flow``: z (N, features) to x and log|det| (N,).

    >>> import torch
    >>> x, logabsdet = InvertibleLinear(4, init="reverse")(torch.randn(8, 4))
    >>> x.shape, logabsdet.shape
    (torch.Size([8, 4]), torch.Size([8]))
    """


_LAYERS = surgery.classes({P4Inv: P4InvLinear, _InvertibleLinear: InvertibleLinear})


def replace_permutations(
    model: nn.Module,
    rank: int | None = None,
    *,
    layer: type[nn.Module] = P4InvLinear,
    linear: bool = False,
    seed: int = 0,
    **options: Any,
) -> int:
    """Put a learned linear layer in place of every permutation of vectors in a normflows model, in place.

    Replaces ``Permute`` and ``LULinearPermute``, at any depth, by a layer that starts as the same map: the model
    computes the same function until the first optimizer step. Create the optimizer afterwards, since the model has new
    parameters. All new layers are made before the first is put in place, so that an error leaves the model as it was.

    Args:
        model: a ``NormalizingFlow`` or another module of normflows that contains some.
        rank: of the perturbations, or that a weight is followed with; capped at the number of features of narrower
            permutations. None for the layer's own default.
        layer: :class:`P4InvLinear` or :class:`InvertibleLinear`, or the class of :mod:`p4flows` that it is made of.
        linear: also replace ``InvertibleAffine``, which permutes nothing.
        seed: the i-th new layer gets ``seed + i``.
        options: further arguments of the layer, such as ``bias`` or ``bounds_det``.

    Warns:
        UserWarning: for ``Invertible1x1Conv`` and for ``Permute`` inside a ``MultiscaleFlow``, which act on image
            channels and are left alone; where nothing was replaced; and if the model has splines on an interval
            (``tails=None``) or a circle, since a learned layer, unlike a permutation, leads out of there.

    Returns:
        how many layers were replaced.

    Raises:
        ValueError: if ``model`` is itself a layer to replace, and so has no place to put another into; if a layer to
            replace has a bias and the options say ``bias=False``; and for a wrong argument. Then nothing is replaced.
    """
    make, rank, seed = surgery.arguments(_LAYERS, layer, rank, seed)
    kinds = (Permute, LULinearPermute, *((InvertibleAffine,) if flag("linear", linear) else ()))
    surgery.check_contains("model", model, "a normflows model that contains permutations", kinds)
    scales = [module for module in model.modules() if isinstance(module, MultiscaleFlow)]
    images = {inner for scale in scales for inner in scale.modules()}
    found: list[surgery.Place] = []
    left: list[surgery.Place] = []
    for place in surgery.places(model, lambda module: isinstance(module, (*kinds, Invertible1x1Conv))):
        image = isinstance(place.module, Invertible1x1Conv) or place.module in images
        (left if image else found).append(place)
    like = next(model.parameters(), torch.empty(0))

    def new(old: nn.Module, i: int) -> nn.Module:
        more = {**options, "rank": rank, "seed": seed + i}
        return surgery.equivalent(make, old, *_matrix_and_bias(old), like, more)

    replaced = surgery.put(found, new)
    if left:
        names = ", ".join(surgery.name(place.module) for place in left)
        surgery.warn(f"left alone, as they act on image channels: {names}")
    if not replaced:
        reason = surgery.foreign(model, own=("normflows",))
        surgery.warn("replace_permutations found nothing to replace" + (reason and f"; {reason}"))
    elif any(_is_bounded(vars(module)["tails"]) for module in model.modules() if "tails" in vars(module)):
        surgery.warn(
            "bounded or circular splines (tails=None or 'circular') accept an interval or a circle only, and a learned "
            "linear layer does not keep its outputs there: give them tails='linear', or keep the permutations"
        )
    return replaced


def _is_bounded(tails: Any) -> bool:
    return tails is None or "circular" in tails  # a string, or a list with one for each feature


@torch.no_grad()
def _matrix_and_bias(old: Any) -> tuple[Tensor, Tensor | None]:
    """Matrix (n, n), or permutation (n,), and bias of the forward direction, from the latent variable on."""
    if isinstance(old, Permute):
        if old.mode == "shuffle":
            return old.perm, None
        return torch.arange(old.num_channels).roll(-(old.num_channels // 2)), None
    if isinstance(old, InvertibleAffine):
        inverse = old._assemble_W() if old.use_lu else old.W
        return torch.linalg.inv(inverse.double()).mT, None
    # Its inverse direction is z = W x[permutation] + b.
    inverse = old.linear.weight().double()[:, old.permutation._permutation.argsort()]
    matrix = torch.linalg.inv(inverse)
    return matrix, -matrix @ old.linear.bias.double()

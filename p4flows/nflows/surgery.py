"""Surgery that puts learned linear layers into an existing nflows flow."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from p4flows import surgery
from p4flows.checks import flag
from p4flows.nflows.layers import MADE_OF, P4InvLinear
from p4flows.nflows.recognition import (
    IMAGE_LAYERS,
    LINEAR,
    PERMUTATIONS,
    bounded_splines,
    is_named,
    matrix_of,
    on_images,
    works,
)

__all__ = ["replace_permutations"]

_LAYERS = surgery.classes(MADE_OF)


def replace_permutations(
    flow_or_transform: nn.Module,
    rank: int | None = None,
    *,
    layer: type[nn.Module] = P4InvLinear,
    linear: bool = False,
    example: Tensor | None = None,
    seed: int = 0,
    **options: Any,
) -> int:
    """Put a learned linear layer in place of every permutation of vectors in an nflows flow or transform.

    Replaces ``Permutation``, ``ReversePermutation`` and ``RandomPermutation``, at any depth and in place, by a layer
    that starts as the same permutation: the flow computes the same function until the first optimizer step.
    Create the optimizer afterwards, since the flow has new parameters. All new layers are made before the first is put
    in place, so that an error leaves the flow as it was.

    Flows of glasflow and of nessai are made of copies of nflows' classes. They are found by the names of their classes,
    and replaced if they compute what nflows' do.

    Args:
        flow_or_transform: an nflows ``Flow`` or ``Transform`` (or any module that contains some).
        rank: of the perturbations, or that a weight is followed with; capped at the number of features of narrower
            permutations. None for the layer's own default.
        layer: :class:`P4InvLinear`, :class:`InvertibleLinear`, or :class:`P4OrthogonalLinear` to preserve volume as the
            permutations do; or the class of :mod:`p4flows` that it is made of.
        linear: also replace ``LULinear``, ``QRLinear``, ``SVDLinear`` and ``NaiveLinear``, starting from their
            matrix and bias. sbi's ``nsf`` has no permutations but these.
        example: a batch of inputs; where given, one pass (without context) tells vectors from images. Without it,
            permutations of another dimension than 1, and those inside a ``MultiscaleCompositeTransform`` of
            image shapes, count as permutations of image channels.
        seed: the i-th new layer gets ``seed + i``.
        options: further arguments of the layer, such as ``bias`` or ``bounds_det``.

    Warns:
        UserWarning: for permutations of image channels, ``OneByOneConvolution`` and copies that compute something else,
            which are left alone; where nothing was replaced, and why; and if the flow has spline transforms that are
            defined on [0, 1] only (``tails=None``), since a learned layer, unlike a permutation, leads out of there.

    Returns:
        how many layers were replaced.

    Raises:
        ValueError: if ``flow_or_transform`` is itself a layer to replace, and so has no place to put another into; if a
            layer to replace has a bias and the options say ``bias=False``; and for a wrong argument. Then nothing is
            replaced.

    >>> from nflows.transforms import CompositeTransform, ReversePermutation
    >>> transform = CompositeTransform([ReversePermutation(4), ReversePermutation(4)])
    >>> replace_permutations(transform)
    2
    """
    make, rank, seed = surgery.arguments(_LAYERS, layer, rank, seed)
    names = (*PERMUTATIONS, *(LINEAR if flag("linear", linear) else ()))
    if example is not None and not isinstance(example, Tensor):
        raise ValueError(f"example: expected a batch of inputs, got {type(example).__name__}")
    if not isinstance(flow_or_transform, nn.Module):
        raise ValueError(f"flow_or_transform: expected an nflows Flow or Transform, got {flow_or_transform!r}")
    if is_named(flow_or_transform, names):
        raise ValueError(
            "flow_or_transform: expected a module that contains layers to replace, got a "
            f"{surgery.name(flow_or_transform)} itself; wrap it in a CompositeTransform"
        )
    rows = None if example is None else _modules_on_rows(flow_or_transform, names, example)
    images = on_images(flow_or_transform) if rows is None else set()

    found, left, other = [], [], []
    for place in surgery.places(flow_or_transform, lambda module: is_named(module, (*names, *IMAGE_LAYERS))):
        old = place.module
        image = old in images or getattr(old, "_dim", 1) != 1 if rows is None else old not in rows
        if is_named(old, IMAGE_LAYERS) or image:
            left.append(surgery.name(old))
        elif works(old):
            found.append(place)
        else:
            other.append(surgery.name(old))

    parameter = next(flow_or_transform.parameters(), torch.empty(0))

    def new(old: nn.Module, i: int) -> nn.Module:
        matrix, bias = matrix_of(old)
        like = parameter if bias is None else bias
        return surgery.equivalent(make, old, matrix, bias, like, {**options, "rank": rank, "seed": seed + i})

    replaced = surgery.put(found, new)
    if left:
        surgery.warn(f"left alone, as they act on image channels: {', '.join(left)}")
    if other:
        surgery.warn(f"left alone, as they compute something else than nflows' of this name: {', '.join(other)}")
    if not replaced:
        surgery.warn("replace_permutations found nothing to replace" + _reason(flow_or_transform, linear))
    elif bounded := bounded_splines(flow_or_transform):
        surgery.warn(
            f"bounded splines ({', '.join(bounded)} with tails=None) accept inputs from 0 to 1 only, and a learned "
            "linear layer does not keep its outputs there: give them tails='linear', or keep the permutations"
        )
    return replaced


def _reason(root: nn.Module, linear: bool) -> str:
    others = [] if linear else [surgery.name(module) for module in root.modules() if is_named(module, LINEAR)]
    if others:
        return f" but {', '.join(dict.fromkeys(others))}, which linear=True replaces"
    text = surgery.foreign(root, own=("nflows", "glasflow"))
    return text and f"; {text}"


def _modules_on_rows(root: nn.Module, names: tuple[str, ...], example: Tensor) -> set[nn.Module]:
    rows = set()

    def record(module: nn.Module, method: Callable, inputs: Tensor, context: Tensor | None = None) -> Any:
        if inputs.ndim == 2:
            rows.add(module)
        return method(inputs, context)

    # Forward hooks would miss InverseTransform, which calls the method `inverse`.
    candidates = [module for module in root.modules() if is_named(module, names)]
    for module in candidates:
        for name in ("forward", "inverse"):
            setattr(module, name, partial(record, module, getattr(module, name)))
    function: Any = getattr(root, "transform_to_noise", root)
    try:
        with torch.no_grad():
            function(example)
    except (IndexError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"example: expected a batch of inputs that the flow accepts; it says: {error}") from error
    finally:
        for module in candidates:
            del module.forward, module.inverse
    return rows

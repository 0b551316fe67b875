"""P4Inv and the Bent identity as nflows transforms, and surgery that puts P4Inv into an existing nflows flow."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

try:
    from nflows.transforms import (
        LULinear,
        MultiscaleCompositeTransform,
        NaiveLinear,
        OneByOneConvolution,
        Permutation,
        QRLinear,
        SVDLinear,
        Transform,
    )
except ImportError as error:
    raise ImportError("p4flows.nflows needs nflows: pip install 'p4flows[nflows]'") from error

from p4flows.checks import flag, integer
from p4flows.layers.activations import BentIdentity as _BentIdentity
from p4flows.layers.dense import InvertibleLinear as _InvertibleLinear
from p4flows.layers.invertible import P4Inv

__all__ = ["BentIdentity", "InvertibleLinear", "P4InvLinear", "replace_permutations"]


class _OnRows:
    """nflows' calls, for a layer with ``forward`` and ``inverse`` that comes next in the order of resolution."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The forward direction of rows (N, features), and its log|det| (N,)."""
        return super().forward(_rows(inputs))

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The inverse direction of rows (N, features), and its log|det| (N,)."""
        return super().inverse(_rows(inputs))


class P4InvLinear(_OnRows, P4Inv, Transform):
    """:class:`p4flows.P4Inv` as an nflows ``Transform``: inputs (N, features), log|det| (N,), context ignored.

    >>> from nflows.transforms import CompositeTransform
    >>> transform = CompositeTransform([P4InvLinear(4, init="reverse"), P4InvLinear(4, rank=2, seed=1)])
    >>> y, logabsdet = transform(torch.randn(8, 4))
    >>> y.shape, logabsdet.shape
    (torch.Size([8, 4]), torch.Size([8]))
    """


class InvertibleLinear(_OnRows, _InvertibleLinear, Transform):
    """:class:`p4flows.InvertibleLinear` as an nflows ``Transform``: inputs (N, features), log|det| (N,).

    >>> y, logabsdet = InvertibleLinear(4, init="reverse")(torch.randn(8, 4))
    >>> y.shape, logabsdet.shape
    (torch.Size([8, 4]), torch.Size([8]))
    """


class BentIdentity(_OnRows, _BentIdentity, Transform):
    """:class:`p4flows.BentIdentity` as an nflows ``Transform``: inputs (N, features), log|det| (N,)."""


_LAYERS = {
    **{P4Inv: P4InvLinear, P4InvLinear: P4InvLinear},
    **{_InvertibleLinear: InvertibleLinear, InvertibleLinear: InvertibleLinear},
}


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
    Create the optimizer afterwards, since the flow has new parameters.

    Args:
        flow_or_transform: an nflows ``Flow`` or ``Transform`` (or any module that contains some).
        rank: of the perturbations, or that a weight is followed with; capped at the number of features of narrower
            permutations. None for the layer's own default.
        layer: :class:`P4InvLinear` or :class:`InvertibleLinear`, or the class of :mod:`p4flows` that it is made of.
        linear: also replace ``LULinear``, ``QRLinear``, ``SVDLinear`` and ``NaiveLinear``, starting from their
            matrix and bias.
        example: a batch of inputs; where given, one pass (without context) tells vectors from images. Without it,
            permutations of another dimension than 1, and those inside a ``MultiscaleCompositeTransform`` of
            image shapes, count as permutations of image channels.
        seed: the i-th new layer gets ``seed + i``.
        options: further arguments of the layer, such as ``bias`` or ``bounds_det``.

    Permutations of image channels and ``OneByOneConvolution`` are left alone, with a warning.

    Returns:
        how many layers were replaced; zero is a warning.

    Raises:
        ValueError: if ``flow_or_transform`` is itself a layer to replace, and so has no place to put another into; and
            if a new layer cannot be made. Then nothing is replaced.

    >>> from nflows.transforms import CompositeTransform, ReversePermutation
    >>> transform = CompositeTransform([ReversePermutation(4), ReversePermutation(4)])
    >>> replace_permutations(transform)
    2
    """
    rank, seed = None if rank is None else integer("rank", rank, 1), integer("seed", seed)
    flag("linear", linear)
    make = _LAYERS.get(layer) if isinstance(layer, type) else None
    if make is None:
        raise ValueError(f"layer: expected P4InvLinear or InvertibleLinear, got {layer!r}")
    if example is not None and not isinstance(example, Tensor):
        raise ValueError(f"example: expected a batch of inputs, got {type(example).__name__}")
    if not isinstance(flow_or_transform, nn.Module):
        raise ValueError(f"flow_or_transform: expected an nflows Flow or Transform, got {flow_or_transform!r}")
    kinds = (Permutation, *((LULinear, QRLinear, SVDLinear, NaiveLinear) if linear else ()))
    if isinstance(flow_or_transform, kinds):
        raise ValueError(
            f"flow_or_transform: expected a module that contains layers to replace, got a {_name(flow_or_transform)} "
            "itself; wrap it in a CompositeTransform"
        )
    rows = None if example is None else _modules_on_rows(flow_or_transform, kinds, example)
    parameter = next(flow_or_transform.parameters(), torch.empty(0))
    new: dict[nn.Module, nn.Module] = {}
    places, left = [], []
    for parent, name, old, image in _places(flow_or_transform, kinds):
        image = image if rows is None or isinstance(old, OneByOneConvolution) else old not in rows
        if image:
            left.append(_name(old))
            continue
        if old not in new:
            new[old] = _equivalent(old, make, {"rank": rank, "seed": seed + len(new), **options}, parameter)
        places.append((parent, name, new[old]))
    for parent, name, made in places:  # not before all of them could be made
        setattr(parent, name, made)
    if left:
        warnings.warn(f"left alone, as they act on image channels: {', '.join(left)}", stacklevel=2)
    if not new:
        warnings.warn("replace_permutations found nothing to replace", stacklevel=2)
    return len(new)


def _places(root: nn.Module, kinds: tuple[type, ...], image: bool = False) -> Iterator[tuple]:
    """(parent, name, module, whether it is known to act on image channels) of all candidates below root."""
    for name, child in root._modules.items():  # named_children would skip a module that is used twice
        if child is None:
            continue
        inside = image or (
            isinstance(child, MultiscaleCompositeTransform) and any(len(shape) > 1 for shape in child._output_shapes)
        )
        if isinstance(child, OneByOneConvolution):
            yield root, name, child, True
        elif isinstance(child, kinds):
            yield root, name, child, inside or getattr(child, "_dim", 1) != 1
        else:
            yield from _places(child, kinds, inside)


def _modules_on_rows(root: nn.Module, kinds: tuple[type, ...], example: Tensor) -> set[nn.Module]:
    rows = set()

    def record(module: nn.Module, method: Callable, inputs: Tensor, context: Tensor | None = None) -> Any:
        if inputs.ndim == 2:
            rows.add(module)
        return method(inputs, context)

    # Forward hooks would miss InverseTransform, which calls the method `inverse`.
    candidates = [m for m in root.modules() if isinstance(m, kinds)]
    for module in candidates:
        for name in ("forward", "inverse"):
            setattr(module, name, partial(record, module, getattr(module, name)))
    try:
        with torch.no_grad():
            (root.transform_to_noise if hasattr(root, "transform_to_noise") else root)(example)
    except (IndexError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"example: expected a batch of inputs that the flow accepts; it says: {error}") from error
    finally:
        for module in candidates:
            del module.forward, module.inverse
    return rows


@torch.no_grad()
def _equivalent(old: nn.Module, make: type[nn.Module], options: dict[str, Any], parameter: Tensor) -> nn.Module:
    if isinstance(old, Permutation):
        init, like, bias = old._permutation, parameter, None
    else:
        init, like, bias = old.weight(), old.bias, old.bias
    features = init.shape[0]
    if options["rank"] is not None:
        options["rank"] = min(options["rank"], features)
    layer = make(features, init=init, device=like.device, dtype=like.dtype, **options)
    if bias is not None:
        if layer.bias is None:
            raise ValueError(f"bias: expected True, since a {_name(old)} has a bias")
        layer.bias.copy_(bias)
    return layer.train(old.training)


def _rows(inputs: Tensor) -> Tensor:
    if isinstance(inputs, Tensor) and inputs.ndim != 2:
        raise ValueError(f"inputs: expected shape (N, features), got {tuple(inputs.shape)}")
    return inputs


def _name(module: nn.Module) -> str:
    return type(module).__name__

"""Surgery that puts learned swaps into an existing bgflow flow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from bgflow import BoltzmannGenerator, ConditionalSplineTransformer, SwapFlow
from torch import Tensor, nn

from p4flows import surgery
from p4flows.bgflow.flows import SWAPS, P4InvSwap
from p4flows.checks import choice, items

__all__ = ["replace_swaps"]

_SWAPS = surgery.classes(SWAPS)


def replace_swaps(
    flow: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    init: str = "swap",
    rank: int | None = None,
    *,
    swap: type[nn.Module] = P4InvSwap,
    skip: Callable[[str, tuple[Tensor, ...]], bool] | None = None,
    seed: int = 0,
    **options: Any,
) -> int:
    """Put a learned swap in place of every bgflow ``SwapFlow`` in a flow, at any depth and in place.

    With ``init="swap"`` the flow computes the same function until the first optimizer step. Create the optimizer
    afterwards, since the flow has new parameters. A ``SwapFlow`` that is used in several places gives a layer of
    its own to each. All new layers are made before the first is put in place, so that an error leaves the flow as it
    was.

    Args:
        flow: a bgflow flow (or any module that contains some, but no ``BoltzmannGenerator``).
        example: its input, a tensor or a tuple of tensors: one pass of it shows the sizes of the swapped channels.
        init: "swap", or "reverse" for the paper's reversed permutation.
        rank: of the perturbations, or that a weight is followed with; capped at the number of features of narrower
            swaps. None for the layer's own default.
        swap: :class:`P4InvSwap`, :class:`InvertibleSwap`, or :class:`P4OrthogonalSwap` to preserve volume as bgflow's
            swaps do; or the class of :mod:`p4flows` that it is made of.
        skip: ``skip(name, channels)`` with the swap's path in the flow and the tensors that went into it in the example
            pass; where true, the swap is left as it is. Use it for channels of raw dihedrals: a dense map is no
            diffeomorphism of a torus.
        seed: the i-th new layer gets ``seed + i``.
        options: further arguments of the layer that the swap is made of, such as ``bias``.

    Warns:
        UserWarning: where nothing was replaced, and for a swap that the example pass does not reach; and, unless there
            is a ``skip``, if the flow has ``ConditionalSplineTransformer``, which accept an interval or a circle only.

    Returns:
        how many swaps were replaced.

    Raises:
        ValueError: if ``flow`` is a ``BoltzmannGenerator``, whose flow is ``generator.flow``, or itself a ``SwapFlow``,
            which has no place to put another into; if ``example`` does not fit; and for a wrong argument. Then nothing
            is replaced.
    """
    choice("init", init, ("swap", "reverse"))
    make, rank, seed = surgery.arguments(_SWAPS, swap, rank, seed, "swap")
    if isinstance(flow, BoltzmannGenerator):
        raise ValueError("flow: expected a flow, got a BoltzmannGenerator: pass its flow, generator.flow")
    surgery.check_contains("flow", flow, "a flow that contains SwapFlows", SwapFlow)
    inputs = (example,) if isinstance(example, Tensor) else example
    items("example", inputs, "one or more tensors", lambda x: isinstance(x, Tensor) and x.is_floating_point())

    new: list[tuple[surgery.Place, nn.Module]] = []
    for place, channels in _swapped(flow, inputs):
        if channels is None:
            surgery.warn(f"left alone, as the example does not reach it: {place.path}")
        elif skip is None or not skip(place.path, channels):
            dim0, dim1 = (x.shape[-1] for x in channels[:2])
            like = {"device": channels[0].device, "dtype": channels[0].dtype}
            layer = make(dim0, dim1, surgery.capped(rank, dim0 + dim1), init, seed=seed + len(new), **like, **options)
            new.append((place, layer.train(place.module.training)))
    for place, layer in new:  # not before all of them could be made
        setattr(place.parent, place.name, layer)
    if not new:
        reason = surgery.foreign(flow, own=("bgflow",))
        surgery.warn("replace_swaps found nothing to replace" + (reason and f"; {reason}"))
    elif skip is None and any(isinstance(module, ConditionalSplineTransformer) for module in flow.modules()):
        surgery.warn(
            "bounded splines (ConditionalSplineTransformer) accept an interval or a circle only, and a learned linear "
            "layer does not keep its outputs there: leave the swaps of such channels alone, by skip"
        )
    return len(new)


def _swapped(flow: nn.Module, inputs: tuple[Tensor, ...]) -> list[tuple[surgery.Place, tuple[Tensor, ...] | None]]:
    """The places of all swaps, with the channels that each of them got in a pass of ``inputs``."""
    places = list(surgery.places(flow, lambda module: isinstance(module, SwapFlow)))
    recorders = [_Recorder() for _ in places]
    try:
        for place, recorder in zip(places, recorders, strict=True):
            setattr(place.parent, place.name, recorder)
        with torch.no_grad():
            flow(*inputs)
    except (IndexError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"example: expected an input that the flow accepts; it says: {error}") from error
    finally:
        for place in places:
            setattr(place.parent, place.name, place.module)
    return [(place, recorder.channels) for place, recorder in zip(places, recorders, strict=True)]


class _Recorder(SwapFlow):
    """A SwapFlow that remembers its channels, in the order of the forward direction."""

    channels: tuple[Tensor, ...] | None = None

    def _forward(self, *xs: Tensor, **kwargs: Any) -> tuple[Tensor, ...]:
        self.channels = xs
        return super()._forward(*xs, **kwargs)

    def _inverse(self, *xs: Tensor, **kwargs: Any) -> tuple[Tensor, ...]:
        self.channels = (xs[1], xs[0], *xs[2:])
        return super()._inverse(*xs, **kwargs)

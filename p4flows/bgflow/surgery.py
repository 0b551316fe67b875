"""Surgery that puts learned swaps into an existing bgflow flow."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from bgflow import SwapFlow
from torch import Tensor, nn

from p4flows.bgflow.flows import P4InvSwap
from p4flows.checks import choice, integer, items

__all__ = ["replace_swaps"]


def replace_swaps(
    flow: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    init: str = "swap",
    rank: int = 1,
    *,
    skip: Callable[[str, tuple[Tensor, ...]], bool] | None = None,
    seed: int = 0,
    **options: Any,
) -> int:
    """Put a :class:`P4InvSwap` in place of every bgflow ``SwapFlow`` in a flow, at any depth and in place.

    With ``init="swap"`` the flow computes the same function until the first optimizer step. Create the optimizer
    afterwards, since the flow has new parameters. A ``SwapFlow`` that is used in several places gives a layer of
    its own to each.

    Args:
        flow: a bgflow flow (or any module that contains some).
        example: its input, a tensor or a tuple of tensors: one pass of it shows the sizes of the swapped channels.
        init: "swap", or "reverse" for the paper's reversed permutation.
        rank: of the perturbations; capped at the number of features of narrower swaps.
        skip: ``skip(name, channels)`` with the swap's path in the flow and the tensors that went into it in the example
            pass; where true, the swap is left as it is. Use it for channels of raw dihedrals: a dense map is no
            diffeomorphism of a torus.
        seed: the i-th new layer gets ``seed + i``.
        options: further arguments of :class:`p4flows.P4Inv`.

    Returns:
        how many swaps were replaced; zero is a warning, and so is a swap that the example pass does not reach.

    Raises:
        ValueError: for another ``init``, and if ``flow`` is itself a SwapFlow, which has no place to put another into.
    """
    choice("init", init, ("swap", "reverse"))
    rank, seed = integer("rank", rank, 1), integer("seed", seed)
    if not isinstance(flow, nn.Module) or isinstance(flow, SwapFlow):
        raise ValueError(f"flow: expected a flow that contains SwapFlows, got a {type(flow).__name__} itself")
    inputs = (example,) if isinstance(example, Tensor) else example
    items("example", inputs, "one or more tensors", lambda x: isinstance(x, Tensor) and x.is_floating_point())
    places = list(_swaps(flow))
    recorders = [_Recorder() for _ in places]
    try:
        for (_, parent, name, _), recorder in zip(places, recorders, strict=True):
            setattr(parent, name, recorder)
        with torch.no_grad():
            flow(*inputs)
    except (IndexError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"example: expected an input that the flow accepts; it says: {error}") from error
    finally:
        for _, parent, name, swap in places:
            setattr(parent, name, swap)

    replaced = 0
    for (path, parent, name, swap), recorder in zip(places, recorders, strict=True):
        channels = recorder.channels
        if channels is None:
            warnings.warn(f"left alone, as the example does not reach it: {path}", stacklevel=2)
            continue
        if skip is not None and skip(path, channels):
            continue
        dim0, dim1 = (x.shape[-1] for x in channels[:2])
        layer = P4InvSwap(
            dim0,
            dim1,
            min(rank, dim0 + dim1),
            init,
            seed=seed + replaced,
            device=channels[0].device,
            dtype=channels[0].dtype,
            **options,
        )
        setattr(parent, name, layer.train(swap.training))
        replaced += 1
    if not replaced:
        warnings.warn("replace_swaps found nothing to replace", stacklevel=2)
    return replaced


class _Recorder(SwapFlow):
    """A SwapFlow that remembers its channels, in the order of the forward direction."""

    channels: tuple[Tensor, ...] | None = None

    def _forward(self, *xs: Tensor, **kwargs: Any) -> tuple[Tensor, ...]:
        self.channels = xs
        return super()._forward(*xs, **kwargs)

    def _inverse(self, *xs: Tensor, **kwargs: Any) -> tuple[Tensor, ...]:
        self.channels = (xs[1], xs[0], *xs[2:])
        return super()._inverse(*xs, **kwargs)


def _swaps(root: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    for name, child in root._modules.items():
        if isinstance(child, SwapFlow):
            yield path + name, root, name, child
        elif child is not None:
            yield from _swaps(child, f"{path}{name}.")

"""P4Inv and the Bent identity as bgflow flows, learned swaps, surgery on existing flows, and bridges to bgflow."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

try:
    from bgflow import Energy, Flow, SwapFlow
except ImportError as error:
    raise ImportError("p4flows.bgflow needs bgflow: pip install 'p4flows[bgflow]'") from error
except AttributeError as error:
    raise ImportError("bgflow does not run with NumPy 2: pip install 'numpy<2'") from error

from p4flows._checks import choice, integer, items
from p4flows.activations import BentIdentity
from p4flows.invertible import P4Inv

__all__ = [
    "BentIdentityFlow",
    "P4InvFlow",
    "P4InvSwap",
    "as_bgflow_energy",
    "from_pppp",
    "replace_swaps",
    "to_pppp",
]


class P4InvFlow(P4Inv, Flow):
    """:class:`p4flows.P4Inv` as a bgflow ``Flow``: ``flow(x) -> (y, dlogp)``, ``flow(y, inverse=True)``.

    x is (..., features) and dlogp (..., 1). Arguments are those of :class:`p4flows.P4Inv`.

    >>> flow = P4InvFlow(4, init="reverse")
    >>> y, dlogp = flow(torch.randn(8, 4))
    >>> y.shape, dlogp.shape
    (torch.Size([8, 4]), torch.Size([8, 1]))
    """

    forward = Flow.forward

    def _forward(self, x: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        y, logabsdet = P4Inv.forward(self, x)
        return y, logabsdet[..., None]

    def _inverse(self, y: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        x, logabsdet = P4Inv.inverse(self, y)
        return x, logabsdet[..., None]


class BentIdentityFlow(BentIdentity, Flow):
    """:class:`p4flows.BentIdentity` as a bgflow ``Flow``: x (..., n) and dlogp (..., 1)."""

    forward = Flow.forward

    def _forward(self, x: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        y, logabsdet = BentIdentity.forward(self, x)
        return y, logabsdet[..., None]

    def _inverse(self, y: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        x, logabsdet = BentIdentity.inverse(self, y)
        return x, logabsdet[..., None]


class P4InvSwap(P4Inv, Flow):
    """A learned swap of two channels (Figure 9): ``(x0, x1, *rest) -> (y0, y1, *rest, dlogp)``.

    x0 (..., dim0) and x1 (..., dim1) are concatenated, mapped by a P4Inv layer, and split into y0 (..., dim1) and
    y1 (..., dim0). A dense map is no diffeomorphism of a torus: do not put one on channels that hold raw dihedrals
    and feed a circular transform.

    Args:
        dim0, dim1: sizes of the two channels.
        init: "swap" starts as bgflow's ``SwapFlow``, "reverse" as the reversed permutation of the paper; or
            anything else :class:`p4flows.P4Inv` takes.
        options: further arguments of :class:`p4flows.P4Inv`.

    >>> swap = P4InvSwap(1, 2)
    >>> y0, y1, dlogp = swap(torch.tensor([[1.0]]), torch.tensor([[2.0, 3.0]]))
    >>> y0.tolist(), y1.tolist()
    ([[2.0, 3.0]], [[1.0]])
    """

    forward = Flow.forward

    def __init__(self, dim0: int, dim1: int, rank: int = 1, init: str | Tensor = "swap", **options: Any) -> None:
        dim0, dim1 = integer("dim0", dim0, 1), integer("dim1", dim1, 1)
        if isinstance(init, str) and init == "swap":
            init = torch.arange(dim0 + dim1).roll(dim1)
        super().__init__(dim0 + dim1, rank, init=init, **options)
        self.dim0, self.dim1 = dim0, dim1

    def _forward(self, *xs: Tensor, **_: Any) -> tuple[Tensor, ...]:
        y, logabsdet = P4Inv.forward(self, _concatenate(xs, self.dim0, self.dim1))
        return (*y.split([self.dim1, self.dim0], -1), *xs[2:], logabsdet[..., None])

    def _inverse(self, *ys: Tensor, **_: Any) -> tuple[Tensor, ...]:
        x, logabsdet = P4Inv.inverse(self, _concatenate(ys, self.dim1, self.dim0))
        return (*x.split([self.dim0, self.dim1], -1), *ys[2:], logabsdet[..., None])


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


def as_bgflow_energy(energy: Any) -> Energy:
    """An ``OpenMMEnergy`` as a ``bgflow.Energy``: positions (..., 3 n_atoms) in nm to energies (..., 1) in kT.

    Its ``energy(x, temperature=T)`` divides by T, which is in units of the energy's own temperature.
    """
    if not isinstance(getattr(energy, "n_atoms", None), int) or not callable(energy):
        raise ValueError(f"energy: expected a p4flows.molecules.OpenMMEnergy, got {type(energy).__name__}")
    return _BridgedEnergy(energy)


class _BridgedEnergy(Energy):
    def __init__(self, energy: Any) -> None:
        super().__init__(3 * energy.n_atoms)
        self.bridge = energy

    def _energy(self, x: Tensor) -> Tensor:
        return self.bridge(x)[..., None]


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


def _concatenate(channels: tuple[Tensor, ...], dim0: int, dim1: int) -> Tensor:
    shapes = [tuple(getattr(x, "shape", ())) for x in channels[:2]]
    if [shape[-1:] for shape in shapes] != [(dim0,), (dim1,)] or shapes[0][:-1] != shapes[1][:-1]:
        raise ValueError(f"input: expected tensors of shapes (..., {dim0}) and (..., {dim1}), got {shapes}")
    return torch.cat(channels[:2], -1)


from p4flows._pppp import from_pppp, to_pppp  # noqa: E402  (needs P4InvFlow)

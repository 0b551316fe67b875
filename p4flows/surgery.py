"""What the plug-ins' surgery has in common: find layers in a model, and put others in their places, all or none."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from p4flows.checks import flag, integer

__all__ = [
    "Place",
    "arguments",
    "capped",
    "check_contains",
    "classes",
    "equivalent",
    "foreign",
    "name",
    "places",
    "put",
    "warn",
]


class Place(NamedTuple):
    """Where a module is: ``path`` from the root, the ``parent``, the ``name`` in it, and the ``module`` itself."""

    path: str
    parent: nn.Module
    name: str
    module: nn.Module


def places(root: nn.Module, wanted: Callable[[nn.Module], bool], path: str = "") -> Iterator[Place]:
    """The places of all wanted modules below ``root``; those of a module that is used twice are two."""
    for key, child in root._modules.items():  # named_children would skip a module that is used twice
        if child is None:
            continue
        if wanted(child):
            yield Place(path + key, root, key, child)
        else:
            yield from places(child, wanted, f"{path}{key}.")


def put(found: Iterable[Place], make: Callable[[nn.Module, int], nn.Module]) -> int:
    """Put ``make(old, i)`` in the places of the i-th distinct old module, and return how many there are of them.

    All new modules are made before the first is put in, so that an error leaves the model as it was. A module that is
    used in several places is replaced by one module in all of them.
    """
    found, new = list(found), dict[nn.Module, nn.Module]()
    for place in found:
        if place.module not in new:
            new[place.module] = make(place.module, len(new))
    for place in found:
        setattr(place.parent, place.name, new[place.module])
    return len(new)


def classes(made: Mapping[Any, Any]) -> dict[type, type]:
    """A plug-in's classes, given by the classes of the package that they are made of, also by themselves."""
    return {**made, **{cls: cls for cls in made.values()}}


def arguments(
    known: Mapping[type, type], given: Any, rank: int | None, seed: int, argument: str = "layer"
) -> tuple[type, int | None, int]:
    """The plug-in's class for what is given as ``argument``, the rank and the seed; ValueError for wrong ones."""
    rank, seed = None if rank is None else integer("rank", rank, 1), integer("seed", seed)
    made = known.get(given) if isinstance(given, type) else None
    if made is None:
        names = " or ".join(dict.fromkeys(cls.__name__ for cls in known.values()))
        raise ValueError(f"{argument}: expected {names}, got {given!r}")
    return made, rank, seed


def check_contains(argument: str, given: Any, expected: str, kinds: type | tuple[type, ...]) -> None:
    """ValueError unless what is given can contain modules of these kinds; one of them alone has no place for it."""
    if not isinstance(given, nn.Module) or isinstance(given, kinds):
        what = f"a {name(given)} itself" if isinstance(given, nn.Module) else repr(given)
        raise ValueError(f"{argument}: expected {expected}, got {what}")


def capped(rank: int | None, features: int) -> int | None:
    """The rank, at most that of a layer of this width; None stays None, which is the layer's own default."""
    return None if rank is None else min(rank, features)


@torch.no_grad()
def equivalent(
    make: Callable[..., nn.Module],
    old: nn.Module,
    matrix: Tensor,
    bias: Tensor | None,
    like: Tensor,
    options: Mapping[str, Any],
) -> nn.Module:
    """A new layer ``make(n, init=matrix, ...)`` with the matrix (or permutation), bias and mode of an old one.

    It gets the dtype and device of ``like``. ValueError where the old one has a bias and the options say
    ``bias=False``.
    """
    n = matrix.shape[0]
    if bias is not None and not flag("bias", options.get("bias", True)):
        raise ValueError(f"bias: expected True, since a {name(old)} has a bias")
    more = {**options, "rank": capped(options.get("rank"), n)}
    layer: Any = make(n, init=matrix.detach(), device=like.device, dtype=like.dtype, **more)
    if bias is not None:
        layer.bias.copy_(bias)
    return layer.train(old.training)


_SURGERY = {
    "nflows": "p4flows.nflows.replace_permutations",
    "glasflow": "p4flows.nflows.replace_permutations",
    "bgflow": "p4flows.bgflow.replace_swaps",
    "normflows": "p4flows.normflows.replace_permutations",
    "zuko": "p4flows.zuko.replace_permutations or p4flows.zuko.insert_linear",
}


def foreign(root: nn.Module, own: Iterable[str]) -> str:
    """For a model that is made by another library than ``own``: what to call for it; otherwise an empty string."""
    libraries = {type(module).__module__.partition(".")[0] for module in root.modules()}
    others = [library for library in _SURGERY if library in libraries and library not in own]
    return "; ".join(f"it is made of {library}: use {_SURGERY[library]}" for library in others)


def name(module: nn.Module) -> str:
    return type(module).__name__


def warn(text: str) -> None:
    """A UserWarning at the line that called the plug-in's function, which called this."""
    warnings.warn(text, stacklevel=3)

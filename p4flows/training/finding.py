"""Finding the P4 layers of a model, and what an optimizer holds of them, quickly enough for every step."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from itertools import chain
from operator import attrgetter, is_

from torch import nn
from torch.optim import Optimizer

from p4flows.perturbation import P4Layer

__all__ = ["Layers", "held", "refuse_sharded"]

_attributes, _children, _parameters = attrgetter("__dict__"), attrgetter("_modules"), attrgetter("_parameters")
_values = dict.values
_Held = tuple[list[nn.Parameter], frozenset[int]]
_held: weakref.WeakKeyDictionary[Optimizer, _Held] = weakref.WeakKeyDictionary()


class Layers:
    """The P4 layers of a model, by name, at any depth; those that are added, replaced or removed later too.

    The walk through the model is taken again only when some module of it has other children than before. What is known
    of a layer is asked for again only when one of its attributes, or one of the parameters in it, is not what it was.

    Attributes: version, a number that changes with all of this.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.version = 0
        self._modules: list[nn.Module] = []
        self._tree: list[nn.Module | None] = []
        self._layers: dict[str, P4Layer] = {}
        self._inside: list[nn.Module] = []  # the layers and what is in them
        self._things: list[object] = []
        self._facts: list[tuple] = []
        self._trained: list[P4Layer] = []

    def __call__(self) -> dict[str, P4Layer]:
        """All of them."""
        if not self._modules or not _same(chain.from_iterable(map(_values, map(_children, self._modules))), self._tree):
            layers = {name: module for name, module in self.model.named_modules() if isinstance(module, P4Layer)}
            refuse_sharded(self.model, layers.values())
            self._modules = list(self.model.modules())
            self._tree = list(chain.from_iterable(map(_values, map(_children, self._modules))))
            self._inside = list(nn.ModuleList(layers.values()).modules())[1:]
            self._layers, self._things = layers, []
        return self._layers

    def trained(self) -> list[P4Layer]:
        """Those that are not frozen."""
        layers = self().values()
        parameters = [p for p in chain.from_iterable(map(_values, map(_parameters, self._inside))) if p is not None]
        things = [*chain.from_iterable(map(_values, map(_attributes, layers))), *parameters]
        facts = [(p.requires_grad, p.dtype, p.device, p.shape) for p in parameters]
        if not self._things or facts != self._facts or not _same(things, self._things):
            refuse_sharded(self.model, layers)
            self._things, self._facts = things, facts
            self._trained = [layer for layer in layers if any(p.requires_grad for p in layer.perturbation)]
            self.version += 1
        return self._trained


def held(optimizer: Optimizer) -> frozenset[int]:
    """The ids of the parameters that the optimizer holds now."""
    parameters = list(chain.from_iterable(group["params"] for group in optimizer.param_groups))
    known = _held.get(optimizer)
    if known is None or not _same(parameters, known[0]):
        known = _held[optimizer] = parameters, frozenset(map(id, parameters))
    return known[1]


def refuse_sharded(model: nn.Module, layers: Iterable[P4Layer]) -> None:
    """ValueError if the layers' parameters are, or will be, spread over processes: a merge needs them whole."""
    tensors = [p for layer in layers for p in layer.perturbation]
    wrapped = any(_names(module) & {"FullyShardedDataParallel", "FSDPModule"} for module in model.modules())
    if tensors and (wrapped or any("DTensor" in _names(t) or not isinstance(t, nn.Parameter) for t in tensors)):
        raise ValueError(
            "model: its parameters are sharded over processes (FSDP), but a merge needs those of a layer whole; use "
            "DistributedDataParallel (DDP), with a ZeroRedundancyOptimizer if the optimizer's state is too large"
        )


def _same(now: Iterable[object], before: list) -> bool:
    now = list(now)
    return len(now) == len(before) and all(map(is_, now, before))


def _names(thing: object) -> set[str]:
    return {kind.__name__ for kind in type(thing).__mro__}

"""Optimizer steps and rounds of merges, counted for those layers that are trained together."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from torch.optim import Optimizer

from p4flows.perturbation import P4Layer
from p4flows.training.finding import held
from p4flows.training.optimizers import stepping

__all__ = ["Clock", "Clocks"]


class Clock:
    """Counts for the layers that one optimizer trains, or several that take turns on them.

    Attributes: names, those of the layers; steps of the optimizers; rounds of merges, by merge interval; unheard, the
    steps since the scheduler was called last. Optimizers are held weakly.
    """

    def __init__(self) -> None:
        self.names: frozenset[str] = frozenset()
        self.steps = 0
        self.rounds: dict[int, int] = defaultdict(int)
        self.unheard = 0
        self._optimizers: list[weakref.ref[Optimizer]] = []

    @property
    def optimizers(self) -> list[Optimizer]:
        """Those that are alive; the one that stepped last is the last."""
        return [optimizer for reference in self._optimizers if (optimizer := reference()) is not None]

    @property
    def stepping(self) -> list[Optimizer]:
        """Its optimizers and those inside them."""
        return [each for optimizer in self.optimizers for each in stepping(optimizer)]

    def serve(self, optimizer: Optimizer, names: frozenset[str]) -> None:
        """Count the steps of this one too; it trains the layers of these names."""
        self._optimizers = [weakref.ref(each) for each in [*self.optimizers, optimizer]]
        self.names |= names

    def knows(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer is one of this clock's, or inside one of them."""
        return any(optimizer is each for each in self.stepping)

    @property
    def held(self) -> frozenset[int]:
        """The ids of the parameters that its optimizers hold."""
        return frozenset().union(*map(held, self.optimizers))

    def serving(self, layers: Mapping[str, P4Layer]) -> frozenset[int]:
        """The ids of those layers that its optimizers step on; where none is alive, of those that they did."""
        if not self.optimizers:
            return frozenset(id(layer) for name, layer in layers.items() if name in self.names)
        ids = self.held
        return frozenset(id(layer) for layer in layers.values() if any(id(p) in ids for p in layer.perturbation))

    def state_dict(self) -> dict[str, Any]:
        return {"layers": sorted(self.names), "steps": self.steps, "rounds": dict(self.rounds)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.rounds = (
            state["steps"],
            defaultdict(int, {int(n): count for n, count in state["rounds"].items()}),
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_optimizers": self.optimizers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._optimizers = [weakref.ref(optimizer) for optimizer in state["_optimizers"]]


class Clocks(list):
    """One clock for all layers; or several, where several optimizers train different layers of the model."""

    def of(self, optimizers: Iterable[Optimizer]) -> Clock | None:
        """The clock that knows one of these optimizers."""
        return next((clock for clock in self if any(clock.knows(each) for each in optimizers)), None)

    def take(self, optimizer: Optimizer, layers: Mapping[str, P4Layer]) -> Clock:
        """The clock for an optimizer that is new, and trains these layers: that of the optimizer before it, or new."""

        def shared(clock: Clock) -> int:
            return len(clock.serving(layers)) or not (clock.optimizers or clock.names)

        clock = max(self, key=shared, default=None)
        if clock is None or not shared(clock):
            self.append(clock := Clock())
        clock.serve(optimizer, frozenset(layers))
        return clock

    def latest(self) -> Clock:
        """The clock that was made last."""
        if not self:
            self.append(Clock())
        return self[-1]

    def layers(self, clock: Clock, trained: list[P4Layer], layers: Mapping[str, P4Layer]) -> list[P4Layer]:
        """Those of the trained layers that this clock merges: all but those that only another clock serves.

        ``layers`` are all of the model, by name.
        """
        if len(self) == 1:
            return trained
        served = [each.serving(layers) for each in self if each is not clock]
        others = frozenset().union(*served) - clock.serving(layers)
        return [layer for layer in trained if id(layer) not in others]

    def state_dict(self) -> list[dict[str, Any]]:
        return [clock.state_dict() for clock in self]

    def load_state_dict(self, states: Iterable[dict[str, Any]]) -> None:
        """Go on from these counts, by the names of the layers; a clock that is not among them starts anew."""
        for clock in self:
            clock.steps, clock.rounds = 0, defaultdict(int)
        free = list(self)
        for state in states:
            names = frozenset(state["layers"])
            fits = [clock for clock in free if clock.names & names or not names or not clock.names]
            if fits:
                clock = max(fits, key=lambda clock: len(clock.names & names))
                free.remove(clock)
            else:
                self.append(clock := Clock())
                clock.names = names
            clock.load_state_dict(state)

"""Which layers of a model are merged when, whoever says that an optimizer has stepped."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from p4flows.checks import choice, integer
from p4flows.perturbation import P4Layer
from p4flows.training.clock import Clock, Clocks
from p4flows.training.finding import Layers, held
from p4flows.training.merging import Merging
from p4flows.training.optimizers import refuse_unknown, stepping, unwrapped
from p4flows.training.tally import Tally, Warnings

__all__ = ["Rounds"]


class Rounds:
    """Counts optimizer steps on the P4 layers of a model, and merges those whose interval has passed.

    The arguments are those of :class:`p4flows.MergeScheduler`.
    """

    def __init__(
        self, model: nn.Module, every: int | None, force_every: int | None, correct_every: int | None, reset: str
    ) -> None:
        self.every = None if every is None else integer("every", every, 1)
        self.force_every = None if force_every is None else integer("force_every", force_every, 1)
        self.correct_every = None if correct_every is None else integer("correct_every", correct_every, 1)
        self.reset = choice("reset", reset, ("momentum", "all", "v", "none"))
        if not isinstance(model, nn.Module):
            raise ValueError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        self.model = model
        self._warn = Warnings()
        self._tally = Tally(self._warn)
        self._clocks = Clocks()
        self._prepare()
        if not self._found():
            warnings.warn("MergeScheduler has nothing to merge: the model has no trainable P4 layer", stacklevel=3)

    def _prepare(self) -> None:
        """Make what is neither copied nor pickled."""
        self._lock = threading.RLock()
        self._found = Layers(self.model)
        self._merging = Merging(self._tally)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_found", "_merging")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._prepare()

    @property
    def layers(self) -> list[P4Layer]:
        """The layers this scheduler merges: those that are not frozen."""
        return list(self._found.trained())

    @property
    def steps(self) -> int:
        """The number of optimizer steps so far; where several optimizers train the layers, that of the most active."""
        return max((clock.steps for clock in self._clocks), default=0)

    @property
    def rounds(self) -> int:
        """The number of rounds of merges so far, of the layers that have had the most."""
        return max((count for clock in self._clocks for count in clock.rounds.values()), default=0)

    @property
    def counters(self) -> dict[str, int]:
        """What became of merges over all layers so far: merged, forced, partial, resets (not finite), and skipped.

        ``skipped`` counts all skips; ``skipped_update``, ``skipped_determinant``, ``skipped_range`` and
        ``skipped_not_finite`` those of each reason, see :class:`p4flows.MergeOutcome`. ``corrections`` counts all
        corrections of inverses, ``inversions`` those where only an inversion from nothing would do.
        """
        return self._tally.counters

    def history(self) -> dict[P4Layer, dict[str, Any]]:
        """What became of the merges of each layer, which :func:`p4flows.report` shows: merges, skips and share.

        merges and skips are counts over all matrices of the layer; share is the part of the time between optimizer
        steps that its merges have taken since the scheduler was made or loaded, None where that is not known.
        """
        counts, share = self._tally.by_layer, self._merging.share
        return {
            layer: {
                "merges": sum(counts.get(name, {}).get(key, 0) for key in ("merged", "forced", "partial")),
                "skips": counts.get(name, {}).get("skipped", 0),
                "share": share.of(name),
            }
            for name, layer in self.served().items()
        }

    def served(self) -> dict[str, P4Layer]:
        """All P4 layers by name, for whoever asks on behalf of another model: none if this one has been sharded."""
        try:
            return self._found()
        except ValueError:  # which its own optimizer is told
            return {}

    def merge(self) -> None:
        """Merge all layers now: one round, which counts towards ``force_every`` and ``correct_every``."""
        with self._lock:
            for clock in self._clocks or [self._clocks.latest()]:
                self._merge(clock)

    def penalty(self) -> Tensor:
        """Sum of the layers' penalties (Appendix A), a differentiable scalar to add to the loss."""
        return sum((layer.penalty() for layer in self.layers), torch.zeros((), dtype=torch.float64))

    def state_dict(self) -> dict[str, Any]:
        """Step, round and outcome counts, as plain numbers."""
        return {
            "version": 2,
            "steps": self.steps,
            "rounds": self.rounds,
            "clocks": self._clocks.state_dict(),
            "counters": self.counters,
            "counters_by_layer": self._tally.by_layer,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned. Intervals and reset mode stay those of the constructor."""
        if not isinstance(state, dict) or state.get("version") not in (1, 2):
            raise ValueError("state: expected the state_dict of a MergeScheduler, version 1 or 2")
        with self._lock:
            # Version 1 knew one optimizer and one interval, that of the constructor.
            one = {
                "layers": (),
                "steps": state["steps"],
                "rounds": {self.every or P4Layer.merge_every: state["rounds"]},
            }
            self._clocks.load_state_dict(state.get("clocks", [one]))
            self._tally.load(state["counters"], state.get("counters_by_layer", {}))

    def serve(self, *optimizers: Optimizer) -> None:
        """Say beforehand that these optimizers train the layers, each its own.

        ValueError if none of them holds the perturbation of a layer that is not frozen.
        """
        real = [unwrapped(optimizer) for optimizer in optimizers]
        ids = frozenset().union(*map(held, real))
        for name, layer in self._found().items():
            if any(p.requires_grad and id(p) not in ids for p in layer.perturbation):
                which = repr(name) if name else "the model itself"
                raise ValueError(
                    "optimizer: expected it to hold the perturbation of every P4 layer, but it lacks that of "
                    f"{which}; make the optimizer after the layers are in the model"
                )
        with self._lock:
            for optimizer in real:
                if any(id(p) in held(optimizer) for layer in self._found().values() for p in layer.perturbation):
                    self._clock([optimizer])

    # --- clocks -----------------------------------------------------------------------------------------------------

    def _clock(self, optimizers: list[Optimizer]) -> Clock:
        """The clock of the layers that these optimizers train; the first of them is the outermost."""
        clock = self._clocks.of(optimizers)
        if clock is None:
            ids = held(optimizers[0])
            mine = {n: layer for n, layer in self._found().items() if any(id(p) in ids for p in layer.perturbation)}
            refuse_unknown([*stepping(optimizers[0]), *optimizers], mine.values(), self.reset)
            clock = self._clocks.take(optimizers[0], mine)
        return clock

    def _interval(self, layer: P4Layer) -> int:
        return self.every or layer.merge_every

    def _tick(self, clock: Clock, steps: int) -> None:
        before, clock.steps = clock.steps, clock.steps + steps
        intervals = {self.every} if self.every else {layer.merge_every for layer in self._found.trained()}
        due = {interval for interval in intervals if clock.steps // interval > before // interval}
        if due:
            self._merge(clock, due)
        self._merging.share.tick()

    def _merge(self, clock: Clock, due: set[int] | None = None) -> None:
        """Merge the layers of these intervals, or all."""
        layers, optimizers = self._clocks.layers(clock, self._found.trained(), self._found()), clock.stepping
        version = self._found.version, *map(id, layers)
        groups = self._merging.groups(
            clock, version, layers, self._found(), lambda new: refuse_unknown(optimizers, new, self.reset)
        )
        due = {self._interval(group.layers[0]) for group in groups}.intersection(*[due] if due else [])
        for interval in due:
            clock.rounds[interval] += 1
        for group in groups:
            interval = self._interval(group.layers[0])
            if interval in due:
                force, correct = (
                    every is not None and clock.rounds[interval] % every == 0
                    for every in (self.force_every, self.correct_every)
                )
                look = clock.rounds[interval] % group.layers[0].look_every == 0
                with self._merging.share.measure(group.names, group.layers[0].perturbation[0].device):
                    self._merging.merge(group, optimizers, self.reset, force, correct, look)
        self._tally.end_round()

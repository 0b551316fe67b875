"""Merging many layers in groups, and what becomes of the optimizers' state where they have merged."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from p4flows.outcomes import MergeOutcome
from p4flows.perturbation import P4Layer
from p4flows.training.optimizer_state import StateReset
from p4flows.training.optimizers import full_rank
from p4flows.training.share import Share
from p4flows.training.tally import Tally

__all__ = ["Group", "Merging"]


class Group(NamedTuple):
    """Layers that are merged together.

    names are those in the model; redrawn and zeroed are the i-th such parameter of every layer; exact is whether a move
    from old directions to new ones loses nothing.
    """

    layers: Sequence[P4Layer]
    names: tuple[str, ...]
    redrawn: list[tuple[nn.Parameter, ...]]
    zeroed: list[tuple[nn.Parameter, ...]]
    exact: bool


class Merging:
    """Merges layers, and resets the optimizers' state as ``reset`` says."""

    def __init__(self, tally: Tally) -> None:
        self.tally = tally
        self.share = Share()
        self._known: dict[Hashable, tuple[Hashable, list[Group]]] = {}

    def groups(
        self,
        key: Hashable,
        version: Hashable,
        layers: Sequence[P4Layer],
        named: Mapping[str, P4Layer],
        check: Callable[[Sequence[P4Layer]], None],
    ) -> list[Group]:
        """The layers in groups: the last ones for this key, if they were of the same version; new ones are checked.

        ``named`` has the layers, and maybe others, by name.
        """
        known = self._known.get(key)
        if known is None or known[0] != version:
            check(layers)
            together = defaultdict(list)
            for layer in layers:
                together[type(layer), layer.merge_every, layer.group_key].append(layer)
            names = {layer: name for name, layer in named.items()}
            known = self._known[key] = version, [_group(each, names) for each in together.values()]
        return known[1]

    @torch.no_grad()
    def merge(
        self, group: Group, optimizers: Sequence[Optimizer], reset: str, force: bool, correct: bool, look: bool
    ) -> None:
        """Merge a group, whose parameters these optimizers step on.

        ``correct`` is whether all inverses are corrected afterwards; ``look`` whether those are that need it, which is
        found out in any case after a merge that was not a plain one.
        """
        layers, kind = group.layers, type(group.layers[0])
        redrawn, zeroed = ([StateReset(optimizers, c) for c in columns] for columns in (group.redrawn, group.zeroed))
        for state in redrawn + zeroed:
            state.look(only_weights=reset == "none", exact=group.exact)
        old = [torch.stack(column) for column in group.redrawn] if any(s.found for s in zeroed) else []
        outcomes = kind.merge_all(layers, force)
        self.tally.count(outcomes, group.names)
        changed = ~MergeOutcome.is_skip(outcomes)
        waits = not changed.is_cpu  # asking would mean waiting
        if waits or changed.any():
            new = [torch.stack(column) for column in group.redrawn[: len(old)]]
            moves = [kind.carried(*pair) for pair in zip(old, new, strict=True)]
            _carry_over(redrawn, zeroed, outcomes, moves, reset)
        look = look and bool(waits or changed.any())
        if correct or look or (not waits and (changed & (outcomes != MergeOutcome.MERGED)).any()):
            self.tally.count_corrections(kind.correct_all(layers, where_needed=not correct))


def _carry_over(
    redrawn: list[StateReset], zeroed: list[StateReset], outcomes: Tensor, moves: list[Tensor | None], reset: str
) -> None:
    broken = outcomes == MergeOutcome.RESET
    merged = ~MergeOutcome.is_skip(outcomes)
    if outcomes.ndim > 1:  # an optimizer counts the steps of a parameter as one
        broken, merged = (any_of.flatten(1).any(1) for any_of in (broken, merged))
    for states, on_merge in ((redrawn, reset in ("v", "all")), (zeroed, reset == "all")):
        for state in states:
            state.restart(merged if on_merge else broken)
            state.move(broken, None)
    for state in redrawn:
        state.move(merged & ~broken, None)
        if reset == "momentum":
            state.restart(merged, ["gradient"])
    for i, state in enumerate(zeroed):
        T = moves[i] if i < len(moves) else None
        state.move(merged & ~broken, T)
        if reset == "momentum" and T is not None:
            state.carry(merged & ~broken, T)
        elif reset == "momentum":
            state.restart(merged, ["gradient"])


def _group(layers: list[P4Layer], names: Mapping[P4Layer, str]) -> Group:
    kind = type(layers[0])
    redrawn, zeroed = (
        list(zip(*(getattr(each, name) for each in layers), strict=True)) for name in ("redrawn", "zeroed")
    )
    exact = all(map(full_rank, layers))
    return Group(kind.group(layers), tuple(names[each] for each in layers), redrawn, zeroed, exact)

"""When to merge, when to force and correct, and what becomes of the optimizer's state."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from p4flows._checks import choice, flag, integer
from p4flows.optimizer_state import StateReset
from p4flows.perturbation import Correction, MergeOutcome, P4Layer

__all__ = ["MergeScheduler", "attach_on_first_step"]


def attach_on_first_step(model: nn.Module, **options: Any) -> Callable[[], MergeScheduler | None]:
    """Attach a :class:`MergeScheduler` to whichever optimizer takes the first step on the model's P4 layers.

    For libraries that make the optimizer and run the loop inside one call, such as ``sbi``'s ``NPE.train``: call it
    where the model is built. ``options`` are those of :class:`MergeScheduler`. Returns a function that gives the
    scheduler, or None before that first step.

    >>> from p4flows import P4Inv
    >>> layer = P4Inv(4)
    >>> scheduler = attach_on_first_step(layer, every=1)
    >>> optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    >>> layer(torch.randn(8, 4))[0].square().mean().backward()
    >>> optimizer.step()
    >>> scheduler().counters["merged"]
    1
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    found: list[MergeScheduler] = []
    wanted = {id(p) for layer in model.modules() if isinstance(layer, P4Layer) for p in layer.zeroed + layer.redrawn}
    if not wanted:
        raise ValueError("model: expected one with a P4 layer")
    MergeScheduler(model, torch.optim.SGD(model.parameters()), **options)  # so that wrong options are an error here

    def first_step(optimizer: torch.optim.Optimizer, *arguments: Any) -> None:
        if any(id(p) in wanted for group in optimizer.param_groups for p in group["params"]):
            handle.remove()
            found.append(MergeScheduler(model, optimizer, **options).attach())
            found[0]._after_step(optimizer)

    handle = register_optimizer_step_post_hook(first_step)
    return lambda: found[0] if found else None


class MergeScheduler:
    """Merges the perturbations of every P4 layer in a model, every N optimizer steps (Algorithms 1 and 2).

    Args:
        model: any module; its P4 layers are found at any depth. Layers whose perturbation does not require
            gradients are frozen, and left alone.
        optimizer: the optimizer that trains them.
        every: N, the number of :meth:`step` calls between merges.
        force_every: every so many merges the bounds are ignored, so that the determinant can cross zero
            (Appendix B). None for never.
        correct_every: every so many merges all inverses are corrected, as the paper does (50), see
            :meth:`P4Inv.correct`. None for only where it is needed: after every round of merges an O(n²) estimate of
            the residual says where that is, and there they are corrected at once, whatever this is set to.
        reset: what goes back to its initial value in the optimizer's state when a layer has merged: "momentum", the
            first moments of U and V, which belong to the old V, while second moments and step counts say how large
            gradients are, whatever V; "v", all state of the redrawn V, as the authors' code does; "all", all state of
            U too, as the paper's text has it; "none". After a perturbation that was not finite, all of both goes back.
        add_penalty: add the gradient of :meth:`penalty` to the parameters' gradients just before each optimizer step,
            for training loops whose loss is out of reach. Otherwise add :meth:`penalty` to the loss yourself, or not.

    The state of other parameters is never touched. Works for every optimizer of ``torch.optim`` whose state starts
    from known values (SGD, Adam, AdamW, AMSGrad, RMSprop, NAdam, ..., fused and foreach too), before its first step
    as well.

    Raises:
        ValueError: for intervals below 1, an unknown ``reset``, or an optimizer that lacks a perturbation.

    Warns:
        UserWarning: if the model has no P4 layer to train.

    >>> from p4flows import P4Inv
    >>> layer = P4Inv(4)
    >>> optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)
    >>> scheduler = MergeScheduler(layer, optimizer, every=10)
    >>> for _ in range(20):
    ...     optimizer.zero_grad()
    ...     y, logabsdet = layer(torch.randn(8, 4))
    ...     (y.square().sum(-1) / 2 - logabsdet).mean().backward()
    ...     optimizer.step()
    ...     scheduler.step()
    >>> scheduler.counters["merged"]
    2
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        every: int = 10,
        force_every: int | None = 10,
        correct_every: int | None = None,
        reset: str = "momentum",
        add_penalty: bool = False,
    ) -> None:
        self.every = integer("every", every, 1)
        self.force_every = None if force_every is None else integer("force_every", force_every, 1)
        self.correct_every = None if correct_every is None else integer("correct_every", correct_every, 1)
        self.reset = choice("reset", reset, ("momentum", "all", "v", "none"))
        if not isinstance(model, nn.Module):
            raise ValueError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ValueError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
        self.optimizer = optimizer

        groups: dict[Any, list[P4Layer]] = defaultdict(list)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, layer in model.named_modules():
            if not isinstance(layer, P4Layer) or not any(p.requires_grad for p in layer.zeroed + layer.redrawn):
                continue
            if any(p.requires_grad and id(p) not in held for p in layer.zeroed + layer.redrawn):
                raise ValueError(
                    f"optimizer: expected it to hold the perturbation of every P4 layer, but it lacks that of {name!r}"
                )
            groups[type(layer), layer.group_key].append(layer)
        self._groups = [kind.group(layers) for (kind, _), layers in groups.items()]
        self._resets = [
            [
                [
                    StateReset(optimizer, column)
                    for column in zip(*(getattr(layer, name) for layer in group), strict=True)
                ]
                for name in ("redrawn", "zeroed")
            ]
            for group in self._groups
        ]
        if not groups:
            warnings.warn("MergeScheduler has nothing to merge: the model has no trainable P4 layer", stacklevel=2)

        self.steps = 0
        self.rounds = 0
        self._hook: torch.utils.hooks.RemovableHandle | None = None
        if flag("add_penalty", add_penalty):
            optimizer.register_step_pre_hook(self._before_step)
        # Outcomes are counted on the device and read only on demand.
        self._outcomes: dict[torch.device, Tensor] = {}
        self._corrections = torch.zeros(len(Correction), dtype=torch.int64)

    @property
    def layers(self) -> list[P4Layer]:
        """The layers this scheduler merges."""
        return [layer for group in self._groups for layer in group]

    @property
    def counters(self) -> dict[str, int]:
        """Merges over all layers so far: merged, forced, skipped, resets (not finite); and corrections of inverses.

        ``corrections`` counts all of them, ``inversions`` those where only an inversion from nothing would do.
        """
        totals = sum((c.cpu() for c in self._outcomes.values()), torch.zeros(4, dtype=torch.int64)).tolist()
        names = {
            MergeOutcome.MERGED: "merged",
            MergeOutcome.FORCED: "forced",
            MergeOutcome.SKIPPED: "skipped",
            MergeOutcome.RESET: "resets",
        }
        _, iterated, inverted = self._corrections.tolist()
        corrections = {"corrections": iterated + inverted, "inversions": inverted}
        return {name: totals[outcome] for outcome, name in names.items()} | corrections

    def step(self) -> None:
        """Count one optimizer step; merge at every N-th. Call it after ``optimizer.step()``."""
        self.steps += 1
        if self.steps % self.every == 0:
            self.merge()

    def merge(self) -> None:
        """Merge all layers now: one round, which counts towards ``force_every`` and ``correct_every``."""
        self.rounds += 1
        force = self.force_every is not None and self.rounds % self.force_every == 0
        correct = self.correct_every is not None and self.rounds % self.correct_every == 0
        for group, resets in zip(self._groups, self._resets, strict=True):
            outcomes = type(group[0]).merge_all(group, force)
            self._count(outcomes)
            self._reset_optimizer(resets, outcomes)
            if correct or outcomes.device.type != "cpu" or outcomes.any():  # elsewhere, asking would mean waiting
                done = type(group[0]).correct_all(group, where_needed=not correct)
                self._corrections += torch.bincount(done.flatten().cpu(), minlength=len(Correction))

    def penalty(self) -> Tensor:
        """Sum of the layers' penalties (Appendix A), a differentiable scalar to add to the loss."""
        return sum((layer.penalty() for layer in self.layers), torch.zeros((), dtype=torch.float64))

    def attach(self) -> MergeScheduler:
        """Call :meth:`step` after every ``optimizer.step()`` from now on, so that no loop needs a new line.

        A step that a gradient scaler skips is not counted. Attaching twice is the same as once. Returns self.
        """
        if self._hook is None:
            self._hook = self.optimizer.register_step_post_hook(self._after_step)
        return self

    def detach(self) -> None:
        """Undo :meth:`attach`."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def state_dict(self) -> dict[str, Any]:
        """Step, round and outcome counts, as plain numbers."""
        return {"version": 1, "steps": self.steps, "rounds": self.rounds, "counters": self.counters}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned. Intervals and reset mode stay those of the constructor."""
        if not isinstance(state, dict) or state.get("version") != 1:
            raise ValueError("state: expected the state_dict of a MergeScheduler, version 1")
        counters = state["counters"]
        self.steps, self.rounds = state["steps"], state["rounds"]
        inverted = counters.get("inversions", 0)  # of version 1, which did not count them
        self._corrections = torch.tensor([0, counters["corrections"] - inverted, inverted])
        outcomes = [counters[name] for name in ("skipped", "merged", "forced", "resets")]
        self._outcomes = {torch.device("cpu"): torch.tensor(outcomes, dtype=torch.int64)}

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        # A fused optimizer under a GradScaler unscales the gradients itself, after this.
        scale = getattr(optimizer, "grad_scale", None)
        with torch.enable_grad():
            penalty = self.penalty()
            if penalty.requires_grad:
                (penalty if scale is None else penalty * scale).backward()

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        # A fused optimizer under a GradScaler is called for skipped steps too, and finds out by itself.
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is None or not bool(found_inf):
            self.step()

    def _count(self, outcomes: Tensor) -> None:
        counts = self._outcomes.setdefault(outcomes.device, torch.zeros(4, dtype=torch.int64, device=outcomes.device))
        counts.index_add_(0, outcomes.flatten(), torch.ones_like(outcomes).flatten())

    def _reset_optimizer(self, resets: list[list[StateReset]], outcomes: Tensor) -> None:
        broken = outcomes == MergeOutcome.RESET
        merged = outcomes != MergeOutcome.SKIPPED
        if outcomes.ndim > 1:  # an optimizer counts the steps of a parameter as one
            broken, merged = (any_of.flatten(1).any(1) for any_of in (broken, merged))
        for columns, on_merge in zip(resets, (self.reset in ("v", "all"), self.reset == "all"), strict=True):
            for reset in columns:
                reset(merged if on_merge else broken)
                if self.reset == "momentum":
                    reset(merged, first_moments_only=True)

"""When to merge, when to force and correct, and what becomes of the optimizer's state."""

from __future__ import annotations

import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from p4flows.checks import choice, flag, integer
from p4flows.perturbation import Correction, MergeOutcome, P4Layer
from p4flows.training.hooks import watch, watchers
from p4flows.training.optimizer_state import StateReset

__all__ = ["MergeScheduler", "attach_on_first_step"]

_COUNTED = {
    "merged": MergeOutcome.MERGED,
    "forced": MergeOutcome.FORCED,
    "partial": MergeOutcome.PARTIAL,
    "resets": MergeOutcome.RESET,
    "skipped_update": MergeOutcome.SKIPPED_UPDATE,
    "skipped_determinant": MergeOutcome.SKIPPED_DETERMINANT,
    "skipped_range": MergeOutcome.SKIPPED_RANGE,
    "skipped_not_finite": MergeOutcome.SKIPPED_NOT_FINITE,
}
_Group = tuple[Sequence[P4Layer], list[list[StateReset]]]  # with what resets their columns, redrawn and zeroed ones

_ROUNDS_BETWEEN_LOOKS = 100
_TOLERATED_SKIPS = 0.1
_STEPS_WITHOUT_A_CALL = 200


def attach_on_first_step(model: nn.Module, **options: Any) -> Callable[[], MergeScheduler | None]:
    """Merge the model's P4 layers in whatever training comes, by whichever optimizer steps on them.

    For libraries that make the optimizer and run the loop inside one call, such as ``sbi``'s ``NPE.train``: call it
    where the model is built. A new optimizer, in a second training, takes the place of the first. ``options`` are those
    of :class:`MergeScheduler`. Returns a function that gives the scheduler, or None before the first step.

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
    if not any(layer.perturbation for layer in _p4_layers(model).values()):
        raise ValueError("model: expected one with a P4 layer")
    scheduler = weakref.ref(MergeScheduler(model, None, **options).attach())

    def current() -> MergeScheduler | None:
        found = scheduler()
        return found if found is not None and found.optimizer is not None else None

    return current


class MergeScheduler:
    """Merges the perturbations of every P4 layer in a model, every N optimizer steps (Algorithms 1 and 2).

    Args:
        model: any module; its P4 layers are found at any depth. Layers whose perturbation does not require
            gradients are frozen, and left alone until they are unfrozen; layers that are added later are found.
        optimizer: the optimizer that trains them. When another optimizer steps on the layers later, an attached
            scheduler goes on with that one.
        every: N, the number of :meth:`step` calls between merges. None for what each kind of layer asks for
            (``merge_every``): 10 for P4Inv and P4Linear, 1 for InvertibleLinear.
        force_every: every so many merges the bounds are ignored, so that the determinant can cross zero
            (Appendix B). None for never.
        correct_every: every so many merges all inverses are corrected, as the paper does (50), see
            :meth:`P4Inv.correct`. None for only where it is needed: after every round of merges an O(n²) estimate of
            the residual says where that is, and there they are corrected at once, whatever this is set to.
        reset: what becomes of the optimizer's state when a layer has merged. "momentum": the first moments of U and V,
            which belong to the old V, are moved to the new V as far as its directions were covered by the old, and
            otherwise start from zero; second moments and step counts stay, as they say how large gradients are,
            whatever V. "v": all state of the redrawn V starts anew, as in the authors' code; "all": all state of U
            too, as the paper's text has it; "none". After a perturbation that was not finite, all of both starts anew.
        add_penalty: add the gradient of :meth:`penalty` to the parameters' gradients just before each optimizer step,
            for training loops whose loss is out of reach. Otherwise add :meth:`penalty` to the loss yourself, or not.

    The state of other parameters is never touched. Works for every optimizer of ``torch.optim`` whose state starts
    from known values (SGD, Adam, AdamW, AMSGrad, RMSprop, NAdam, ..., fused and foreach too), before its first step
    as well.

    :attr:`counters` tell what became of the merges. When ``skipped_determinant`` grows, the layers were given
    ``bounds_det`` that their determinants have rightly left: widen them or leave them out. When ``skipped_update``
    grows, single updates make the matrix nearly singular: lower the learning rate of U and V, merge more often, or set
    ``add_penalty``. ``skipped_range`` and ``resets`` are signs of a training that diverges.

    Raises:
        ValueError: for intervals below 1, an unknown ``reset``, or an optimizer that lacks a perturbation.

    Warns:
        UserWarning: if the model has no P4 layer to train; if more than a tenth of the merges of a hundred rounds were
            skipped; if a weight is not finite; if the optimizer takes 200 steps and :meth:`step` is not called; and if
            another attached scheduler's layers are taken over.

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
        optimizer: torch.optim.Optimizer | None,
        every: int | None = None,
        force_every: int | None = 10,
        correct_every: int | None = None,
        reset: str = "momentum",
        add_penalty: bool = False,
    ) -> None:
        self.every = None if every is None else integer("every", every, 1)
        self.force_every = None if force_every is None else integer("force_every", force_every, 1)
        self.correct_every = None if correct_every is None else integer("correct_every", correct_every, 1)
        self.reset = choice("reset", reset, ("momentum", "all", "v", "none"))
        self.add_penalty = flag("add_penalty", add_penalty)
        if not isinstance(model, nn.Module):
            raise ValueError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        self.model = model
        self.optimizer = None if optimizer is None else _real(optimizer)
        self.steps = 0
        self.attached = False
        self._rounds: dict[int, int] = defaultdict(int)  # by merge interval
        # Outcomes are counted on the device and read only on demand.
        self._outcomes: dict[torch.device, Tensor] = {}
        self._corrections = torch.zeros(len(Correction), dtype=torch.int64)
        self._looked = {"rounds": 0, "merges": 0, "skipped": 0}
        self._unheard = 0
        self._warned: set[str] = set()
        self._start()
        if self.optimizer is not None:
            self._require(self.optimizer)
        if not self._groups():
            warnings.warn("MergeScheduler has nothing to merge: the model has no trainable P4 layer", stacklevel=2)

    def _start(self) -> None:
        """What is neither copied nor pickled."""
        self._held: weakref.WeakKeyDictionary[torch.optim.Optimizer, tuple[int, set[int]]] = weakref.WeakKeyDictionary()
        self._grouped: list[_Group] = []
        self._grouped_for: Any = None
        watch(self)
        if self.add_penalty:
            self._take_over("add_penalty")

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("_held", "_grouped", "_grouped_for")
        return {name: value for name, value in self.__dict__.items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        attached, self.attached = self.attached, False
        self._start()
        if attached:
            self.attach()

    def __repr__(self) -> str:
        every = "each layer's own" if self.every is None else self.every
        state = "attached" if self.attached else "not attached"
        counts = ", ".join(f"{name}={count}" for name, count in self.counters.items() if count)
        return f"MergeScheduler({len(self.layers)} layers, every={every}, {state}, steps={self.steps}; {counts})"

    @property
    def layers(self) -> list[P4Layer]:
        """The layers this scheduler merges."""
        return [layer for group, _ in self._groups() for layer in group]

    @property
    def rounds(self) -> int:
        """The number of rounds of merges so far, of the layers that have had the most."""
        return max(self._rounds.values(), default=0)

    @property
    def counters(self) -> dict[str, int]:
        """What became of merges over all layers so far: merged, forced, partial, resets (not finite), and skipped.

        ``skipped`` counts all skips; ``skipped_update``, ``skipped_determinant``, ``skipped_range`` and
        ``skipped_not_finite`` those of each reason, see :class:`p4flows.MergeOutcome`. ``corrections`` counts all
        corrections of inverses, ``inversions`` those where only an inversion from nothing would do.
        """
        size = len(MergeOutcome)
        totals = sum((c.cpu() for c in self._outcomes.values()), torch.zeros(size, dtype=torch.int64))
        _, iterated, inverted = self._corrections.tolist()
        counts = {name: int(totals[outcome]) for name, outcome in _COUNTED.items()}
        skipped = int(totals[MergeOutcome.is_skip(torch.arange(size))].sum())
        return {**counts, "skipped": skipped, "corrections": iterated + inverted, "inversions": inverted}

    def step(self) -> None:
        """Count one optimizer step; merge the layers whose interval has passed. Call it after ``optimizer.step()``."""
        self.steps += 1
        self._unheard = 0
        self._merge([(layers, r) for layers, r in self._groups() if self.steps % self._interval(layers) == 0])

    def merge(self) -> None:
        """Merge all layers now: one round, which counts towards ``force_every`` and ``correct_every``."""
        self._merge(self._groups())

    def _interval(self, layers: Sequence[P4Layer]) -> int:
        return self.every or layers[0].merge_every

    def _merge(self, groups: list[_Group]) -> None:
        for interval in {self._interval(layers) for layers, _ in groups}:
            self._rounds[interval] += 1
        for layers, resets in groups:
            rounds = self._rounds[self._interval(layers)]
            force = self.force_every is not None and rounds % self.force_every == 0
            correct = self.correct_every is not None and rounds % self.correct_every == 0
            kept = self.reset == "momentum" and any(resets)
            old = [_column(layers, "redrawn", i) for i in range(len(layers[0].redrawn))] if kept else []
            outcomes = type(layers[0]).merge_all(layers, force)
            self._count(outcomes)
            self._reset_optimizer(layers, resets, outcomes, old)
            changed = ~MergeOutcome.is_skip(outcomes)
            if correct or not changed.is_cpu or changed.any():  # elsewhere, asking would mean waiting
                done = type(layers[0]).correct_all(layers, where_needed=not correct)
                self._corrections += torch.bincount(done.flatten().cpu(), minlength=len(Correction))
        self._look()

    def penalty(self) -> Tensor:
        """Sum of the layers' penalties (Appendix A), a differentiable scalar to add to the loss."""
        return sum((layer.penalty() for layer in self.layers), torch.zeros((), dtype=torch.float64))

    def attach(self) -> MergeScheduler:
        """Call :meth:`step` after every optimizer step on the layers from now on, so that no loop needs a new line.

        A step that a gradient scaler skips is not counted. The model keeps the scheduler alive. Attaching twice is the
        same as once. Returns self.
        """
        if not self.attached:
            self._take_over("attached")
            self.attached = True
            # Not as an attribute that a copy of the model would copy, and the optimizer with it.
            self.model.__dict__.setdefault("_p4flows", _Tie()).schedulers.append(self)
        return self

    def detach(self) -> None:
        """Undo :meth:`attach`, and ``add_penalty`` with it."""
        self.attached = self.add_penalty = False
        tie = self.model.__dict__.get("_p4flows")
        if tie is not None and self in tie.schedulers:
            tie.schedulers.remove(self)

    def _take_over(self, what: str) -> None:
        mine = {id(p) for p in self._parameters()}
        for other in watchers():
            if other is self or not isinstance(other, MergeScheduler) or not getattr(other, what):
                continue
            if mine & {id(p) for p in other._parameters()}:
                warnings.warn(f"another MergeScheduler serves these layers; it is detached: {other!r}", stacklevel=4)
                other.detach()

    def state_dict(self) -> dict[str, Any]:
        """Step, round and outcome counts, as plain numbers."""
        return {"version": 2, "steps": self.steps, "rounds": dict(self._rounds), "counters": self.counters}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned. Intervals and reset mode stay those of the constructor."""
        if not isinstance(state, dict) or state.get("version") not in (1, 2):
            raise ValueError("state: expected the state_dict of a MergeScheduler, version 1 or 2")
        counters = state["counters"]
        self.steps = state["steps"]
        # Version 1 knew one interval, that of the constructor.
        rounds = state["rounds"] if state["version"] == 2 else {self.every or P4Layer.merge_every: state["rounds"]}
        self._rounds = defaultdict(int, rounds)
        inverted = counters.get("inversions", 0)  # of version 1, which did not count them
        self._corrections = torch.tensor([0, counters["corrections"] - inverted, inverted])
        outcomes = torch.zeros(len(MergeOutcome), dtype=torch.int64)
        for name, outcome in _COUNTED.items():
            outcomes[outcome] = counters.get(name, 0)
        outcomes[MergeOutcome.SKIPPED] = counters["skipped"] - sum(counters.get(n, 0) for n in _COUNTED if "skip" in n)
        self._outcomes = {torch.device("cpu"): outcomes}
        self._looked = {"rounds": self.rounds, "merges": int(outcomes.sum()), "skipped": counters["skipped"]}

    # --- what optimizer steps tell (p4flows.training.hooks) ---------------------------------------------------------

    def concerns(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the optimizer holds a perturbation of the model."""
        if optimizer is self.optimizer:
            return True
        held = self._parameters_of(optimizer)
        return any(id(p) in held for p in self._parameters())

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Add the gradient of the penalty, if that was asked for."""
        if not self.add_penalty:
            return
        # A fused optimizer under a GradScaler unscales the gradients itself, after this.
        scale = getattr(optimizer, "grad_scale", None)
        with torch.enable_grad():
            penalty = self.penalty()
            if penalty.requires_grad:
                (penalty if scale is None else penalty * scale).backward()

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the step, if attached; otherwise notice where nobody does."""
        # A fused optimizer under a GradScaler is called for skipped steps too, and finds out by itself.
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            return
        if self.attached:
            if optimizer is not self.optimizer:
                self.optimizer, self._grouped_for = optimizer, None
            self.step()
            return
        self._unheard += 1
        if self._unheard == _STEPS_WITHOUT_A_CALL:
            self._warn_once(
                "unheard",
                f"the optimizer has taken {_STEPS_WITHOUT_A_CALL} steps since MergeScheduler.step() was called last: "
                "call it after every optimizer.step(), or attach() the scheduler once",
            )

    # --- layers and their optimizer ---------------------------------------------------------------------------------

    def _parameters(self) -> list[nn.Parameter]:
        return [p for layer in _p4_layers(self.model).values() for p in layer.perturbation]

    def _parameters_of(self, optimizer: torch.optim.Optimizer) -> set[int]:
        size = sum(len(group["params"]) for group in optimizer.param_groups)
        known = self._held.get(optimizer)
        if known is None or known[0] != size:
            known = size, {id(p) for group in optimizer.param_groups for p in group["params"]}
            self._held[optimizer] = known
        return known[1]

    def _require(self, optimizer: torch.optim.Optimizer) -> None:
        held = self._parameters_of(optimizer)
        for name, layer in _p4_layers(self.model).items():
            if any(p.requires_grad and id(p) not in held for p in layer.perturbation):
                raise ValueError(
                    f"optimizer: expected it to hold the perturbation of every P4 layer, but it lacks that of {name!r}"
                )

    def _groups(self) -> list[_Group]:
        """The layers that are trained now, in groups, each with what resets the optimizer's state of its columns."""
        groups: dict[Any, list[P4Layer]] = defaultdict(list)
        for layer in _p4_layers(self.model).values():
            if any(p.requires_grad for p in layer.perturbation):
                groups[type(layer), layer.group_key].append(layer)
        found = [(kind, key, list(map(id, layers))) for (kind, key), layers in groups.items()]
        if found != self._grouped_for:
            self._grouped_for = found
            self._grouped = [(kind.group(layers), self._resets(layers)) for (kind, _), layers in groups.items()]
        return self._grouped

    def _resets(self, layers: list[P4Layer]) -> list[list[StateReset]]:
        if self.optimizer is None:
            return [[], []]
        columns = [zip(*(getattr(layer, name) for layer in layers), strict=True) for name in ("redrawn", "zeroed")]
        return [[StateReset(self.optimizer, column) for column in each] for each in columns]

    # --- what came of it --------------------------------------------------------------------------------------------

    def _count(self, outcomes: Tensor) -> None:
        zeros = torch.zeros(len(MergeOutcome), dtype=torch.int64, device=outcomes.device)
        counts = self._outcomes.setdefault(outcomes.device, zeros)
        counts.index_add_(0, outcomes.flatten(), torch.ones_like(outcomes).flatten())
        if outcomes.device.type == "cpu" and (outcomes == MergeOutcome.SKIPPED_NOT_FINITE).any():
            self._warn_not_finite()

    def _reset_optimizer(
        self, layers: Sequence[P4Layer], resets: list[list[StateReset]], outcomes: Tensor, old: list[Tensor]
    ) -> None:
        broken = outcomes == MergeOutcome.RESET
        merged = ~MergeOutcome.is_skip(outcomes)
        if outcomes.ndim > 1:  # an optimizer counts the steps of a parameter as one
            broken, merged = (any_of.flatten(1).any(1) for any_of in (broken, merged))
        redrawn, zeroed = resets
        for columns, on_merge in ((redrawn, self.reset in ("v", "all")), (zeroed, self.reset == "all")):
            for reset in columns:
                reset(merged if on_merge else broken)
        if self.reset != "momentum":
            return
        for reset in redrawn:
            reset(merged, first_moments_only=True)
        for i, reset in enumerate(zeroed):
            T = type(layers[0]).carried(old[i], _column(layers, "redrawn", i)) if i < len(old) else None
            if T is None:
                reset(merged, first_moments_only=True)
            else:
                reset.carry(merged & ~broken, T)

    def _look(self) -> None:
        """Now and then, whether merges are skipped: a training that quietly stops merging learns nothing more."""
        if self.rounds - self._looked["rounds"] < _ROUNDS_BETWEEN_LOOKS:
            return
        counters = self.counters
        merges = sum(counters[name] for name in _COUNTED if "skip" not in name) + counters["skipped"]
        seen = {"rounds": self.rounds, "merges": merges, "skipped": counters["skipped"]}
        share = (seen["skipped"] - self._looked["skipped"]) / max(1, merges - self._looked["merges"])
        self._looked = seen
        if counters["skipped_not_finite"]:
            self._warn_not_finite()
        elif share > _TOLERATED_SKIPS:
            reasons = ", ".join(f"{name} {count}" for name, count in counters.items() if "skipped_" in name and count)
            self._warn_once(
                "skips",
                f"{share:.0%} of the last merges were skipped ({reasons or 'no reason given'}), so that the layers "
                "hardly learn; the documentation of MergeScheduler says what to do",
            )

    def _warn_not_finite(self) -> None:
        self._warn_once("finite", "a weight is not finite, and is not followed: the training has diverged")

    def _warn_once(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(message, stacklevel=2)


class _Tie:
    """Keeps attached schedulers alive as long as their model; copies of the model, and pickles, start without."""

    def __init__(self) -> None:
        self.schedulers: list[MergeScheduler] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> _Tie:
        return _Tie()

    def __reduce__(self) -> tuple[type, tuple]:
        return _Tie, ()


def _column(layers: Sequence[P4Layer], name: str, i: int) -> Tensor:
    """The i-th of these parameters of every layer, (len(layers), ...), as they are now."""
    return torch.stack([getattr(layer, name)[i].detach() for layer in layers])


def _p4_layers(model: nn.Module) -> dict[str, P4Layer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, P4Layer)}


def _real(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer itself, where a library hands out a wrapper that is none (accelerate's, for one)."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    return optimizer

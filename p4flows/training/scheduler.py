"""When to merge, when to force and correct, and what becomes of the optimizer's state."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn
from torch.optim import Optimizer

from p4flows.checks import flag
from p4flows.training.finding import held
from p4flows.training.gradients import add_gradients, listen
from p4flows.training.hooks import watch, watchers
from p4flows.training.optimizers import unwrapped
from p4flows.training.rounds import Rounds
from p4flows.training.tie import tie, untie

__all__ = ["MergeScheduler"]

_STEPS_WITHOUT_A_CALL = 200
_GRADIENTS_WITHOUT_A_STEP = 500


class MergeScheduler(Rounds):
    """Merges the perturbations of every P4 layer in a model, every N optimizer steps (Algorithms 1 and 2).

    Args:
        model: any module; its P4 layers are found at any depth. Layers whose perturbation does not require
            gradients are frozen, and left alone until they are unfrozen; layers that are added later are found.
        optimizer: the optimizer that trains them, or None for whichever steps on them. When another optimizer steps on
            the layers later, the scheduler goes on with that one; where several train different layers, the steps of
            each are counted for its own.
        every: N, the number of optimizer steps between merges. None for what each kind of layer asks for
            (``merge_every``): 1 for InvertibleLinear and P4Lipschitz, 10 for the others.
        force_every: every so many merges the bounds are ignored, so that the determinant can cross zero
            (Appendix B). None for never.
        correct_every: every so many merges all inverses are corrected, as the paper does (50), see
            :meth:`P4Inv.correct`. None for only where it is needed: after every round of merges (of InvertibleLinear,
            every tenth) an O(n²) estimate of the residual says where, and there they are corrected at once in any case.
        reset: what becomes of the optimizer's state when a layer has merged. "momentum": the first moments of U and V,
            which belong to the old V, are moved to the new V as far as its directions were covered by the old, and
            otherwise start from zero; second moments and step counts stay, as they say how large gradients are,
            whatever V. "v": all state of the redrawn V starts anew, as in the authors' code; "all": all state of U
            too, as the paper's text has it; "none". After a perturbation that was not finite, all of both starts anew.
        add_penalty: add the gradient of :meth:`penalty` to the parameters' gradients just before each optimizer step,
            for training loops whose loss is out of reach. Otherwise add :meth:`penalty` to the loss yourself, or not.

    The state of other parameters is never touched. Works for every optimizer of ``torch.optim`` (LBFGS excepted), fused
    and foreach too, before its first step as well; for Lion; and for what wraps one of them, such as SAM, accelerate's
    ``prepare()`` and ZeroRedundancyOptimizer. Merges come after the outermost step. The second copy of the weights of
    schedule-free optimizers is moved along if the perturbation has full rank, P4Inv(n, rank=n). InvertibleLinear works
    with any optimizer that evaluates the loss at the weights alone, and so neither with SAM nor with a line search.
    What an optimizer changes between steps reaches its A at the next merge: call ``settle()`` of the layers after the
    ``eval()`` of a schedule-free one.

    :attr:`counters` tell what became of the merges. When ``skipped_determinant`` grows, the layers were given
    ``bounds_det`` that their determinants have rightly left: widen them or leave them out. When ``skipped_update``
    grows, single updates make the matrix nearly singular: lower the learning rate of U and V, merge more often, or set
    ``add_penalty``. ``skipped_range`` and ``resets`` are signs of a training that diverges.

    Raises:
        ValueError: for intervals below 1, an unknown ``reset``, an optimizer that lacks a perturbation, one whose state
            a merge would make wrong, and parameters that are sharded over processes (FSDP): here, or at the first step.

    Warns:
        UserWarning: if the model has no P4 layer; if more than a tenth of the merges of a hundred rounds were skipped;
            if a weight is not finite; if the optimizer takes 200 steps and :meth:`step` is not called; if the layers
            get gradients 500 times and no step is seen; if :meth:`step` is called although it is attached; and if the
            layers of another attached scheduler, whose optimizer lives, are taken over.

    >>> import torch
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
        optimizer: Optimizer | None,
        every: int | None = None,
        force_every: int | None = 10,
        correct_every: int | None = None,
        reset: str = "momentum",
        add_penalty: bool = False,
    ) -> None:
        super().__init__(model, every, force_every, correct_every, reset)
        self.add_penalty = flag("add_penalty", add_penalty)
        self.attached = False
        self._heard = False  # of steps, since it was attached
        self._kept: Optimizer | None = None  # the latest, unless attached
        self._unused_gradients = 0
        if optimizer is not None:
            self._kept = unwrapped(optimizer)
            self.serve(self._kept)
        self._start()

    def _start(self) -> None:
        if self.add_penalty:
            self._take_over("add_penalty")
        watch(self)
        listen(self, self.layers, "gradient_came")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        attached, self.attached = self.attached, False
        self._start()
        if attached:
            self.attach()

    def __repr__(self) -> str:
        every = "each layer's own" if self.every is None else self.every
        state = "attached" if self.attached else "not attached"
        counts = "".join(f", {name}={count}" for name, count in self.counters.items() if count)
        return (
            f"MergeScheduler({len(self.layers)} layers, every={every}, {state}, steps={self.steps}, "
            f"rounds={self.rounds}{counts})"
        )

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer that trains the layers, or the latest of them. An attached scheduler does not keep it alive."""
        alive = [optimizer for clock in self._clocks for optimizer in clock.optimizers]
        return self._kept if self._kept is not None or not alive else alive[-1]

    def step(self) -> None:
        """Count optimizer steps; merge the layers whose interval has passed. Call it after ``optimizer.step()``.

        It counts the steps that optimizers have taken on the layers since it was called last, and at least one. So
        it may also be called every so many steps, as bgflow's ``KLTrainer`` does.
        """
        with self._lock:
            self._unused_gradients = 0
            if self.attached and self._heard:
                self._warn("the scheduler is attached: step() need not be called, and does nothing", "attached")
                return
            for clock in [clock for clock in self._clocks if clock.unheard] or [self._clocks.latest()]:
                steps, clock.unheard = max(1, clock.unheard), 0
                self._tick(clock, steps)

    def attach(self) -> MergeScheduler:
        """Count every optimizer step on the layers from now on, and merge after it, so that no loop needs a new line.

        A step that a gradient scaler skips is not counted. The model keeps the scheduler alive. Attaching twice is the
        same as once. Returns self.
        """
        if not self.attached:
            self._take_over("attached")
            self.attached, self._heard, self._kept = True, False, None
            tie(self.model, self)
        return self

    def detach(self) -> None:
        """Undo :meth:`attach`, and ``add_penalty`` with it."""
        if self.attached:
            self._kept = self.optimizer
        self.attached = self.add_penalty = False
        untie(self.model, self)

    # --- what optimizer steps tell (p4flows.training.hooks) ---------------------------------------------------------

    def concerns(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer holds a perturbation of the model."""
        if self._clocks.of([optimizer]) is not None:
            return True
        ids = held(optimizer)
        try:
            return any(id(p) in ids for layer in self._found().values() for p in layer.perturbation)
        except RuntimeError:  # another thread is building the model at this moment
            return False
        except ValueError:  # the model has been sharded, which is no concern of the optimizers of others
            if any(id(p) in ids for p in self.model.parameters()):
                raise
            return False

    def before_step(self, optimizer: Optimizer) -> None:
        """Add the gradient of the penalty, if that was asked for."""
        if self.add_penalty:
            add_gradients(self.layers, optimizer)

    def after_step(self, optimizers: list[Optimizer]) -> None:
        """Take the step, if attached; otherwise notice where nobody does."""
        # A fused optimizer under a GradScaler is called for skipped steps too, and finds out by itself.
        for optimizer in optimizers:
            found_inf = getattr(optimizer, "found_inf", None)
            if found_inf is not None and bool(found_inf):
                return
        with self._lock:
            self._unused_gradients = 0
            clock = self._clock(optimizers)
            if self.attached:
                self._heard = True
                self._tick(clock, 1)
                return
            self._kept = clock.optimizers[-1]
            clock.unheard += 1
            if clock.unheard == _STEPS_WITHOUT_A_CALL:
                self._warn(
                    f"the optimizer has taken {_STEPS_WITHOUT_A_CALL} steps since MergeScheduler.step() was called "
                    "last: call it after every optimizer.step(), or attach() the scheduler once",
                    "unheard",
                )

    def _take_over(self, what: str) -> None:
        mine = {id(p) for layer in self._found().values() for p in layer.perturbation}
        for other in watchers():
            if other is self or not isinstance(other, MergeScheduler) or not getattr(other, what):
                continue
            if any(id(p) in mine for layer in other.served().values() for p in layer.perturbation):
                if other.attached and other.optimizer is not None:  # otherwise its training has ended
                    message = f"another MergeScheduler serves these layers; it is detached: {other!r}"
                    warnings.warn(message, stacklevel=4)
                other.detach()

    def gradient_came(self) -> None:
        """Notice gradients that come and come without a step, as where an optimizer is not torch's."""
        self._unused_gradients += 1
        if self._unused_gradients == _GRADIENTS_WITHOUT_A_STEP:
            self._warn(
                f"the layers have got gradients {_GRADIENTS_WITHOUT_A_STEP} times since the last optimizer step that "
                "MergeScheduler was told of, so that nothing is merged: call step() after each step, as attach() sees "
                "only the steps of a torch.optim.Optimizer",
                "gradients",
            )

"""The P4 contract of Section 3.1 (Algorithm 1): what a property-preserving layer is, and how to write one.

Property-preserving parameter perturbations (P4) train a layer whose parameters must stay in a *feasible set* S: all
invertible matrices, all orthogonal ones, all of spectral norm 1 or less. To make an element of S from nothing is hard,
but to change one into another is often easy. So the layer has two kinds of parameters,

* the frozen A in S, which are buffers, with whatever is derived from them (an inverse, a determinant, a norm), and
* a small trained *perturbation* B, which are parameters.

It computes with ``R_B(A)``, where the map ``R_B`` takes S to S, and the optimizer sees B alone. A value B₀ of the
perturbation is the identity, ``R_B₀(A) = A``. Every N optimizer steps the perturbation is *merged*,

    A ← R_B(A)        (equation 3)
    B ← B₀            (equation 4)

which leaves the function of the layer as it is, and A in S.

Writing your own
----------------
Derive from :class:`P4Layer`, which is an ordinary ``torch.nn.Module``, and say

============================  ==========================================================================================
S and A                       ``__init__`` registers A in S as buffers; ``violation`` measures how far A is from S.
B, and B₀                     ``perturbation`` names the parameters of B. A layer starts at B₀. ``zeroed`` are those of
                              them that are zero at B₀; ``redrawn`` are random directions, for which any value will do
                              as long as the others are zero, and which a merge draws anew. Neither is compulsory.
``R_B(A)``                    ``forward`` computes with it, without forming it where that is expensive.
merge                         ``merge`` carries out both equations, in place and under ``no_grad``. It first asks
                              whether the result is sane, and otherwise changes nothing (SKIPPED). With ``force`` it
                              goes beyond those bounds that are there for safety only, never beyond S.
reset                         ``reset`` is equation 4 alone: B ← B₀, and A stays. The function goes back to that of A.
what is not finite            No buffer may ever become infinite or NaN. A merge of a perturbation that is not finite is
                              a reset, and says so (RESET).
a perturbation that leaves S  Where ``R_B`` cannot be kept within S for every B, ``merge`` skips, or scales the
                              perturbation back (PARTIAL); then the function changes with the merge.
correction                    ``correct`` repairs what rounding did to A and to what is derived from it. Does nothing by
                              default.
penalty                       ``penalty`` is a term for the loss that keeps B where it can be merged. Zero by default.
random numbers                Those of ``redrawn`` must be a function of buffers, such as a seed and a counter of
                              merges: then all processes of a data-parallel run, and a resumed run, draw the same.
                              :class:`p4flows.LowRank` does this for a perturbation ``U Vᵀ``.
============================  ==========================================================================================

:class:`p4flows.MergeScheduler` speaks to this contract only, so that it merges any such layer; and
:func:`p4flows.testing.check_perturbation` tests any of them. For averages over training, :class:`p4flows.AveragedModel`
asks for two members more, ``trained_matrix`` and ``set_matrix``; see there.

Scale factors that stay positive, multiplied by ``exp(b)`` with b = 0 at B₀:

>>> from p4flows import MergeOutcome
>>> class Positive(P4Layer):
...     def __init__(self, features: int) -> None:
...         super().__init__()
...         self.features = features
...         self.register_buffer("a", torch.ones(features))
...         self.b = nn.Parameter(torch.zeros(features))
...
...     @property
...     def perturbation(self) -> tuple[nn.Parameter, ...]:
...         return (self.b,)
...
...     zeroed = perturbation
...
...     def forward(self, x: Tensor) -> Tensor:
...         return x * self.a * self.b.exp()
...
...     @torch.no_grad()
...     def merge(self, force: bool = False) -> Tensor:
...         new, finite = self.a * self.b.exp(), self.b.isfinite().all()
...         sane = finite & (new.isfinite() & (new > 0)).all()
...         self.a.copy_(torch.where(sane, new, self.a))
...         self.b.masked_fill_(sane | ~finite, 0)
...         outcome = torch.where(sane, int(MergeOutcome.MERGED), int(MergeOutcome.SKIPPED))
...         return outcome.where(finite, int(MergeOutcome.RESET))
...
...     @torch.no_grad()
...     def reset(self) -> None:
...         self.b.zero_()
...
...     def violation(self) -> Tensor:
...         return (-self.a).clamp(min=0).max().double()
>>> from p4flows.testing import check_perturbation
>>> check_perturbation(lambda: Positive(3), skip=["copies"])  # pickles want a class that can be imported
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from p4flows.outcomes import Correction

__all__ = ["P4Layer", "observers"]

observers: list[Callable[[P4Layer], None]] = []
"""Who is told of every P4 layer that is made, copied or unpickled."""


class P4Layer(nn.Module, ABC):
    """A layer trained by property-preserving parameter perturbations (P4), as the head of this module describes.

    Section 3.1 of Krämer, Köhler, Noé (arXiv:2010.07033). The class methods exist so that many small layers can be
    merged by a few calls, and default to a loop.
    """

    merge_every: int = 10
    """The merge interval N that a :class:`p4flows.MergeScheduler` uses where it is given none."""

    look_every: int = 1
    """After how many rounds of plain merges a scheduler calls ``correct_all(..., where_needed=True)``."""

    deferred: bool = False
    """Whether the layer computes with A alone, so that the perturbation takes effect at the merge only.

    So it is where A follows weights that are trained without constraint (error feedback, :class:`InvertibleLinear`);
    the gradient with respect to A goes to these weights. Then a merge does change the function, and may take a part of
    the perturbation and leave the rest for later.
    """

    additive: bool = False
    """Whether ``R_B(A) - A`` is linear in ``zeroed``.

    Then copies of these parameters that an optimizer keeps can be moved along when a merge changes the directions.
    """

    def __init__(self) -> None:
        super().__init__()
        _tell(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # of copies and pickles, which are not initialised
        _tell(self)

    @property
    @abstractmethod
    def perturbation(self) -> tuple[nn.Parameter, ...]:
        """The trained parameters B that a merge moves into the frozen ones."""

    @property
    def zeroed(self) -> tuple[nn.Parameter, ...]:
        """The perturbation parameters that a merge and a reset set to zero; none by default."""
        return ()

    @property
    def redrawn(self) -> tuple[nn.Parameter, ...]:
        """The perturbation parameters that a merge and a reset draw anew; none by default."""
        return ()

    @abstractmethod
    def merge(self, force: bool = False) -> Tensor:
        """Merge the perturbation into the frozen parameters; with ``force``, even outside the bounds.

        Returns the value of a :class:`MergeOutcome`, an int64 tensor on the layer's device: 0-d, or one for each
        of many matrices in the layer.
        """

    @abstractmethod
    def reset(self) -> None:
        """Drop the perturbation without merging it: the function goes back to that of the frozen parameters."""

    @abstractmethod
    def violation(self) -> Tensor:
        """How far the frozen parameters, and what is derived from them, are from the property: the test of the layer.

        A number of 0 or more without a unit, () in float64, which is zero up to rounding as long as all is well. It is
        a diagnostic, and may be expensive.
        """

    def correct(self) -> Tensor:
        """Repair what rounding did to the frozen parameters and to what is derived from them; nothing by default.

        Returns the value of a :class:`Correction`, an int64 tensor, 0-d or one for each of many matrices.
        """
        return torch.tensor(int(Correction.NONE), device=self.perturbation[0].device)

    def penalty(self) -> Tensor:
        """Differentiable scalar () that keeps the perturbation where it can be merged; zero, in float64, by default."""
        return torch.zeros((), dtype=torch.float64, device=self.perturbation[0].device)

    def diagnostics(self) -> dict[str, Tensor]:
        """What is worth watching in training, by name: 0-d tensors, or one number for each of many matrices.

        It costs at most O(n²), and changes nothing. The names are those of :func:`p4flows.report`, which shows others
        too. There is nothing by default.
        """
        return {}

    @classmethod
    def carried(cls, old: Tensor, new: Tensor) -> Tensor | None:
        """What becomes of an average of gradients of a zeroed parameter when the redrawn one beside it changes.

        The i-th parameter of ``zeroed`` and the i-th of ``redrawn`` belong together. For the latter before and after a
        merge of L layers, ``old`` and ``new`` (L, ...), this is the matrix T (L, k, k) with which the average (..., k)
        is multiplied; or None, the default, where it has no meaning any more and starts from zero.
        """
        return None

    @property
    def group_key(self) -> Hashable:
        """Layers of one type with equal keys may be handed to :meth:`merge_all` together."""
        return id(self)

    @classmethod
    def group(cls, layers: Iterable[P4Layer]) -> Sequence[P4Layer]:
        """Layers of equal ``group_key`` in the form that makes repeated calls of :meth:`merge_all` cheap."""
        return list(layers)

    @classmethod
    def merge_all(cls, layers: Sequence[P4Layer], force: bool = False) -> Tensor:
        """Merge layers of equal ``group_key``; the outcomes, (len(layers), ...), which may say why one was skipped."""
        return torch.stack([_outcome(layer, layer.merge(force)) for layer in layers])

    @classmethod
    def correct_all(cls, layers: Sequence[P4Layer], where_needed: bool = False) -> Tensor:
        """Correct layers of equal ``group_key``, or only those that a cheap test finds in need; (len(layers), ...)."""
        return torch.stack([layer.correct() for layer in layers])


def _outcome(layer: P4Layer, given: Any) -> Tensor:
    if not isinstance(given, Tensor):
        raise TypeError(
            f"{type(layer).__name__}.merge: expected a MergeOutcome as an int64 tensor, such as "
            f"torch.tensor(int(MergeOutcome.MERGED)), got {given!r}"
        )
    return given


def _tell(layer: P4Layer) -> None:
    for observer in observers:
        observer(layer)

"""The P4 contract of Section 3.1: frozen property-bearing parameters, a perturbation, and its merge."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Sequence
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Correction", "MergeOutcome", "P4Layer", "observers"]

observers: list[Callable[[P4Layer], None]] = []
"""Who is told of every P4 layer that is made, copied or unpickled."""


class MergeOutcome(IntEnum):
    """What became of a merge.

    SKIPPED: nothing changed, because a bound was violated or the result could not be stored.
    MERGED: the perturbation is in the frozen parameters, and starts anew.
    FORCED: the same, although a bound was violated.
    RESET: the perturbation was not finite; it starts anew, without a merge.
    PARTIAL: a part of the perturbation is in the frozen parameters, and the rest of it remains.

    :meth:`P4Layer.merge` returns one of these. :meth:`P4Layer.merge_all` may say why a merge was skipped:

    SKIPPED_UPDATE: the update is out of the bounds on ln|G|.
    SKIPPED_DETERMINANT: the new determinant is out of the bounds on ln|G det A|.
    SKIPPED_RANGE: the new matrices would not be finite, or the update is singular.
    SKIPPED_NOT_FINITE: the perturbation is not finite, and the layer does not drop it.
    """

    SKIPPED = 0
    MERGED = 1
    FORCED = 2
    RESET = 3
    PARTIAL = 4
    SKIPPED_UPDATE = 5
    SKIPPED_DETERMINANT = 6
    SKIPPED_RANGE = 7
    SKIPPED_NOT_FINITE = 8

    @staticmethod
    def is_skip(outcomes: Tensor) -> Tensor:
        """Whether nothing changed, a bool tensor of the shape of ``outcomes``."""
        return (outcomes == MergeOutcome.SKIPPED) | (outcomes >= MergeOutcome.SKIPPED_UPDATE)

    @staticmethod
    def without_reason(outcomes: Tensor) -> Tensor:
        """The outcomes with SKIPPED for a skip of whatever reason."""
        return outcomes.masked_fill(MergeOutcome.is_skip(outcomes), int(MergeOutcome.SKIPPED))


class Correction(IntEnum):
    """What a correction did.

    NONE: nothing, since none was needed.
    ITERATED: a few steps of hyperpower iteration.
    INVERTED: an inversion from nothing, since the inverse was too far off for an iteration to converge.
    """

    NONE = 0
    ITERATED = 1
    INVERTED = 2


class P4Layer(nn.Module, ABC):
    """A layer trained by property-preserving parameter perturbations (P4).

    The layer computes with the perturbed parameters ``R_B(A)``. Only the perturbation B is trained; ``A`` is
    frozen and changes in :meth:`merge` (``A <- R_B(A)``, equation 3; ``B <- B0``, equation 4), which leaves the
    layer's function as it is. Section 3.1 of Krämer, Köhler, Noé (arXiv:2010.07033).

    A subclass names the parameters of its perturbation, and those that a merge sets to zero or draws anew. The class
    methods exist so that many small layers can be merged by a few calls, and default to a loop.
    """

    merge_every: int = 10
    """The merge interval N that a :class:`p4flows.MergeScheduler` uses where it is given none."""

    look_every: int = 1
    """After how many rounds of plain merges a scheduler calls ``correct_all(..., where_needed=True)``."""

    def __init__(self) -> None:
        super().__init__()
        _tell(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # of copies and pickles, which are not initialised
        _tell(self)

    @property
    @abstractmethod
    def perturbation(self) -> tuple[nn.Parameter, ...]:
        """The trained parameters that a merge moves into the frozen ones."""

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
    def correct(self) -> Tensor:
        """Repair what rounding did to the frozen parameters' derived quantities.

        Returns the value of a :class:`Correction`, an int64 tensor, 0-d or one for each of many matrices.
        """

    @abstractmethod
    def penalty(self) -> Tensor:
        """Differentiable scalar that keeps the perturbation where it can be merged."""

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
        return torch.stack([layer.merge(force) for layer in layers])

    @classmethod
    def correct_all(cls, layers: Sequence[P4Layer], where_needed: bool = False) -> Tensor:
        """Correct layers of equal ``group_key``, or only those that a cheap test finds in need; (len(layers), ...)."""
        return torch.stack([layer.correct() for layer in layers])


def _tell(layer: P4Layer) -> None:
    for observer in observers:
        observer(layer)

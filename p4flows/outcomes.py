"""What became of a merge, and of a correction."""

from __future__ import annotations

from enum import IntEnum

from torch import Tensor

__all__ = ["Correction", "MergeOutcome"]


class MergeOutcome(IntEnum):
    """What became of a merge.

    - SKIPPED: nothing changed, because a bound was violated or the result could not be stored.
    - MERGED: the perturbation is in the frozen parameters, and starts anew.
    - FORCED: the same, although a bound was violated.
    - RESET: the perturbation was not finite; it starts anew, without a merge.
    - PARTIAL: a part of the perturbation is in the frozen parameters; the rest of it remains (InvertibleLinear), or is
      dropped, since it would have left the feasible set (P4Lipschitz).

    :meth:`p4flows.P4Layer.merge` returns one of these, as an int64 tensor. :meth:`p4flows.P4Layer.merge_all` may say
    why a merge was skipped:

    - SKIPPED_UPDATE: the update is out of the bounds on ln|G|.
    - SKIPPED_DETERMINANT: the new determinant is out of the bounds on ln|G det A|.
    - SKIPPED_RANGE: the new matrices would not be finite, or the update is singular.
    - SKIPPED_NOT_FINITE: the perturbation is not finite, and the layer does not drop it.
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

    - NONE: nothing, since none was needed.
    - ITERATED: a few steps of an iteration, such as the hyperpower iteration for an inverse.
    - INVERTED: what is derived was made from nothing, since it was too far off for an iteration to converge.
    """

    NONE = 0
    ITERATED = 1
    INVERTED = 2

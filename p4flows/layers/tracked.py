"""What layers with a tracked matrix have in common: their view of it, its correction, and the check of inputs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from p4flows.layers.inputs import require_rows
from p4flows.tracking import algebra
from p4flows.tracking.correction import correct_, drifted_
from p4flows.tracking.estimates import condition_estimate, residual_estimate
from p4flows.tracking.group import Group
from p4flows.tracking.matrix import TrackedMatrix

__all__ = ["Tracked"]

_LEGACY = {
    **{name: name for name in ("A", "A_inv", "A_double", "A_inv_double", "rounding")},
    **{"sign_A": "sign", "logabsdet_A": "logabsdet"},
}


def _of_tracked(name: str, text: str) -> Any:
    return property(
        lambda layer: getattr(layer.tracked, name), lambda layer, value: setattr(layer.tracked, name, value), doc=text
    )


class Tracked(nn.Module):
    """A layer that has a :class:`p4flows.tracking.matrix.TrackedMatrix`, or many under *batch, as ``tracked``.

    ``gathered`` names the layer's other tensors that its merges need.
    """

    features: int
    tracked: TrackedMatrix
    gathered: tuple[str, ...] = ()

    A = _of_tracked("A", "The frozen matrix, (*batch, n, n).")
    A_inv = _of_tracked("A_inv", "The inverse of the frozen matrix, (*batch, n, n).")
    A_double = _of_tracked("A_double", "What A is rounded from, in float64; None in a layer that is in float64 itself.")
    A_inv_double = _of_tracked("A_inv_double", "What A_inv is rounded from, as ``A_double``.")
    sign_A = _of_tracked("sign", "The sign of det A, (*batch) in float64.")
    logabsdet_A = _of_tracked("logabsdet", "ln|det A|, (*batch) in float64.")
    rounding = _of_tracked("rounding", "The part of ``logabsdet_A`` that is owed to the rounding of A, (*batch).")

    @property
    @abstractmethod
    def sign(self) -> Tensor:
        """Sign of the effective determinant, (*batch) in float64."""

    @property
    @abstractmethod
    def logabsdet(self) -> Tensor:
        """ln|det| of the effective matrix, (*batch) in float64, differentiable."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"  # in one line, without the module ``tracked``

    def residual(self) -> Tensor:
        """``max|A A_inv - I|`` of the frozen pair, (*batch). A diagnostic, O(n³)."""
        return self.tracked.residual()

    @classmethod
    def group(cls, layers: Iterable[Any]) -> Group:
        """Layers of equal ``group_key``, to be merged and corrected together."""
        return Group(layers, cls.gathered)

    @classmethod
    def _grouped(cls, layers: Sequence[Any]) -> Group:
        return layers if isinstance(layers, Group) else cls.group(layers)

    @classmethod
    def _joined(cls, outcomes: list[Tensor], layers: Sequence[Any]) -> Tensor:
        outcome = outcomes[0] if len(outcomes) == 1 else torch.cat(outcomes)
        return outcome.view(len(layers), *layers[0].sign_A.shape)

    def correct(self, order: int | None = None) -> Tensor:
        """Correct A_inv by hyperpower iteration, and recompute log|det A| and its sign by LU, all in float64.

        ``order`` is 2, 3 or 7 for one step of that order, see :mod:`p4flows.tracking.hyperpower`; by default
        as many steps are taken as get A_inv down to rounding with the fewest products. Where the iteration cannot
        converge (Frobenius norm of ``I - A A_inv`` of 1 or more) A is inverted instead, which is logged. Whatever is
        not finite is not stored. O(n³); waits for the device. Returns the :class:`p4flows.Correction`, an int64 tensor
        (*batch).
        """
        if order is not None and (type(order) is not int or order not in (2, 3, 7)):
            raise ValueError(f"order: expected 2, 3, 7 or None, got {order!r}")
        return self._joined([correct_(state, order=order) for state in self.group([self]).states()], [self])[0]

    @classmethod
    def correct_all(cls, layers: Sequence[Any], where_needed: bool = False) -> Tensor:
        """Correct layers of equal ``group_key``; the :class:`p4flows.Correction` of each, (len(layers), *batch).

        With ``where_needed`` only where an O(n²) estimate of the Frobenius norm of ``I - A A_inv``, from four random
        vectors, is above ε of the layer's dtype (1e-10 for float64, or 1000 times what rounding leaves).
        """
        states = cls._grouped(layers).states()
        return cls._joined([correct_(state, drifted_(state) if where_needed else None) for state in states], layers)

    def violation(self) -> Tensor:
        """``max|A A⁻¹ - I|`` of the frozen pair in float64, () in float64: nothing where A⁻¹ is the inverse of A."""
        return algebra.residual(*self.tracked.exact).abs().max()

    def diagnostics(self) -> dict[str, Tensor]:
        """Estimates of residual and condition of the frozen pair, and sign and log|det| of the effective matrix."""
        with torch.no_grad():
            return {
                "residual": residual_estimate(self.tracked),
                "logabsdet": self.logabsdet,
                "sign": self.sign,
                "condition": condition_estimate(self.tracked),
            }

    def _check(self, x: Tensor, leading: Sequence[int] = ()) -> None:
        require_rows(x, self.tracked.A, leading)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        # Versions 1 and 2 of the state had the matrices in the layer itself.
        for old, new in _LEGACY.items():
            if prefix + old in state_dict:
                state_dict[f"{prefix}tracked.{new}"] = state_dict.pop(prefix + old)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

"""P4Inv and InvertibleLinear as lazy transforms of zuko, and surgery that puts them into an existing zuko flow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Transform, constraints

from p4flows import surgery
from p4flows.checks import flag
from p4flows.installing import missing
from p4flows.layers.dense import InvertibleLinear as _InvertibleLinear
from p4flows.layers.invertible import P4Inv

try:
    from zuko.flows.autoregressive import MaskedAutoregressiveTransform
    from zuko.flows.coupling import GeneralCouplingTransform
    from zuko.flows.spline import CircularRQSTransform
    from zuko.lazy import Flow, LazyComposedTransform, LazyTransform, UnconditionalTransform
    from zuko.transforms import LULinearTransform, PermutationTransform, RotationTransform
except ImportError as error:
    raise missing("p4flows.zuko", "zuko", "zuko") from error

__all__ = ["InvertibleLinear", "P4InvLinear", "insert_linear", "replace_permutations"]


class _Map(Transform):
    """The forward or the inverse direction of a layer, as torch and zuko call a transform."""

    domain = codomain = constraints.real_vector
    bijective = True

    def __init__(self, layer: Any, backwards: bool = False) -> None:
        super().__init__()
        self.layer, self.backwards = layer, backwards

    @property
    def inv(self) -> Transform:
        return _Map(self.layer, not self.backwards)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer.inverse(x) if self.backwards else self.layer(x)

    def _call(self, x: Tensor) -> Tensor:
        return self.call_and_ladj(x)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.call_and_ladj(x)[1]


class _Lazy(LazyTransform):
    make: type[nn.Module]

    def __init__(self, features: int, **options: Any) -> None:
        super().__init__()
        self.layer = self.make(features, **options)

    def forward(self, c: Tensor | None = None) -> Transform:
        """The transformation of vectors (..., features); the context is ignored."""
        return _Map(self.layer)


class P4InvLinear(_Lazy):
    """:class:`p4flows.P4Inv` as a zuko ``LazyTransform`` of vectors (..., features); it is the attribute ``layer``.

    >>> transform = P4InvLinear(3, init="reverse")()
    >>> y, ladj = transform.call_and_ladj(torch.tensor([1.0, 2.0, 3.0]))
    >>> y.tolist(), ladj.item(), transform.inv(y).tolist()
    ([3.0, 2.0, 1.0], 0.0, [1.0, 2.0, 3.0])
    """

    make = P4Inv


class InvertibleLinear(_Lazy):
    """:class:`p4flows.InvertibleLinear` as a zuko ``LazyTransform`` of vectors; it is the attribute ``layer``."""

    make = _InvertibleLinear


_LAYERS = surgery.classes({P4Inv: P4InvLinear, _InvertibleLinear: InvertibleLinear})
_LINEAR = (PermutationTransform, LULinearTransform, RotationTransform)


def replace_permutations(
    flow: nn.Module,
    rank: int | None = None,
    *,
    layer: type[nn.Module] = P4InvLinear,
    linear: bool = False,
    seed: int = 0,
    **options: Any,
) -> int:
    """Put a learned linear layer, at first the same map, in place of every lazy ``PermutationTransform``, all or none.

    With ``linear`` also of every ``LULinearTransform``, and ``RotationTransform`` as in zuko's ``GF``. Arguments and
    errors are those of :func:`p4flows.normflows.replace_permutations`. ``MAF``, ``NSF`` and ``NICE`` have no such
    transform: see :func:`insert_linear`. Returns how many layers were replaced; zero is a warning.
    """
    make, rank, seed = surgery.arguments(_LAYERS, layer, rank, seed)
    surgery.check_contains("flow", flow, "a zuko flow", UnconditionalTransform)
    kinds, like = _LINEAR if flag("linear", linear) else _LINEAR[:1], next(flow.parameters(), torch.empty(0))

    @torch.no_grad()
    def new(old: nn.Module, i: int) -> nn.Module:
        made, attribute = old(), {PermutationTransform: "order", RotationTransform: "R"}.get(old.f)
        matrix = getattr(made, attribute) if attribute else made.L.double() @ made.U.double()
        return surgery.equivalent(make, old, matrix, None, like, {**options, "rank": rank, "seed": seed + i})

    lazy = surgery.places(flow, lambda module: isinstance(module, UnconditionalTransform) and module.f in kinds)
    replaced = surgery.put(lazy, new)
    if not replaced:
        hint = "linear=True replaces LU and rotations, insert_linear puts layers between autoregressive transforms"
        surgery.warn(f"replace_permutations found nothing to replace; {surgery.foreign(flow, own=('zuko',)) or hint}")
    return replaced


def insert_linear(
    flow: nn.Module, rank: int | None = None, *, layer: type[nn.Module] = P4InvLinear, seed: int = 0, **options: Any
) -> int:
    """Put a learned linear layer, the identity at first, behind each autoregressive or coupling transform but the last.

    For ``MAF``, ``NSF``, ``NICE`` and the like, and sbi's estimators made of them; none where a linear layer or a
    permutation follows already. Arguments and errors are those of :func:`replace_permutations`. Warns for circular
    splines, since a dense map is no diffeomorphism of a torus. Returns how many were put in; zero is a warning.
    """
    make, rank, seed = surgery.arguments(_LAYERS, layer, rank, seed)
    surgery.check_contains("flow", flow, "a zuko flow", UnconditionalTransform)
    kinds, inserted, new = (MaskedAutoregressiveTransform, GeneralCouplingTransform), 0, []
    for part in [m for m in flow.modules() if isinstance(m, Flow) and isinstance(m.transform, LazyComposedTransform)]:
        old, transforms, features = list(part.transform.transforms), [], part.base().event_shape[-1]
        like = next(part.parameters(), torch.empty(0))
        for i, transform in enumerate(old):
            transforms.append(transform)
            further = isinstance(transform, kinds) and any(isinstance(later, kinds) for later in old[i + 1 :])
            if further and not isinstance(old[i + 1], _Lazy) and getattr(old[i + 1], "f", None) not in _LINEAR:
                more = {**options, "rank": surgery.capped(rank, features), "seed": seed + inserted}
                transforms.append(make(features, device=like.device, dtype=like.dtype, **more).train(part.training))
                inserted += 1
        new.append((part.transform, nn.ModuleList(transforms)))
    for composed, longer in new:  # not before all layers could be made
        composed.transforms = longer
    if not inserted:
        surgery.warn("insert_linear found no place between two autoregressive or coupling transforms")
    elif any(getattr(getattr(m, "univariate", None), "func", None) is CircularRQSTransform for m in flow.modules()):
        surgery.warn("circular splines act on a torus, of which a learned linear layer is no diffeomorphism")
    return inserted

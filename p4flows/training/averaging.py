"""Averages of weights over training (EMA, SWA) of models with P4 layers."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import swa_utils

from p4flows.perturbation import P4Layer

__all__ = ["AveragedModel"]


class AveragedModel(swa_utils.AveragedModel):
    """:class:`torch.optim.swa_utils.AveragedModel` for models with P4 layers: averages what they have learned.

    A, A_inv, U and V must not be averaged each by itself: the mean of inverses is not the inverse of the mean, and U
    goes to zero at every merge. So this class averages the effective matrix of each layer (the weight of an
    InvertibleLinear), in float64, by the same ``avg_fn`` or ``multi_avg_fn``, and inverts the average. The average of a
    P4Orthogonal is the orthogonal matrix nearest to the mean. Everything else is averaged as torch does it, and the
    arguments are torch's.

    A P4 layer can be averaged if it has ``trained_matrix``, what is averaged, in float64, and ``set_matrix(M)``, which
    makes M the effective matrix; or ``set_average(M)``, where a mean has to be brought back to the feasible set.

    Torch's own class refuses models with trainable P4 layers (ValueError), and so does what is built on it, such as
    Lightning's ``WeightAveraging``. Tools that copy parameters one by one, such as ``torch_ema`` or Lightning's
    ``StochasticWeightAveraging``, cannot be told: they average U and V, keep the newest A, and are wrong for P4 layers
    without a word. (:class:`p4flows.lightning.MergeCallback` refuses to train beside the latter.)

    Inverting is O(n³) in each :meth:`update_parameters`: where n is large, call it once per epoch, say.

    Raises:
        ValueError: for a model that is no module, or has a trainable P4 layer of a kind that cannot be averaged.

    >>> from torch.optim.swa_utils import get_ema_multi_avg_fn
    >>> from p4flows import P4Inv
    >>> model = nn.Sequential(P4Inv(4))
    >>> averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    >>> averaged.update_parameters(model)  # after each optimizer step
    """

    def __init__(self, model: nn.Module, *arguments: Any, **options: Any) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        for name, layer in model.named_modules():
            if isinstance(layer, P4Layer) and _trained(layer) and not _averages(layer):
                raise ValueError(f"model: a {type(layer).__name__}, {name!r}, cannot be averaged: it has no set_matrix")
        super().__init__(model, *arguments, **options)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take the model's present weights into the average. ValueError if an averaged matrix is singular."""
        pairs: list[tuple[Any, Any]] = [
            (averaged, layer)
            for averaged, layer in zip(self.module.modules(), model.modules(), strict=True)
            if isinstance(layer, P4Layer) and _averages(layer)
        ]
        means = [averaged.trained_matrix.clone() for averaged, _ in pairs]
        count = self.n_averaged.clone()
        super().update_parameters(model)
        for mean, (averaged, layer) in zip(means, pairs, strict=True):
            current = layer.trained_matrix.to(mean.device)
            if count == 0:
                mean = current
            elif self.avg_fn is not None:
                mean = self.avg_fn(mean, current, count)
            else:
                (self.multi_avg_fn or swa_utils.get_swa_multi_avg_fn())([mean], [current], count)
            _set_average(averaged, mean)


def _trained(layer: P4Layer) -> bool:
    return any(p.requires_grad for p in layer.parameters())


def _averages(layer: P4Layer) -> bool:
    return hasattr(layer, "trained_matrix") and hasattr(layer, "set_matrix")


def _set_average(layer: Any, mean: Tensor) -> None:
    # Where the feasible set is not convex, the mean is not in it.
    getattr(layer, "set_average", layer.set_matrix)(mean)


def _reduce(layer: P4Layer, protocol: int) -> Any:
    """What copies and pickles of a layer are made from; ValueError for the copy that torch's AveragedModel makes."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is swa_utils.AveragedModel.__init__.__code__:
            owner = frame.f_locals["self"]
            if not isinstance(owner, AveragedModel) and _trained(layer):
                raise ValueError(
                    "model: it has P4 layers, whose matrices and inverses must not be averaged one by one; "
                    "use p4flows.AveragedModel"
                )
        frame = frame.f_back
    return object.__reduce_ex__(layer, protocol)


# Here, as layers know nothing of averages; a hook on modules would be there for everybody's.
P4Layer.__reduce_ex__ = _reduce  # type: ignore[assignment, method-assign]

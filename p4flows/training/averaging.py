"""Averages of weights over training (EMA, SWA) of models with P4 layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.optim import swa_utils

from p4flows.layers.perturbed import PerturbedInverse
from p4flows.perturbation import P4Layer

__all__ = ["AveragedModel"]


class AveragedModel(swa_utils.AveragedModel):
    """:class:`torch.optim.swa_utils.AveragedModel` for models with P4Inv layers: averages effective matrices.

    A, A_inv, U and V must not be averaged each by itself: the mean of inverses is not the inverse of the mean, and U
    goes to zero at every merge. So torch's own class refuses models with trainable P4 layers (ValueError), and this one
    averages ``A + U Vᵀ`` in float64, by the same ``avg_fn`` or ``multi_avg_fn``, and inverts the average. Everything
    else is averaged as torch does it, and the arguments are torch's.

    Inverting is O(n³) in each :meth:`update_parameters`: where n is large, call it once per epoch, say.

    >>> from torch.optim.swa_utils import get_ema_multi_avg_fn
    >>> from p4flows import P4Inv
    >>> model = nn.Sequential(P4Inv(4))
    >>> averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    >>> averaged.update_parameters(model)  # after each optimizer step
    """

    def __init__(self, model: nn.Module, *arguments: Any, **options: Any) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        super().__init__(model, *arguments, **options)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take the model's present weights into the average. ValueError if an averaged matrix is singular."""
        pairs = [
            (averaged, layer)
            for averaged, layer in zip(self.module.modules(), model.modules(), strict=True)
            if isinstance(layer, PerturbedInverse)
        ]
        means = [averaged.matrix_double for averaged, _ in pairs]
        count = self.n_averaged.clone()
        super().update_parameters(model)
        for mean, (averaged, layer) in zip(means, pairs, strict=True):
            current = layer.matrix_double.to(mean.device)
            if count == 0:
                mean = current
            elif self.avg_fn is not None:
                mean = self.avg_fn(mean, current, count)
            else:
                (self.multi_avg_fn or swa_utils.get_swa_multi_avg_fn())([mean], [current], count)
            averaged.set_matrix(mean)


def _refuse(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    if isinstance(module, swa_utils.AveragedModel) and not isinstance(module, AveragedModel):
        layers = [m for m in submodule.modules() if isinstance(m, P4Layer)] if submodule is not None else []
        if any(p.requires_grad for layer in layers for p in layer.parameters()):
            raise ValueError(
                "model: it has P4 layers, whose matrices and inverses must not be averaged one by one; "
                "use p4flows.AveragedModel"
            )


register_module_module_registration_hook(_refuse)

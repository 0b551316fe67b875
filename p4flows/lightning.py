"""Merging in a Lightning training loop."""

from __future__ import annotations

from typing import Any

import torch

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError("p4flows.lightning needs Lightning: pip install 'p4flows[lightning]'") from error

from p4flows.layers.linear import P4Linear
from p4flows.training.scheduler import MergeScheduler

__all__ = ["MergeCallback"]


class MergeCallback(Callback):
    """A :class:`p4flows.MergeScheduler` as a Lightning callback: ``Trainer(callbacks=[MergeCallback(every=10)])``.

    It counts optimizer steps, not batches: with gradient accumulation a step is a step of the optimizer, and one that a
    gradient scaler skips is none. Its counts are kept in Lightning's checkpoints, so that a resumed run merges as the
    run that was never stopped.

    Args:
        options: those of :class:`p4flows.MergeScheduler`, such as ``every`` or ``add_penalty``.

    Raises:
        ValueError: for wrong options; and when training starts, if no single optimizer holds the perturbations of all
            P4 layers.

    Attributes:
        scheduler: the :class:`p4flows.MergeScheduler`, or None before training starts.
    """

    def __init__(self, **options: Any) -> None:
        layer = P4Linear(1, 1)
        MergeScheduler(layer, torch.optim.SGD(layer.parameters()), **options)  # so that wrong options are an error here
        self.options = options
        self.scheduler: MergeScheduler | None = None
        self._loaded: dict[str, Any] | None = None

    # Not on_fit_start: the optimizers do not exist then.
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        error = ValueError("trainer: expected one with an optimizer")
        for optimizer in trainer.optimizers:
            try:
                self.scheduler = MergeScheduler(pl_module, optimizer, **self.options).attach()
                break
            except ValueError as wrong:
                error = wrong
        else:
            raise error
        if self._loaded is not None:
            self.scheduler.load_state_dict(self._loaded)
            self._loaded = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.scheduler is not None:
            self.scheduler.detach()

    def state_dict(self) -> dict[str, Any]:
        return {} if self.scheduler is None else self.scheduler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict or None

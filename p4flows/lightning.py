"""Merging in a Lightning training loop."""

from __future__ import annotations

from typing import Any

import torch

from p4flows.installing import missing
from p4flows.layers.linear import P4Linear
from p4flows.training.finding import Layers, refuse_sharded
from p4flows.training.scheduler import MergeScheduler

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import StochasticWeightAveraging
except ImportError as error:
    raise missing("p4flows.lightning", "Lightning", "lightning") from error

__all__ = ["MergeCallback"]


class MergeCallback(Callback):
    """A :class:`p4flows.MergeScheduler` as a Lightning callback: ``Trainer(callbacks=[MergeCallback(10)])``.

    It counts optimizer steps, not batches: with gradient accumulation a step is a step of the optimizer, and one that a
    gradient scaler skips is none. Where several optimizers train different P4 layers, the steps of each are counted for
    its own. Layers that are frozen at first, as by Lightning's ``BaseFinetuning``, are merged from when they are
    trained. The counts are kept in Lightning's checkpoints, so that a resumed run merges as the run that was never
    stopped.

    Args:
        every: N, the number of optimizer steps between merges, or None for what each kind of layer asks for.
        options: the others of :class:`p4flows.MergeScheduler`, such as ``force_every`` or ``add_penalty``.

    Raises:
        ValueError: for wrong options; and when training starts, if the optimizers do not hold the perturbations of all
            trained P4 layers, if parameters are sharded over processes, or beside ``StochasticWeightAveraging``, which
            would average U and V and not A. :class:`p4flows.AveragedModel` averages P4 layers.

    Attributes:
        scheduler: the :class:`p4flows.MergeScheduler`, or None before training starts.
    """

    def __init__(self, every: int | None = None, **options: Any) -> None:
        layer = P4Linear(1, 1)
        self.options = {"every": every, **options}
        optimizer = torch.optim.SGD(layer.parameters())
        MergeScheduler(layer, optimizer, **self.options)  # so that wrong options are an error here
        self.scheduler: MergeScheduler | None = None
        self._loaded: dict[str, Any] | None = None

    # Not on_fit_start: the optimizers do not exist then.
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        layers = Layers(pl_module)()
        model = trainer.strategy.model
        if model is not None:
            refuse_sharded(model, layers.values())
        if layers and any(isinstance(callback, StochasticWeightAveraging) for callback in trainer.callbacks):
            raise ValueError(
                "trainer: StochasticWeightAveraging averages U and V and keeps the newest A, which is wrong for P4 "
                "layers; use p4flows.AveragedModel instead"
            )
        if not trainer.optimizers:
            raise ValueError("trainer: expected one with an optimizer")
        self.scheduler = MergeScheduler(pl_module, None, **self.options)
        self.scheduler.serve(*trainer.optimizers)
        if self._loaded is not None:
            self.scheduler.load_state_dict(self._loaded)
            self._loaded = None
        self.scheduler.attach()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.scheduler is not None:
            self.scheduler.detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.scheduler is None else self.scheduler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict or None

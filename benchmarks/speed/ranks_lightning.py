"""The same training under Lightning's DDP strategy, for `ranks`."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from nflows.flows import Flow
from torch import Tensor
from torch.optim import Adam
from torch.utils.data import DataLoader, IterableDataset

from benchmarks.mixing.training import CLIP
from benchmarks.speed.ranks_worker import TURN, differences, make, rows_of
from p4flows.lightning import MergeCallback

__all__ = ["train"]


class _Module(LightningModule):
    def __init__(self, flow: Flow, optimizer: Adam) -> None:
        super().__init__()
        self.flow, self._optimizer = flow, optimizer

    def training_step(self, x: Tensor, index: int) -> Tensor:
        return -self.flow.log_prob(x).mean()

    def configure_optimizers(self) -> Adam:
        return self._optimizer


class _Rows(IterableDataset):
    def __init__(self, case: dict[str, Any]) -> None:
        self._draw = rows_of(case)

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield self._draw()


class _Clock(Callback):
    """Seconds of a step, the mean of each turn."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Tensor, index: int) -> None:
        if index % TURN == 0:
            self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Tensor, index: int
    ) -> None:
        if index % TURN == TURN - 1:
            self.seconds.append((time.perf_counter() - self._start) / TURN)


def train(case: dict[str, Any], turns: int) -> tuple[list[float], int]:
    """Seconds of a step in each turn, without those of a first one, and the number of bytes that differ at the end."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    flow, optimizer, scheduler = make(case)
    if scheduler is not None:
        scheduler.detach()  # the callback has one of its own
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            strategy=DDPStrategy(process_group_backend="gloo", broadcast_buffers=False),
            devices=dist.get_world_size(),
            max_steps=(turns + 1) * TURN,
            gradient_clip_val=CLIP,
            callbacks=[clock, *([] if scheduler is None else [MergeCallback()])],
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(_Module(flow, optimizer), DataLoader(_Rows(case), batch_size=None))
    return clock.seconds[1:], differences(flow, optimizer)

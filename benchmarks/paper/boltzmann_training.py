"""Training a Boltzmann generator, by data and by energy, so that an interrupted run goes on where it was."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from nflows.flows import Flow
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from benchmarks.harness.checkpoint import Checkpoint
from benchmarks.paper.boltzmann import Data, draw
from p4flows import AveragedModel, MergeScheduler
from p4flows.molecules import importance_weights, regularize_energy
from p4flows.perturbation import P4Layer

__all__ = ["Stage", "train"]

_WINDOW = 100  # steps that a point of the training curve is the mean of
_AVERAGED = 10  # steps between two that an average is made of
_E_HIGH, _E_MAX = 100.0, 1e20  # kT; beyond the first, energies count by their logarithm


@dataclass(frozen=True)
class Stage:
    """One stage of training by Adam. With ``energy_weight`` w_e / w_l, the reverse divergence is in the loss too."""

    steps: int
    batch: int = 256
    lr: float = 1e-3
    schedule: str = "constant"  # or "cosine"
    energy_weight: float = 0.0
    every: int | None = 10
    correct_every: int | None = None
    reset: str = "momentum"
    seed: int = 0


class _Loss:
    """-log q(z) averaged over data; for an energy weight w, plus w times the mean of u(x) + log q(x) over samples.

    Samples out of the range of the coordinates are left out of the latter. Their density is not the flow's at z, and
    it would pay to have many of them: there q(z) is small whatever the structure.
    """

    def __init__(self, flow: Flow, data: Data, stage: Stage, compiled: bool) -> None:
        self.flow, self.data, self.stage = flow, data, stage
        self.to_noise, self.to_data = flow._transform, flow._transform.inverse
        if compiled:
            # Batches of one size: a graph that is good for others too would be slower.
            self.to_noise, self.to_data = (torch.compile(f, dynamic=False) for f in (self.to_noise, self.to_data))

    def __call__(self, z: Tensor, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(z), (self.stage.batch,), generator=generator)
        noise, logabsdet = self.to_noise(z[rows])
        likelihood = -(self.flow._distribution.log_prob(noise) + logabsdet).mean()
        if not self.stage.energy_weight:
            return likelihood
        noise = draw(self.flow, self.stage.batch, generator)
        z, logabsdet = self.to_data(noise)
        x, volume = self.data.coordinates.inverse(z)
        energy = regularize_energy(self.data.energy(x), _E_HIGH, _E_MAX)
        log_q = self.flow._distribution.log_prob(noise) - logabsdet
        weights = importance_weights(log_q, energy, volume, self.data.coordinates.in_range(z))
        divergence = -weights.log_weights[weights.in_range].mean().to(likelihood)
        return likelihood + self.stage.energy_weight * divergence


@contextmanager
def _detached_after(scheduler: MergeScheduler | None) -> Iterator[None]:
    """The next stage, or the same after an interruption, has a scheduler of its own."""
    try:
        yield
    finally:
        if scheduler is not None:
            scheduler.detach()


def train(
    flow: Flow,
    data: Data,
    stage: Stage,
    name: str = "",
    checkpoint: Path | None = None,
    compiled: bool = False,
    average: float = 0.0,
    swaps: float = 1.0,
    rows: Callable[[int], Tensor] | None = None,
) -> dict[str, Any]:
    """Train, from ``checkpoint`` on if there is one. Merges are attached where there is something to merge.

    Learned swaps are given ``swaps`` times the learning rate of the stage. ``rows`` returns the data for a step, the
    first of which is 1, if these are not the frames.

    With ``average``, the flow ends as the exponential average with this decay of what it was at every tenth step of
    the second half.
    """
    generator = torch.Generator().manual_seed(stage.seed)
    optimizer = torch.optim.Adam(_groups(flow, stage.lr, swaps), lr=stage.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    if stage.schedule == "cosine":
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, stage.steps)
    scheduler = None
    if any(isinstance(module, P4Layer) for module in flow.modules()):
        scheduler = MergeScheduler(
            flow, optimizer, every=stage.every, correct_every=stage.correct_every, reset=stage.reset
        ).attach()
    loss = _Loss(flow, data, stage, compiled)
    averaged = AveragedModel(flow, multi_avg_fn=get_ema_multi_avg_fn(average)) if average else None
    kept = Checkpoint(
        checkpoint,
        asdict(stage),
        flow=flow,
        optimizer=optimizer,
        schedule=schedule,
        merges=scheduler,
        generator=generator,
        averaged=averaged,
    )
    numbers = {"step": 0, "seconds": 0.0, "curve": [], "bad": 0} | kept.restore()
    done = numbers["step"]

    flow.train()
    recent: list[Tensor] = []
    start = time.perf_counter()
    window = min(_WINDOW, stage.steps)
    with (
        _detached_after(scheduler),
        tqdm(range(done, stage.steps), desc=name, unit="step", initial=done, total=stage.steps, mininterval=1) as bar,
    ):
        for step in range(done + 1, stage.steps + 1):
            optimizer.zero_grad()
            value = loss(data.z if rows is None else rows(step), generator)
            value.backward()
            if stage.energy_weight and not torch.nn.utils.get_total_norm(_gradients(flow)).isfinite():
                numbers["bad"] += 1  # a sample on a singularity of the energy must not end the run
            else:
                optimizer.step()
            schedule.step()
            if averaged and step % _AVERAGED == 0 and step > stage.steps / 2:
                averaged.update_parameters(flow)
            recent.append(value.detach())
            bar.update()
            if step % window == 0 or step == stage.steps:
                now = time.perf_counter()
                numbers["step"] = step
                numbers["seconds"] += now - start
                numbers["curve"].append(torch.stack(recent).mean().item())
                start = now
                recent.clear()
                bar.set_postfix(loss=f"{numbers['curve'][-1]:.2f}")
                (kept.save if step == stage.steps else kept.save_if_due)(**numbers)
    if averaged and averaged.n_averaged > 0:  # not of a training that was too short for one
        flow.load_state_dict(averaged.module.state_dict())
    return {
        "ms_per_step": 1000 * numbers["seconds"] / stage.steps,
        "curve": [round(value, 4) for value in numbers["curve"]],
        "unusable_batches": numbers["bad"],
        "counters": scheduler.counters if scheduler else None,
    }


def _groups(flow: Flow, rate: float, swaps: float) -> list[Any]:
    if swaps == 1:
        return list(flow.parameters())
    learned = [p for module in flow.modules() if isinstance(module, P4Layer) for p in module.parameters()]
    ids = {id(p) for p in learned}
    groups = [{"params": [p for p in flow.parameters() if id(p) not in ids]}, {"params": learned, "lr": swaps * rate}]
    return [group for group in groups if group["params"]]


def _gradients(flow: Flow) -> list[Tensor]:
    return [p.grad for p in flow.parameters() if p.grad is not None]

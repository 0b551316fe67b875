"""Training a Boltzmann generator, by data and by energy, so that an interrupted run goes on where it was."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from nflows.flows import Flow
from torch import Tensor
from tqdm import tqdm

from benchmarks.boltzmann import Data
from p4flows import MergeScheduler, P4Inv
from p4flows.molecules import regularize_energy

__all__ = ["Stage", "train"]

_SECONDS_BETWEEN_CHECKPOINTS = 60
_E_HIGH, _E_MAX = 100.0, 1e20  # kT; beyond the first, energies count by their logarithm


@dataclass(frozen=True)
class Stage:
    """One stage of training by Adam. With ``energy_weight`` w_e / w_l, the reverse divergence is in the loss too."""

    steps: int
    batch: int = 256
    lr: float = 1e-3
    perturbation_lr: float | None = None  # of U and V, if not lr
    schedule: str = "constant"  # or "cosine"
    energy_weight: float = 0.0
    every: int = 10
    reset: str = "v"
    seed: int = 0


class _Loss:
    """-log q(z) averaged over data; for an energy weight w, plus w times the mean of u(x) + log q(x) over samples."""

    def __init__(self, flow: Flow, data: Data, stage: Stage, compiled: bool) -> None:
        self.flow, self.data, self.stage = flow, data, stage
        self.to_noise, self.to_data = flow._transform, flow._transform.inverse
        if compiled:
            # Batches of one size: a graph that is good for others too would be slower.
            self.to_noise, self.to_data = (torch.compile(f, dynamic=False) for f in (self.to_noise, self.to_data))

    def __call__(self, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(self.data.z), (self.stage.batch,), generator=generator)
        noise, logabsdet = self.to_noise(self.data.z[rows])
        likelihood = -(self.flow._distribution.log_prob(noise) + logabsdet).mean()
        if not self.stage.energy_weight:
            return likelihood
        noise = torch.randn(self.stage.batch, self.data.z.shape[1], generator=generator)
        z, logabsdet = self.to_data(noise)
        x, volume = self.data.coordinates.inverse(z)
        energy = regularize_energy(self.data.energy(x), _E_HIGH, _E_MAX)
        divergence = (energy - logabsdet - volume + self.flow._distribution.log_prob(noise)).mean()
        return likelihood + self.stage.energy_weight * divergence


def train(
    flow: Flow, data: Data, stage: Stage, name: str = "", checkpoint: Path | None = None, compiled: bool = False
) -> dict[str, Any]:
    """Train, from ``checkpoint`` on if there is one. Merges are attached where there is something to merge."""
    generator = torch.Generator().manual_seed(stage.seed)
    perturbations = [p for module in flow.modules() if isinstance(module, P4Inv) for p in (module.U, module.V)]
    theirs = {id(p) for p in perturbations}
    groups = [{"params": [p for p in flow.parameters() if id(p) not in theirs]}]
    if perturbations:
        groups.append({"params": perturbations, "lr": stage.perturbation_lr or stage.lr})
    optimizer = torch.optim.Adam(groups, lr=stage.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    if stage.schedule == "cosine":
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, stage.steps)
    scheduler = None
    if perturbations:
        scheduler = MergeScheduler(flow, optimizer, every=stage.every, reset=stage.reset).attach()
    loss = _Loss(flow, data, stage, compiled)
    parts = {"flow": flow, "optimizer": optimizer, "schedule": schedule, "merges": scheduler}
    done, seconds, curve, bad = 0, 0.0, [], 0
    if checkpoint is not None and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["stage"] != asdict(stage):
            raise ValueError(f"{checkpoint}: expected a checkpoint of {stage}, got one of {state['stage']}")
        for key, part in parts.items():
            if part is not None:
                part.load_state_dict(state[key])
        generator.set_state(state["generator"])
        done, seconds, curve, bad = (state[key] for key in ("step", "seconds", "curve", "bad"))

    def save(step: int) -> None:
        if checkpoint is not None:
            state = {key: part.state_dict() for key, part in parts.items() if part is not None}
            state |= {"stage": asdict(stage), "generator": generator.get_state(), "step": step, "bad": bad}
            torch.save(state | {"seconds": seconds, "curve": curve}, part := checkpoint.with_suffix(".part"))
            part.replace(checkpoint)

    flow.train()
    recent: list[Tensor] = []
    last = start = time.perf_counter()
    window = min(100, stage.steps)
    with tqdm(range(done, stage.steps), desc=name, unit="step", initial=done, total=stage.steps, mininterval=1) as bar:
        for step in range(done + 1, stage.steps + 1):
            optimizer.zero_grad()
            value = loss(generator)
            value.backward()
            if stage.energy_weight and not torch.nn.utils.get_total_norm(_gradients(flow)).isfinite():
                bad += 1  # a sample on a singularity of the energy; one in a million batches must not end the run
            else:
                optimizer.step()
            schedule.step()
            recent.append(value.detach())
            bar.update()
            if step % window == 0:
                curve.append(torch.stack(recent).mean().item())
                recent.clear()
                bar.set_postfix(loss=f"{curve[-1]:.2f}")
                now = time.perf_counter()
                if now - last > _SECONDS_BETWEEN_CHECKPOINTS:
                    seconds, start = seconds + now - start, now
                    save(step)
                    last = time.perf_counter()
    if done < stage.steps:
        seconds += time.perf_counter() - start
        save(stage.steps)
    return {
        "ms_per_step": 1000 * seconds / stage.steps,
        "curve": [round(value, 4) for value in curve],
        "unusable_batches": bad,
        "counters": scheduler.counters if scheduler else None,
    }


def _gradients(flow: Flow) -> list[Tensor]:
    return [p.grad for p in flow.parameters() if p.grad is not None]

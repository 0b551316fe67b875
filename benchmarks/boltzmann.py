"""A Boltzmann generator of alanine dipeptide: data, maximum-likelihood training, and what its samples are worth."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nflows.flows import Flow
from torch import Tensor
from tqdm import tqdm

from p4flows import MergeScheduler, P4Inv
from p4flows.molecules import MixedCoordinates, Molecule, OpenMMEnergy, alanine_dipeptide, dihedral, simulate

__all__ = ["Data", "Samples", "jensen_shannon", "load_data", "measure", "train"]

TEMPERATURE = 600.0
PERTURBATION = 0.004  # nm, Figure 7


@dataclass
class Samples:
    """Molecules of one origin: reduced energies (B,) and backbone dihedrals phi, psi (B,)."""

    energy: Tensor
    phi: Tensor
    psi: Tensor


@dataclass
class Data:
    """MD frames (B, 22, 3), a fifth of them held out, and their mixed coordinates (B, 60) with log|dz/dx| (B,)."""

    molecule: Molecule
    energy: OpenMMEnergy
    coordinates: MixedCoordinates
    frames: Tensor
    test_frames: Tensor
    z: Tensor
    test_z: Tensor
    test_logabsdet: Tensor

    def samples(self, frames: Tensor) -> Samples:
        frames = frames.unflatten(-1, (-1, 3)) if frames.ndim == 2 else frames
        phi, psi = (
            dihedral(*(frames[:, i] for i in atoms)).double() for atoms in (self.molecule.phi, self.molecule.psi)
        )
        return Samples(self.energy(frames).double(), phi, psi)


def load_data(frames: int, stride: int = 100, seed: int = 0) -> Data:
    """Simulate (or read from the cache) and split at random, so that both parts see every basin."""
    molecule = alanine_dipeptide()
    x = torch.from_numpy(simulate(molecule, TEMPERATURE, frames, stride, seed, workers=2))
    x = x[torch.from_numpy(np.random.default_rng(seed).permutation(len(x)))]
    test, train = x[: frames // 5], x[frames // 5 :]
    coordinates = MixedCoordinates(molecule.z_matrix, molecule.rigid_block, train)
    z, _ = coordinates(train)
    test_z, test_logabsdet = coordinates(test)
    energy = OpenMMEnergy(molecule.system, TEMPERATURE)
    return Data(molecule, energy, coordinates, train, test, z, test_z, test_logabsdet)


def train(
    flow: Flow,
    data: Data,
    steps: int,
    batch: int = 256,
    lr: float = 1e-3,
    every: int = 10,
    name: str = "",
    seed: int = 0,
) -> dict[str, Any]:
    """Maximum likelihood by Adam with a cosine schedule; merges are attached where there is something to merge."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(flow.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    scheduler = None
    if any(isinstance(module, P4Inv) for module in flow.modules()):
        scheduler = MergeScheduler(flow, optimizer, every=every).attach()
    losses, start = [], time.perf_counter()
    with tqdm(range(steps), desc=name, unit="step") as bar:
        for step in bar:
            rows = torch.randint(len(data.z), (batch,), generator=generator)
            optimizer.zero_grad()
            loss = -flow.log_prob(data.z[rows]).mean()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
            if step % 50 == 49:
                bar.set_postfix(nll=f"{torch.stack(losses[-50:]).mean():.2f}")
    milliseconds = 1000 * (time.perf_counter() - start) / steps
    curve = torch.stack(losses).unfold(0, min(100, steps), min(100, steps)).mean(-1)
    return {
        "ms_per_step": milliseconds,
        "training_nll": [round(value, 4) for value in curve.tolist()],
        "counters": scheduler.counters if scheduler else None,
    }


@torch.no_grad()
def measure(flow: Flow, data: Data, reference: Samples, samples: int = 10_000, seed: int = 0) -> tuple[dict, Samples]:
    """What the flow's samples are worth, in the terms of Figure 7, and the samples."""
    torch.manual_seed(seed)
    flow.eval()
    z = flow.sample(samples)
    drawn = data.samples(data.coordinates.inverse(z)[0])
    noise = flow.transform_to_noise(data.test_z)
    round_trip = flow._transform.inverse(noise)[0] - data.test_z
    return {
        "parameters": sum(p.numel() for p in flow.parameters() if p.requires_grad),
        "nll": -(flow.log_prob(data.test_z) + data.test_logabsdet).double().mean().item(),
        **describe(drawn, reference, data),
        "round_trip": round_trip.abs().max().item(),
    }, drawn


def describe(samples: Samples, reference: Samples, data: Data) -> dict[str, float]:
    """Energies, the fraction below the highest energy of the training data, and the Ramachandran plot's distance."""
    limit = data.energy(data.frames).max()
    return {
        "energy_mean": samples.energy.mean().item(),
        "energy_median": samples.energy.median().item(),
        "low_energy_fraction": (samples.energy <= limit).double().mean().item(),
        "ramachandran_js": jensen_shannon(samples, reference),
    }


def jensen_shannon(a: Samples, b: Samples, bins: int = 24) -> float:
    """Jensen-Shannon divergence (nats) of the histograms of (phi, psi) on bins of 15 degrees."""
    p, q = (
        np.histogram2d(s.phi.numpy(), s.psi.numpy(), bins, [[-np.pi, np.pi]] * 2)[0].ravel() / len(s.phi)
        for s in (a, b)
    )
    m = (p + q) / 2

    def kullback_leibler(p: np.ndarray) -> float:
        return float((p[p > 0] * np.log(p[p > 0] / m[p > 0])).sum())

    return (kullback_leibler(p) + kullback_leibler(q)) / 2

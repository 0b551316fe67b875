"""A Boltzmann generator of alanine dipeptide: its data, and what its samples are worth."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from nflows.flows import Flow
from torch import Tensor

from p4flows import InvertibleLinear, P4Inv
from p4flows.molecules import (
    ImportanceWeights,
    MixedCoordinates,
    Molecule,
    OpenMMEnergy,
    alanine_dipeptide,
    dihedral,
    importance_weights,
    simulate,
)

__all__ = ["Data", "Samples", "draw", "generate", "jensen_shannon", "load_data", "measure", "worth"]

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

    @cached_property
    def highest(self) -> float:
        """The highest energy of the training data."""
        return self.energy(self.frames).max().item()

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


def draw(flow: Flow, count: int, generator: torch.Generator) -> Tensor:
    """Noise that the flow turns into samples, from a generator, which nflows' own distributions do not take."""
    own = getattr(flow._distribution, "draw", None)
    return own(count, generator) if own else torch.randn(count, *flow._distribution._shape, generator=generator)


@torch.no_grad()
def generate(flow: Flow, data: Data, count: int, seed: int) -> tuple[Tensor, Samples, ImportanceWeights]:
    """Samples of the flow in coordinates, as molecules, and their weights at the temperature of ``data.energy``."""
    flow.eval()
    z, drawn, log_q, volumes, usable = [], [], [], [], []
    for part in draw(flow, count, torch.Generator().manual_seed(seed)).split(10_000):
        part_z, logabsdet = flow._transform.inverse(part)
        x, volume = data.coordinates.inverse(part_z)
        z.append(part_z)
        drawn.append(data.samples(x))
        log_q.append(flow._distribution.log_prob(part).double() - logabsdet.double())
        volumes.append(volume)
        # A mirror image has the same energy, and is another molecule.
        usable.append(data.coordinates.in_range(part_z) & data.molecule.chirality.kept(x))
    samples = Samples(*(torch.cat([getattr(s, name) for s in drawn]) for name in ("energy", "phi", "psi")))
    weights = importance_weights(torch.cat(log_q), samples.energy, torch.cat(volumes), torch.cat(usable))
    return torch.cat(z), samples, weights


def worth(weights: ImportanceWeights) -> dict[str, float]:
    """What a sample is worth, the share of the heaviest, and of those out of range."""
    return {
        "rejected_fraction": weights.share_rejected,
        "ess": weights.effective_sample_size / len(weights.log_weights),
        "largest_weight": weights.largest_share,
    }


@torch.no_grad()
def measure(flow: Flow, data: Data, reference: Samples, samples: int = 10_000, seed: int = 0) -> tuple[dict, Samples]:
    """What the flow's samples are worth, in the terms of Figure 7 and more, and the samples."""
    z, drawn, weights = generate(flow, data, samples, seed)
    log_weights = weights.log_weights[weights.in_range]
    usable = log_weights.isfinite()
    nll = [
        -(flow.log_prob(z) + volume).double()
        for z, volume in zip(data.test_z.split(10_000), data.test_logabsdet.split(10_000), strict=True)
    ]
    test_z = data.test_z[:10_000]
    round_trip = flow._transform.inverse(flow.transform_to_noise(test_z))[0] - test_z
    layers = [module for module in flow.modules() if isinstance(module, P4Inv | InvertibleLinear)]
    error = [(torch.linalg.slogdet(layer.A.double())[1] - layer.logabsdet_A).abs().item() for layer in layers]
    marginals = [divergence(*histograms(a, b)) for a, b in zip(z.T, data.test_z.T, strict=True)]
    return {
        "parameters": sum(p.numel() for p in flow.parameters() if p.requires_grad),
        "nll": torch.cat(nll).mean().item(),
        **describe(drawn, reference, data),
        # Of the samples in range; energies that are infinite are left out of the divergence, and weigh nothing.
        "reverse_kl": -log_weights[usable].mean().item(),
        "unusable_fraction": (~usable).sum().item() / samples,
        **worth(weights),
        "marginal_js_mean": float(np.mean(marginals)),
        "marginal_js_max": float(np.max(marginals)),
        "round_trip": round_trip.abs().max().item(),
        "residual": max((layer.residual().item() for layer in layers), default=None),
        "logabsdet_error": max(error, default=None),
    }, drawn


def describe(samples: Samples, reference: Samples, data: Data) -> dict[str, float]:
    """Energies, the fraction below the highest energy of the training data, and divergences of backbone dihedrals."""
    energy = samples.energy
    return {
        "energy_mean": energy.mean().item(),
        "energy_median": energy.median().item(),
        "energy_shift_of_median": (energy.median() - reference.energy.median()).item(),
        # The mean is made by the few samples whose atoms overlap; among the others it is a robust figure too.
        "energy_shift_of_low": (energy[energy <= data.highest].mean() - reference.energy.mean()).item(),
        "low_energy_fraction": (energy <= data.highest).double().mean().item(),
        "ramachandran_js": jensen_shannon(samples, reference),
        **{
            f"{angle}_js": divergence(*histograms(getattr(samples, angle), getattr(reference, angle)))
            for angle in ("phi", "psi")
        },
    }


def histograms(a: Tensor, b: Tensor, bins: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """Normalised histograms of a and b on the range of b; what is outside counts in the outermost bins."""
    edges = np.linspace(b.min().item(), b.max().item(), bins + 1)
    p, q = (np.histogram(np.clip(s.numpy(), edges[0], edges[-1]), edges)[0] / len(s) for s in (a, b))
    return p, q


def jensen_shannon(a: Samples, b: Samples, bins: int = 24) -> float:
    """Jensen-Shannon divergence (nats) of the histograms of (phi, psi) on bins of 15 degrees."""
    p, q = (
        np.histogram2d(s.phi.numpy(), s.psi.numpy(), bins, [[-np.pi, np.pi]] * 2)[0].ravel() / len(s.phi)
        for s in (a, b)
    )
    return divergence(p, q)


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    """Jensen-Shannon divergence (nats) of two distributions over bins."""
    m = (p + q) / 2

    def kullback_leibler(p: np.ndarray) -> float:
        return float((p[p > 0] * np.log(p[p > 0] / m[p > 0])).sum())

    return (kullback_leibler(p) + kullback_leibler(q)) / 2

"""What the samples of a Boltzmann generator are worth: importance weights with respect to the Boltzmann density."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from p4flows.checks import describe

__all__ = ["ImportanceWeights", "importance_weights"]


@dataclass(frozen=True)
class ImportanceWeights:
    r"""Log importance weights of B samples, and what they say of the generator. See :func:`importance_weights`.

    Attributes:
        log_weights: (B,), float64: :math:`\ln w`, and -inf for samples that are rejected or of infinite energy.
        in_range: (B,), bool: False for the samples that are rejected.

    An average over the Boltzmann density is ``(w * f).sum() / w.sum()`` with ``w = log_weights.softmax(0)``.
    """

    log_weights: Tensor
    in_range: Tensor

    @property
    def share_rejected(self) -> float:
        """The fraction of the B samples that are out of range."""
        return 1 - self.in_range.double().mean().item()

    @property
    def effective_sample_size(self) -> float:
        r"""Kish's effective sample size :math:`(\sum w)^2 / \sum w^2`, a number between 1 and the samples in range.

        It is zero if no sample has a weight. Divided by B, it is what one sample that was drawn is worth, with the
        rejected ones paid for.
        """
        if self.log_weights.max() == -math.inf:
            return 0.0
        return torch.exp(2 * self.log_weights.logsumexp(0) - (2 * self.log_weights).logsumexp(0)).item()

    @property
    def largest_share(self) -> float:
        r"""The share :math:`\max w / \sum w` of the heaviest sample; more than a per cent or so is a warning.

        It is NaN if no sample has a weight.
        """
        return torch.exp(self.log_weights.max() - self.log_weights.logsumexp(0)).item()

    @property
    def log_partition(self) -> float:
        r"""The logarithm of the mean weight over the samples in range, an estimate of ln Z.

        :math:`Z = \int e^{-u(x)} |\partial x / \partial z| \, dz` is the partition function of the energy, one if
        p is normalised. Differences of -ln Z between systems are free-energy differences in kT.
        """
        return (self.log_weights.logsumexp(0) - math.log(max(1, int(self.in_range.sum())))).item()


def importance_weights(log_q: Tensor, energy: Tensor, logabsdet: Tensor, in_range: Tensor) -> ImportanceWeights:
    r"""Log importance weights of generated structures, with the samples rejected whose density is not known.

    A flow draws coordinates z from its density q(z), and ``MixedCoordinates.inverse`` turns them into a structure
    x(z). That map is one-to-one only over the range of the coordinates: a dihedral beyond its range
    [cut, cut + 2π), a bond length below zero or an angle beyond (0, π) gives a structure which has another z in range
    as well. The density of such a structure is not q at the z that was drawn. Weights made of that q, which is tiny
    far out, are wrong by orders of magnitude, and a few of them outweigh all others. So samples out of range are
    rejected, which leaves the generator with the density

    .. math:: q_\mathrm{acc}(z) = q(z) / \alpha \quad \text{in range, zero elsewhere},

    where :math:`\alpha` is the share of samples in range, taken from the samples. With the reduced energy u in kT and
    the volume of the map, the weight of a sample in range is

    .. math:: w = \frac{p(z)}{q_\mathrm{acc}(z)}, \qquad
        \ln w = -u(x) + \ln |\partial x / \partial z| - \ln q(z) + \ln \alpha ,

    and that of the others is zero. Over the samples in range, the mean of w is one within its error if
    :math:`p = e^{-u} |\partial x / \partial z|` is normalised, and the partition function of u otherwise.

    Gradients pass: ``-log_weights[in_range].mean()`` is the reverse divergence KL(q_acc ‖ p) up to ln Z, for training
    by energy. The change of :math:`\alpha` with the parameters of the flow is not part of its gradient.

    Args:
        log_q: (B,), :math:`\ln q(z)` of the flow at the coordinates z that it drew, in nats.
        energy: (B,), the reduced energy u(x) in kT, without regularisation; +inf gives the weight zero.
        logabsdet: (B,), :math:`\ln |\partial x / \partial z|`, the second result of ``MixedCoordinates.inverse(z)``.
        in_range: (B,), bool, the result of ``MixedCoordinates.in_range(z)``.

    Raises:
        ValueError: if shapes or types do not fit, and for samples in range whose density is not finite or whose
            energy is NaN or -inf, since such a weight would be made up.
    """
    given = {"log_q": log_q, "energy": energy, "logabsdet": logabsdet}
    for name, value in given.items():
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim != 1 or not len(value):
            raise ValueError(f"{name}: expected floating-point (B,), got {describe(value)}")
        if value.shape != log_q.shape:
            raise ValueError(f"{name}: expected {tuple(log_q.shape)}, as log_q, got {tuple(value.shape)}")
    if not isinstance(in_range, Tensor) or in_range.dtype != torch.bool or in_range.shape != log_q.shape:
        raise ValueError(f"in_range: expected bool {tuple(log_q.shape)}, got {describe(in_range)}")
    log_q, energy, logabsdet = (value.double() for value in given.values())
    for name, value, valid in (
        ("log_q", log_q, log_q.isfinite()),
        ("energy", energy, energy > -math.inf),
        ("logabsdet", logabsdet, logabsdet.isfinite()),
    ):
        wrong = in_range & ~valid
        if wrong.any():
            raise ValueError(f"{name}: expected finite values of samples in range, got {value[wrong][0].item()}")
    log_weights = -energy + logabsdet - log_q + in_range.double().mean().log()
    return ImportanceWeights(log_weights.where(in_range, log_weights.new_tensor(-math.inf)), in_range)

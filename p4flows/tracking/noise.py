"""Counter-based random numbers: a pure function of a seed and a counter, evaluated on the device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["derive", "directions", "normal", "redraw_"]

# The constants of SplitMix64 (Steele, Lea, Flood 2014) as signed 64-bit integers.
_GOLDEN = -7046029254386353131
_MIX1 = -4658895280553007687
_MIX2 = -7723592293110705685


def _shift(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _MIX1
    z = (z ^ _shift(z, 27)) * _MIX2
    return z ^ _shift(z, 31)


def derive(seed: Tensor, index: Tensor) -> Tensor:
    """The index-th of a seed's own seeds; both int64, broadcast against each other."""
    return _mix(_mix(seed + _GOLDEN) ^ ((index + 1) * _MIX1))


def normal(seed: Tensor, count: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise (*batch, *shape) in float64, for int64 ``seed`` and ``count`` of shape (*batch).

    Equal seed and count give equal noise on every process and after every resume; the counter may live on the
    device and is never read by the host, which a ``torch.Generator`` would require. SplitMix64, then Box-Muller.
    """
    size = math.prod(shape)
    key = _mix(_mix(seed + _GOLDEN) + (count + 1) * _GOLDEN).unsqueeze(-1)
    index = torch.arange(1, (size + 1) // 2 + 1, device=seed.device)
    bits = _mix(key + index * _GOLDEN)
    radius = ((_shift(bits, 32).double() + 1) * 2.0**-32).log().mul(-2).sqrt()
    angle = (bits & 0xFFFFFFFF).double() * (2 * math.pi * 2.0**-32)
    pairs = torch.cat([radius * angle.cos(), radius * angle.sin()], -1)
    numbers = pairs if pairs.shape[-1] == size else pairs[..., :size].clone()  # with memory for that many, and no more
    return numbers.view(*seed.shape, *shape)


def directions(seed: Tensor, count: Tensor, n: int, k: int) -> Tensor:
    """The V of a perturbation, (*batch, n, k) in float64, with ``E[V Vᵀ] = I`` whatever k.

    For k = 1 it is standard normal, as in the paper. For more it has k orthogonal columns of norm √(n/k), uniformly
    distributed, so that it covers k directions evenly. Then a step of SGD on U is, on average, the step of a dense
    matrix at the same learning rate, and a step of Adam moves each entry of ``U Vᵀ`` by about the learning rate.
    """
    V = normal(seed, count, (n, k))
    if k == 1:
        return V
    Q, R = torch.linalg.qr(V)
    # The signs make Q uniform, whatever the convention of the decomposition.
    norm = (n / k) ** 0.5
    V = Q * torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -norm, norm).unsqueeze(-2)
    return V.contiguous()  # LAPACK's columns first would become the layout of a parameter


@torch.no_grad()
def redraw_(U: Tensor, V: Tensor, seed: Tensor, merges: Tensor, which: Tensor) -> None:
    """Start a new perturbation, U = 0 and the next V of its seed, where ``which`` (L,); all under a dimension L."""
    merges.add_(which)
    drawn = directions(seed, merges, *V.shape[1:]).to(V.dtype)
    V.copy_(torch.where(which[:, None, None], drawn, V))
    U.masked_fill_(which[:, None, None], 0)

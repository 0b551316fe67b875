"""P4Linear and P4Conv2d: plain layers trained through low-rank perturbations (Appendix I)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad
from torch.nn.parameter import is_lazy

from p4flows.checks import integer, move
from p4flows.layers.affine import Affine
from p4flows.layers.inputs import require_images
from p4flows.outcomes import MergeOutcome
from p4flows.tracking.algebra import fits, largest

__all__ = ["P4Conv2d", "P4Linear"]


class P4Linear(Affine):
    r"""Linear layer ``y = (A + U Vᵀ) x + b`` of any shape, trained through the perturbation ``U Vᵀ`` of rank k.

    There is no inverse and no determinant to track: what is left of P4 is that only k (m + n) numbers are trained at a
    time, not m n. With U = 0 and a random V at every merge, ``E[V Vᵀ] = I``: by SGD it descends, on average, as
    ``nn.Linear`` does at the same learning rate.

    Args:
        in_features: n, the size of the last dimension of the input.
        out_features: m, the size of the last dimension of the output.
        rank: k, 1 <= k <= min(m, n). The paper has 1.
        bias: whether there is a trained b (m,).
        seed: V is a function of the seed and of the number of merges; give layers of one model different seeds.
        device, dtype: of all floating-point tensors.

    A and b start like those of ``nn.Linear``, from torch's own generator.

    Attributes: parameters U (m, k), V (n, k) and bias (m,) or None; buffers A (m, n); A_float (m, n), in float32, what
    A is rounded from in a layer in half precision, where A itself would swallow most of what is merged into it, and
    otherwise None; seed, merges (), int64.

    Shapes: input (..., n) to output (..., m).

    Raises:
        ValueError: for an argument outside what is said here.

    References:
        Krämer, Köhler, Noé: Training Invertible Linear Layers through Rank-One Perturbations. arXiv:2010.07033.

    >>> layer = P4Linear(784, 10)
    >>> layer(torch.zeros(5, 784)).shape, sum(p.numel() for p in layer.parameters())
    (torch.Size([5, 10]), 804)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 1,
        bias: bool = True,
        seed: int = 0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, rank, bias, seed, dtype)
        move(self, device)

    @staticmethod
    def from_linear(layer: nn.Linear | nn.Conv2d, rank: int = 1, seed: int = 0) -> P4Linear:
        """A layer that starts as the same function, with a copy of the weight and bias.

        Of an ``nn.Linear`` it makes a P4Linear, of an ``nn.Conv2d`` a :class:`P4Conv2d`.
        """
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            raise ValueError(f"layer: expected an nn.Linear or an nn.Conv2d, got {type(layer).__name__}")
        if is_lazy(layer.weight):
            raise ValueError(f"layer: expected one that has seen an input, got a new {type(layer).__name__}")
        weight, bias = layer.weight.detach(), layer.bias
        options: dict[str, Any] = {"rank": rank, "seed": seed, "device": weight.device, "dtype": weight.dtype}
        options["bias"] = bias is not None
        if isinstance(layer, nn.Linear):
            new = P4Linear(layer.in_features, layer.out_features, **options)
        else:
            options |= {name: getattr(layer, name) for name in ("kernel_size", *_GEOMETRY)}
            new = P4Conv2d(layer.in_channels, layer.out_channels, **options)
        with torch.no_grad():
            new.set_frozen(weight.flatten(1))
            if new.bias is not None and bias is not None:
                new.bias.copy_(bias)
        return new.train(layer.training)

    @torch.no_grad()
    def merge(self, force: bool = False) -> Tensor:
        """Merge ``U Vᵀ`` into A, in place, O(k m n); there are no bounds, so that ``force`` changes nothing.

        Skipped where A would not stay finite; where U or V is not finite the perturbation is reset instead. Does not
        wait for the device. Returns the :class:`MergeOutcome`, an int64 tensor ().
        """
        size = largest(self.U) * largest(self.V)
        finite = size.isfinite()
        A = self.exact
        kept = fits(A[None], self.rank * size[None], torch.finfo(self.A.dtype).max / 4)[0] & finite
        U, V = (torch.where(kept, M, 0).to(A.dtype) for M in (self.U, self.V))
        A.addmm_(U, V.mT)
        self.round_frozen()
        self.redraw(kept | ~finite)
        merged = torch.where(kept, int(MergeOutcome.MERGED), int(MergeOutcome.SKIPPED))
        return merged.where(finite, int(MergeOutcome.RESET))

    def violation(self) -> Tensor:
        """Zero, in float64, since every finite matrix is feasible; infinite where A is not finite."""
        return torch.where(largest(self.exact).isfinite(), 0.0, torch.inf).double()


_GEOMETRY = ("stride", "padding", "dilation", "groups", "padding_mode")


class P4Conv2d(P4Linear):
    """Convolution trained as :class:`P4Linear`: A + U Vᵀ is its weight, one row for each output channel.

    The perturbation is k filters, the columns of V, and a 1 × 1 convolution with U behind them, so that ``U Vᵀ`` is
    not formed. :meth:`P4Linear.from_linear` makes one of an ``nn.Conv2d``.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode: those of
            ``nn.Conv2d``.
        rank: k, 1 <= k <= min(m, n), where m is ``out_channels`` and n = in_channels / groups × kernel height × width.
        seed, device, dtype: as for :class:`P4Linear`.

    Attributes: those of :class:`P4Linear`, for the m × n matrix.

    Shapes: input (N, in_channels, H, W) to output (N, out_channels, H', W'), as for ``nn.Conv2d``.

    >>> layer = P4Linear.from_linear(nn.Conv2d(32, 64, 3), rank=4)
    >>> layer(torch.zeros(5, 32, 8, 8)).shape, sum(p.numel() for p in layer.parameters())
    (torch.Size([5, 64, 6, 6]), 1472)
    """

    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        rank: int = 1,
        seed: int = 0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        geometry = stride, padding, dilation, groups
        in_channels, out_channels = integer("in_channels", in_channels, 1), integer("out_channels", out_channels, 1)
        for size in kernel_size if isinstance(kernel_size, tuple | list) else (kernel_size,):
            integer("kernel_size", size, 1)
        for name, value, low in (("stride", stride, 1), ("dilation", dilation, 1), ("padding", padding, 0)):
            for size in value if isinstance(value, tuple | list) else () if isinstance(value, str) else (value,):
                integer(name, size, low)
        try:
            plain = nn.Conv2d(in_channels, out_channels, kernel_size, *geometry, False, padding_mode, device="meta")
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                "kernel_size, stride, padding, dilation, groups, padding_mode: expected what nn.Conv2d takes, which "
                f"says: {error}"
            ) from error
        super().__init__(plain.weight[0].numel(), out_channels, rank, bias, seed, device=device, dtype=dtype)
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, plain.kernel_size
        for name in _GEOMETRY:
            setattr(self, name, getattr(plain, name))
        # torch's own form of the padding, which has "same" and the modes beside zeros in it
        self._padding = list(plain._reversed_padding_repeated_twice)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, {self.kernel_size}, rank={self.rank}"

    def forward(self, x: Tensor) -> Tensor:
        """The convolution with the weight ``A + U Vᵀ``, and b."""
        require_images(x, self.A, self.in_channels)
        if any(self._padding):
            x = pad(x, self._padding, "constant" if self.padding_mode == "zeros" else self.padding_mode)
        options: dict[str, Any] = {"stride": self.stride, "dilation": self.dilation, "groups": self.groups}
        filters = self.V.mT.unflatten(1, (-1, *self.kernel_size)).repeat(self.groups, 1, 1, 1)
        perturbed = conv2d(conv2d(x, filters, **options), self.U[..., None, None], groups=self.groups)
        return conv2d(x, self.A.unflatten(1, (-1, *self.kernel_size)), self.bias, **options) + perturbed

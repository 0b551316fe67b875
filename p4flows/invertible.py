"""P4Inv: an invertible linear layer with O(n²) inverse and log-determinant (Section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence

import torch
from torch import Tensor, nn

from p4flows import algebra
from p4flows._autograd import forward_map, inverse_map
from p4flows._checks import Bounds, bounds, integer
from p4flows._random import normal
from p4flows.initial import initial_matrix
from p4flows.merging import Group, correct_, merge_, redraw_
from p4flows.perturbation import P4Layer

__all__ = ["P4Inv"]


class P4Inv(P4Layer):
    r"""Invertible linear layer ``y = (A + U Vᵀ) x + b``, trained through the rank-k perturbation ``U Vᵀ``.

    A, its inverse and its determinant are frozen. With the capacitance ``C = I + Vᵀ A⁻¹ U`` and G = det C,

    .. math::
        \ln|\det(A + U V^T)| &= \ln|G| + \ln|\det A| \\
        (A + U V^T)^{-1} &= A^{-1} - A^{-1} U C^{-1} V^T A^{-1}

    so that both directions and the log-determinant cost O(n²), with gradients for U, V, b and the input. Merging
    (:meth:`merge`, usually called by :class:`p4flows.MergeScheduler`) moves ``U Vᵀ`` into A and starts a new
    perturbation, U = 0 and V ~ N(0, 1), without changing the layer's function (Algorithm 2). ``train()`` and
    ``eval()`` compute the same function.

    Args:
        features: n, the size of the last dimension of the input.
        rank: k, 1 <= k <= n. The paper has k = 1. A step costs O(k n²) beside the O(n²) a row.
        bias: whether there is a trainable b (n,), which starts at zero.
        init: the A to start from: "identity"; "reverse" (A[i, n-1-i] = 1); "orthogonal" (random, from ``seed``);
            a permutation p, an integer tensor (n,), so that ``y = x[..., p]``; or an invertible (n, n) matrix,
            whose inverse and log|det| are computed once, in float64.
        seed: V is a function of the seed and of the number of merges; give layers of one model different seeds.
        bounds_update: (low, high) for ln|G| outside which a merge is skipped, unless forced (Appendix A).
            None for no bound.
        bounds_det: the same for ln|G det A|.
        bounds_penalty: (low, high) beyond which :meth:`penalty` grows.
        penalty_weight: its factor C_p (0.1 in the paper's linear problems).
        device, dtype: of A, A_inv, U, V and b.

    Attributes: parameters U, V (n, k) and bias (n,) or None; buffers A, A_inv (n, n); logabsdet_A, sign_A (),
    float64 whatever the layer's dtype; seed, merges (), int64.

    Shapes: input (..., n) to output (..., n) and log|det| (...), both in the input's dtype (log|det| in float32
    for half-precision input).

    Not checked: that A + U Vᵀ is invertible. At G = 0 the forward direction is right, with log|det| = -inf, and
    the inverse is not finite.

    Raises:
        ValueError: for an argument outside what is said here, and by both directions for input of another width
            or dtype.

    References:
        Krämer, Köhler, Noé: Training Invertible Linear Layers through Rank-One Perturbations. arXiv:2010.07033.

    >>> layer = P4Inv(3, init="reverse")
    >>> y, logabsdet = layer(torch.tensor([[1.0, 2.0, 3.0]]))
    >>> y.tolist(), logabsdet.tolist()
    ([[3.0, 2.0, 1.0]], [0.0])
    >>> layer.inverse(y)[0].tolist()
    [[1.0, 2.0, 3.0]]
    """

    _version = 1  # of the state dict; see nn.Module._load_from_state_dict

    U: nn.Parameter
    V: nn.Parameter
    A: Tensor
    A_inv: Tensor
    sign_A: Tensor
    logabsdet_A: Tensor
    seed: Tensor
    merges: Tensor

    def __init__(
        self,
        features: int,
        rank: int = 1,
        bias: bool = True,
        init: str | Tensor = "identity",
        seed: int = 0,
        *,
        bounds_update: Bounds = (-6.0, None),
        bounds_det: Bounds = (-2.5, 15.5),
        bounds_penalty: Bounds = (-2.0, 15.0),
        penalty_weight: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.features = integer("features", features, 1)
        self.rank = integer("rank", rank, 1, self.features)
        self.bounds_update = bounds("bounds_update", bounds_update)
        self.bounds_det = bounds("bounds_det", bounds_det)
        self.bounds_penalty = bounds("bounds_penalty", bounds_penalty)
        if not penalty_weight >= 0:
            raise ValueError(f"penalty_weight: expected a number >= 0, got {penalty_weight!r}")
        self.penalty_weight = float(penalty_weight)
        dtype = dtype or torch.get_default_dtype()
        if not dtype.is_floating_point:
            raise ValueError(f"dtype: expected a floating-point type, got {dtype}")

        seed_tensor = torch.tensor(integer("seed", seed), dtype=torch.int64)
        start = initial_matrix(init, self.features, seed_tensor, dtype)
        self.register_buffer("A", start.A)
        self.register_buffer("A_inv", start.A_inv)
        self.register_buffer("sign_A", start.sign)
        self.register_buffer("logabsdet_A", start.logabsdet)
        self.register_buffer("seed", seed_tensor)
        self.register_buffer("merges", torch.zeros_like(seed_tensor))
        self.U = nn.Parameter(torch.zeros(self.features, self.rank, dtype=dtype))
        self.V = nn.Parameter(normal(self.seed, self.merges, self.U.shape).to(dtype))
        self.register_parameter("bias", nn.Parameter(torch.zeros(self.features, dtype=dtype)) if bias else None)
        if device is not None:
            self.to(device)

    def extra_repr(self) -> str:
        return f"{self.features}, rank={self.rank}, bias={self.bias is not None}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> P4Inv:
        # .float(), .half() and .to(dtype) must not round the tracked log-determinant.
        kept = {name: getattr(self, name) for name in ("sign_A", "logabsdet_A")}
        super()._apply(fn, recurse)
        for name, value in kept.items():
            moved = getattr(self, name)
            if moved.dtype != value.dtype:
                setattr(self, name, value.to(moved.device))
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(A + U Vᵀ) x + b`` and its log|det|."""
        self._check(x)
        return forward_map(self.A, self.A_inv, self.logabsdet_A, self.U, self.V, self.bias, x)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """``(A + U Vᵀ)⁻¹ (y - b)`` and its log|det|, the negative of the forward direction's."""
        self._check(y)
        return inverse_map(self.A_inv, self.logabsdet_A, self.U, self.V, self.bias, y)

    @property
    def matrix(self) -> Tensor:
        """The effective matrix ``A + U Vᵀ``, (n, n), differentiable. For tests, plots and export."""
        return self.A + self.U @ self.V.mT

    @property
    def inverse_matrix(self) -> Tensor:
        """The inverse of the effective matrix by equation 1, (n, n), differentiable."""
        W, C = algebra.capacitance(self.A_inv, self.U, self.V)
        return self.A_inv - W @ algebra.solve_capacitance(C, self.V.mT @ self.A_inv)

    @property
    def sign(self) -> Tensor:
        """Sign of the effective determinant, () in float64."""
        _, C = algebra.capacitance(self.A_inv, self.U, self.V)
        return algebra.sign_and_logabsdet(C)[0] * self.sign_A

    @property
    def logabsdet(self) -> Tensor:
        """ln|det| of the effective matrix, () in float64, differentiable."""
        _, C = algebra.capacitance(self.A_inv, self.U, self.V)
        return algebra.sign_and_logabsdet(C)[1] + self.logabsdet_A

    def _check(self, x: Tensor) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise ValueError(f"input: expected a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
        if x.ndim == 0 or x.shape[-1] != self.features:
            raise ValueError(f"input: expected shape (..., {self.features}), got {tuple(x.shape)}")
        if x.dtype != self.A.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"input: expected dtype {self.A.dtype} as the layer's, got {x.dtype}")

    @property
    def zeroed(self) -> tuple[nn.Parameter, ...]:
        return (self.U,)

    @property
    def redrawn(self) -> tuple[nn.Parameter, ...]:
        return (self.V,)

    @property
    def group_key(self) -> Hashable:
        return self.U.shape, self.U.dtype, self.U.device, self.bounds_update, self.bounds_det

    def merge(self, force: bool = False) -> Tensor:
        """Merge ``U Vᵀ`` into A, A_inv and log|det A| (Algorithm 2), in place, O(k n²).

        Skipped where ln|G| or ln|G det A| is out of bounds, unless forced; where the new A or A_inv would not be
        finite, even if forced; and where U or V is not finite: then the perturbation is reset instead. Does not
        wait for the device. Returns the :class:`MergeOutcome` as a 0-d int64 tensor.
        """
        return P4Inv.merge_all([self], force)[0]

    @classmethod
    def group(cls, layers: Iterable[P4Inv]) -> Group:
        """Layers of equal ``group_key``, to be merged and corrected together. Narrow ones will share their memory."""
        return Group(layers)

    @classmethod
    def merge_all(cls, layers: Sequence[P4Inv], force: bool = False) -> Tensor:
        """Merge layers of equal ``group_key``, narrow ones in one batched call. The outcomes, (len(layers),)."""
        first = layers[0]
        options = {"force": force, "bounds_update": first.bounds_update, "bounds_det": first.bounds_det}
        states = (layers if isinstance(layers, Group) else Group(layers)).states()
        return torch.cat([merge_(**state, **options) for state in states])

    def reset(self) -> None:
        """Drop the perturbation without merging it: U = 0, a new V; the function becomes that of A."""
        for state in Group([self]).states():
            redraw_(state["U"], state["V"], state["seed"], state["merges"], torch.tensor([True], device=self.U.device))

    def correct(self, order: int = 7) -> None:
        """Correct A_inv by one hyperpower iteration, and recompute log|det A| and its sign by LU in float64.

        ``order`` is 2, 3 or 7, see :func:`p4flows.algebra.hyperpower`. Where the iteration cannot converge
        (Frobenius norm of ``I - A A_inv`` of 1 or more) A is inverted in float64 instead. Whatever is not
        finite is not stored. O(n³), called every few hundred or thousand steps; waits for the device once.
        """
        P4Inv.correct_all([self], order)

    @classmethod
    def correct_all(cls, layers: Sequence[P4Inv], order: int = 7) -> None:
        """Correct layers of equal ``group_key``, narrow ones in one batched call."""
        for state in (layers if isinstance(layers, Group) else Group(layers)).states():
            correct_(state["A"], state["A_inv"], state["sign_A"], state["logabsdet_A"], order)

    def penalty(self) -> Tensor:
        r"""The penalty of Appendix A, a differentiable scalar () in float64:

        .. math:: g = C_p \sum_{l \in \{\ln|G|, \ln|G \det A|\}}
            \mathrm{ReLU}^2(l - C_{max}) + \mathrm{ReLU}^2(C_{min} - l)
        """
        _, C = algebra.capacitance(self.A_inv, self.U, self.V)
        # Where G = 0 the gradient would be infinite: a large constant instead.
        singular = algebra.sign_and_logabsdet(C.detach())[0] == 0
        regular = torch.where(singular, torch.eye(self.rank, dtype=C.dtype, device=C.device), C)
        log_G = algebra.sign_and_logabsdet(regular)[1].where(~singular, math.log(torch.finfo(C.dtype).tiny))
        low, high = self.bounds_penalty
        total = torch.zeros_like(log_G)
        for value in (log_G, log_G + self.logabsdet_A):
            if high is not None:
                total = total + torch.relu(value - high) ** 2
            if low is not None:
                total = total + torch.relu(low - value) ** 2
        return self.penalty_weight * total

    @torch.no_grad()
    def residual(self) -> Tensor:
        """``max|A A_inv - I|`` of the frozen pair, (). A diagnostic, O(n³)."""
        return algebra.residual(self.A, self.A_inv).abs().max()

"""InvertibleLinear: a dense weight that a matrix with a tracked inverse follows."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from p4flows.checks import Bounds, bounds, flag, floating, integer, move
from p4flows.layers.dense_gradients import forward_map, inverse_map, straight_through
from p4flows.layers.export import FromLinear, as_linear
from p4flows.layers.tracked import Tracked
from p4flows.outcomes import MergeOutcome
from p4flows.perturbation import P4Layer
from p4flows.tracking.following import follow_
from p4flows.tracking.initial import initial_matrix
from p4flows.tracking.jumping import jump_
from p4flows.tracking.matrix import TrackedMatrix
from p4flows.tracking.noise import directions

__all__ = ["InvertibleLinear"]


class InvertibleLinear(FromLinear, Tracked, P4Layer):
    r"""Invertible linear layer ``y = A x + b``, in which A follows a dense trained weight W by low-rank updates.

    W is an ordinary parameter, as that of ``nn.Linear``, for any optimizer that evaluates the loss at the weights only.
    The layer computes with A, whose inverse and log|det| are tracked, so that both directions and the log-determinant
    cost O(n²) a row. The gradient of the loss with respect to A goes to W: no factorisation is needed for it,

    .. math:: \frac{\partial L}{\partial W} = g_y^T x + \Big(\sum g_l\Big) A^{-T}

    in the forward direction, and :math:`-(g_x A^{-1})^T x - (\sum g_l) A^{-T}` in the inverse one. After each optimizer
    step :meth:`merge`, usually called by :class:`p4flows.MergeScheduler`, moves A towards W by nearly the best update
    of rank k of ``E = W - A``: one step of subspace iteration, ``P = orth(E Q)``, ``Q ← Eᵀ P``, ``A ← A + P Qᵀ``, with
    Woodbury's formula for A⁻¹ and the determinant lemma for log|det A|, O(k n²). What does not fit stays in E, and is
    made up for by the next updates. So it learns as a dense matrix does. Up to n = 128 all of E fits.

    Args:
        features: n, the size of the last dimension of the input.
        bias: whether there is a trainable b (n,), which starts at zero.
        init: the A and W to start from, as in :class:`p4flows.P4Inv`.
        seed: of the first directions Q, and of ``init="orthogonal"``.
        rank: k, the rank that A follows with in one update, 1 <= k <= n; by default n up to n = 128, and 16 above.
            With rank n the update is all of E: A becomes W by an inversion in float64, which costs less than to find
            a part of E in so narrow a matrix. Up to n = 512 it is inverted too where one update leaves more than 0.5 %.
            Above, there are up to four updates in one step while the weight is more than 10 % ahead.
        bounds_update: (low, high) for ln σ of the singular values σ of the capacitance of an update. Outside, a half, a
            quarter or an eighth of the update is taken, or it is skipped; nothing is lost, as the rest stays in E.
        bounds_det: the same for ln|det A|; there is none by default.
        device, dtype: of W, A, A_inv and b.

    Attributes: parameters weight (n, n) and bias (n,) or None; A, A_inv, A_double, A_inv_double (n, n), sign_A,
    logabsdet_A, rounding () as in :class:`p4flows.P4Inv`, all buffers of the module ``tracked``; the buffer directions
    Q (n, k), None where the rank is n.

    It has to be followed after every optimizer step: every second one costs much of the learning. Weight decay,
    averages and gradient clipping mean for W what they mean for ``nn.Linear``. First derivatives cost O(n²) a row;
    second derivatives, and the transforms of ``torch.func``, factorise A, which costs O(n³).

    Shapes: input (..., n) to output (..., n) and log|det| (...), both in the input's dtype (log|det| in float32
    for half-precision input).

    Raises:
        ValueError: for an argument outside what is said here, and by both directions for input of another width,
            dtype or device.

    References:
        Krämer, Köhler, Noé: Training Invertible Linear Layers through Rank-One Perturbations. arXiv:2010.07033.
        Vogels, Karimireddy, Jaggi: PowerSGD. arXiv:1905.13727.

    >>> from p4flows import MergeScheduler
    >>> layer = InvertibleLinear(3, init="reverse")
    >>> optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    >>> scheduler = MergeScheduler(layer, optimizer).attach()
    >>> y, logabsdet = layer(torch.tensor([[1.0, 2.0, 3.0]]))
    >>> (y.square().sum() - logabsdet.sum()).backward()
    >>> optimizer.step()
    >>> bool(layer.lag < 1e-6), layer.A.equal(torch.eye(3).flip(0))
    (True, False)
    """

    _version = 1  # of the state dict

    merge_every = 1
    deferred = True
    look_every = 10
    gathered = ("weight", "directions")

    weight: nn.Parameter
    bias: nn.Parameter | None
    directions: Tensor | None

    def __init__(
        self,
        features: int,
        bias: bool = True,
        init: str | Tensor = "identity",
        seed: int = 0,
        *,
        rank: int | None = None,
        bounds_update: Bounds = (-6.0, None),
        bounds_det: Bounds = (None, None),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.features = integer("features", features, 1)
        self.rank = _default_rank(self.features) if rank is None else integer("rank", rank, 1, self.features)
        self.bounds_update = bounds("bounds_update", bounds_update)
        self.bounds_det = bounds("bounds_det", bounds_det)
        dtype = floating(dtype)
        with torch.device("cpu"):
            number = torch.tensor(integer("seed", seed), dtype=torch.int64)
            start = initial_matrix(init, self.features, number, dtype)
            self.tracked = TrackedMatrix(start, dtype)
            self.weight = nn.Parameter(start.A.to(dtype, copy=True))
            zero = torch.zeros(self.features, dtype=dtype)
            self.register_parameter("bias", nn.Parameter(zero) if flag("bias", bias) else None)
            Q = directions(number, torch.zeros_like(number), self.features, self.rank).to(dtype)
            self.register_buffer("directions", Q if self.rank < self.features else None)
        move(self, device)

    def extra_repr(self) -> str:
        return f"{self.features}, rank={self.rank}, bias={self.bias is not None}"

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``A x + b`` and its log|det|."""
        self._check(x)
        frozen = self.tracked
        return forward_map(self.weight, self.bias, x, frozen.A, frozen.A_inv, frozen.logabsdet)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """``A⁻¹ (y - b)`` and its log|det|, the negative of the forward direction's."""
        self._check(y)
        frozen = self.tracked
        return inverse_map(self.weight, self.bias, y, frozen.A, frozen.A_inv, frozen.logabsdet)

    @property
    def matrix(self) -> Tensor:
        """A, (n, n), with gradients that go to the weight. For tests, plots and export."""
        return straight_through(self.weight, self.A)

    @property
    def matrix_double(self) -> Tensor:
        """A in float64, (n, n), from what it is rounded from; not differentiable."""
        return self.tracked.exact[0].clone()

    @property
    def trained_matrix(self) -> Tensor:
        """The weight in float64, (n, n), not differentiable: what an average over training is an average of.

        A weight that is A rounded, as in an average, tells less than what A is rounded from, which it is then.
        """
        return self.matrix_double if torch.equal(self.weight, self.A) else self.weight.detach().double()

    @property
    def inverse_matrix(self) -> Tensor:
        """The inverse of A, (n, n), with gradients that go to the weight."""
        frozen = self.tracked
        identity = torch.eye(self.features, dtype=self.A.dtype, device=self.A.device)
        return inverse_map(self.weight, None, identity, frozen.A, frozen.A_inv, frozen.logabsdet)[0].mT

    @property
    def sign(self) -> Tensor:
        """Sign of det A, () in float64."""
        return self.sign_A.clone()

    @property
    def logabsdet(self) -> Tensor:
        """ln|det A|, () in float64, with gradients that go to the weight."""
        frozen = self.tracked
        row = self.A.new_zeros(1, self.features)
        _, found = forward_map(self.weight, None, row, frozen.A, frozen.A_inv, frozen.logabsdet)
        return self.logabsdet_A + (found - found.detach())[0]

    @property
    @torch.no_grad()
    def lag(self) -> Tensor:
        """``‖W - A‖ / ‖A‖`` in Frobenius norms, () in float64: how far A is behind the weight.

        It is zero after a step that is followed with rank n, and otherwise at most 0.5 % from n = 129 to 512. In wider
        layers up to four updates are made in a step to keep it near 10 %. The larger it is, the less the layer learns
        in a step beside a dense matrix: raise the rank or lower the learning rate.
        """
        A = self.tracked.exact[0]
        return torch.linalg.matrix_norm(self.weight.double() - A) / torch.linalg.matrix_norm(A)

    def diagnostics(self) -> dict[str, Tensor]:
        return {**super().diagnostics(), "lag": self.lag}

    @torch.no_grad()
    def settle(self) -> None:
        """Make A equal to the weight, by one inversion in float64, O(n³): for the end of training, or export.

        Raises ValueError, and changes nothing, if the weight is not finite or is singular.
        """
        self.tracked.set(self.weight.double(), "weight")

    @torch.no_grad()
    def set_matrix(self, M: Tensor) -> None:
        """Make M (n, n) the matrix A, and the weight. Inverted in float64, O(n³).

        Raises ValueError, and changes nothing, if M has another shape, is not finite or is singular.
        """
        self.tracked.set(M)
        self.weight.copy_(M)

    def to_linear(self, inverse: bool = False) -> nn.Linear:
        """The finished layer's map, or its inverse, as a plain ``nn.Linear`` without gradients, for serving.

        It is A that counts: call :meth:`settle` first if the weight is ahead of it. Its log|det| is the constant
        :attr:`logabsdet`. For the inverse, A is inverted in float64.
        """
        return as_linear(self, self.matrix_double, inverse)

    @property
    def perturbation(self) -> tuple[nn.Parameter, ...]:
        return (self.weight,)

    @property
    def group_key(self) -> Hashable:
        return self.features, self.rank, self.weight.dtype, self.weight.device, self.bounds_update, self.bounds_det

    def merge(self, force: bool = False) -> Tensor:
        """Move A towards the weight by an update of rank k, in place, O(k n²); with rank n, to the weight.

        Where the whole update is out of bounds a part of it is taken, unless forced; it is skipped where no part is
        within bounds or finite, and where the weight is not finite. Waits for the device. Returns the
        :class:`p4flows.MergeOutcome`, an int64 tensor ().
        """
        return MergeOutcome.without_reason(type(self).merge_all([self], force)[0])

    @classmethod
    def merge_all(cls, layers: Sequence[Any], force: bool = False) -> Tensor:
        """Let layers of equal ``group_key`` follow, narrow ones in one batched call.

        Returns the :class:`p4flows.MergeOutcome` of each with the reason of a skip, (len(layers),).
        """
        first = layers[0]
        options: dict[str, Any] = {"force": force, "bounds_update": first.bounds_update, "bounds_det": first.bounds_det}
        move = jump_ if first.rank == first.features else follow_
        return cls._joined([move(state, **options) for state in cls._grouped(layers).states()], layers)

    @torch.no_grad()
    def reset(self) -> None:
        """Drop what A has not yet followed: the weight becomes A."""
        self.weight.copy_(self.A)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        if self.rank == self.features:
            state_dict.pop(f"{prefix}directions", None)  # of a state of lower rank
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def _default_rank(n: int) -> int:
    return n if n <= 128 else 16

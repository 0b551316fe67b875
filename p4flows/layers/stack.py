"""P4InvStack: many P4Inv layers of one width with elementwise bijections between them (Section 3.4)."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from p4flows.checks import floating, integer, items, move
from p4flows.layers.activations import BentIdentity, Inverse, bijective
from p4flows.layers.autocast import without_autocast
from p4flows.layers.chain import Step, bijection, chain
from p4flows.layers.invertible import P4Inv
from p4flows.layers.perturbed import PerturbedInverse
from p4flows.tracking import algebra
from p4flows.tracking.initial import InitialMatrix, initial_matrix
from p4flows.tracking.noise import derive

__all__ = ["P4InvStack"]

_OPTIONS = ("bounds_update", "bounds_det", "bounds_penalty", "penalty_weight")


class P4InvStack(PerturbedInverse):
    r"""A deep narrow network ``f_L ∘ P_L ∘ ⋯ ∘ f_1 ∘ P_1`` of P4Inv layers P and elementwise bijections f.

    The function is that of L :class:`p4flows.P4Inv` layers with bijections after them, and so is its training; the
    tensors of all layers are kept in one, so that a merge and an optimizer step take a few calls for all of them. With
    ``models`` = m, m networks that have nothing in common are trained side by side.

    Args:
        features: n, the size of the last dimension of the input. Meant for n of up to about 100.
        depth: L, the number of P4Inv layers.
        rank, bias, init, device, dtype: of every layer, as in P4Inv.
        bounds: bounds_update, bounds_det, bounds_penalty and penalty_weight of every layer, as in P4Inv.
        seed: of the network; the layers' seeds are derived from it. Model i of several is that of ``seed + i``.
        models: m, the number of independent networks, or None for one without a model dimension.
        activations: the bijections f, repeated over the layers; by default the Bent identity and its inverse in turn,
            as in Appendix G. Modules with ``forward`` and ``inverse`` that return values (..., n) and log|det| (...),
            shared by all models. With :class:`p4flows.Elementwise` ones, and inverses of such, gradients are written
            by hand: several times faster.

    Attributes: those of P4Inv with leading dimensions (L) or (m, L): ``U`` (L, n, k), ``bias`` (L, n), ``logabsdet``
    (L), and so on. ``stack[i]`` is layer i, a P4Inv of its own with a copy of all its tensors; of several models
    ``stack[i]`` is a P4InvStack, and ``stack[i, l]`` one of its layers. ``list(stack)`` and :meth:`from_layers`
    convert.

    Shapes: input (..., n) or (m, ..., n) to output of the same shape and log|det| (...) or (m, ...).

    An optimizer counts the steps of a parameter as one number. So where :class:`p4flows.MergeScheduler` sets the state
    of a layer back that has merged, that of the whole stack goes back: of skipped layers and models too.

    Raises:
        ValueError: for an argument outside what is said here, and by both directions for input of another shape or
            dtype.

    References:
        Krämer, Köhler, Noé: Training Invertible Linear Layers through Rank-One Perturbations. arXiv:2010.07033.

    >>> stack = P4InvStack(2, depth=6)
    >>> y, logabsdet = stack(torch.tensor([[0.5, -1.0]]))
    >>> stack.inverse(y)[0].round(decimals=3).tolist()
    [[0.5, -1.0]]
    >>> len(stack), stack[3].matrix.tolist()
    (6, [[1.0, 0.0], [0.0, 1.0]])
    """

    narrow = 128
    """The width up to which effective matrices are formed: n × n numbers each, about as many as a batch has."""

    def __init__(
        self,
        features: int,
        depth: int,
        rank: int | None = None,
        bias: bool = True,
        init: str | Tensor = "identity",
        seed: int = 0,
        *,
        models: int | None = None,
        activations: Sequence[nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **bounds: Any,
    ) -> None:
        super().__init__(features, rank, **bounds)
        self.depth = integer("depth", depth, 1)
        self.models = None if models is None else integer("models", models, 1)
        dtype = floating(dtype)
        with torch.device("cpu"):
            seeds = derive(integer("seed", seed) + torch.arange(self.models or 1)[:, None], torch.arange(self.depth))
            seeds = seeds[0] if self.models is None else seeds
            if isinstance(init, str) and init == "orthogonal":
                starts = [initial_matrix(init, self.features, each, dtype) for each in seeds.flatten()]
            else:
                starts = [initial_matrix(init, self.features, seeds, dtype)] * seeds.numel()
            fields = (torch.stack(tensors).unflatten(0, seeds.shape) for tensors in zip(*starts, strict=True))
            self._register(InitialMatrix(*fields), dtype, seeds, bias)
        if activations is None:
            activations = BentIdentity(), Inverse(BentIdentity())
        activations = items("activations", activations, "modules with forward and inverse", bijective)
        self.activations = nn.ModuleList(activations)
        move(self, device)

    @classmethod
    def from_layers(cls, layers: Iterable[P4Inv], activations: Sequence[nn.Module] | None = None) -> P4InvStack:
        """A stack of these P4Inv layers, with a copy of their tensors (a live perturbation too).

        Raises ValueError for layers that differ in width, rank, bias, dtype, device, bounds or penalty weight.
        """
        layers = items("layers", layers, "P4Inv layers", lambda layer: isinstance(layer, P4Inv))
        kinds = {(l.U.shape, l.U.dtype, l.U.device, l.bias is None, *(getattr(l, o) for o in _OPTIONS)) for l in layers}
        if len(kinds) > 1:
            raise ValueError("layers: expected equal width, rank, bias, dtype, device, bounds and penalty weight")
        first = layers[0]
        stack = cls(
            *(first.features, len(layers), first.rank, first.bias is not None),
            **{name: getattr(first, name) for name in _OPTIONS},
            activations=activations,
            device=first.U.device,
            dtype=first.U.dtype,
        )
        with torch.no_grad():
            for name, tensor in stack._own_state().items():
                tensor.copy_(torch.stack([layer.state_dict()[name] for layer in layers]))
        return stack

    def __len__(self) -> int:
        return len(self.seed)

    def __getitem__(self, index: int | tuple[int, int]) -> P4Inv | P4InvStack:
        indices = index if isinstance(index, tuple) else (index,)
        if not all(isinstance(i, int) for i in indices) or len(indices) > self.seed.ndim:
            raise ValueError(f"index: expected an integer, or a model and a layer, got {index!r}")
        count = self.seed[index].ndim  # an IndexError here ends an iteration
        options = {name: getattr(self, name) for name in _OPTIONS} | {"device": self.U.device, "dtype": self.U.dtype}
        sizes: dict[str, Any] = {"features": self.features, "rank": self.rank, "bias": self.bias is not None}
        part: P4Inv | P4InvStack
        if count == 0:
            part = P4Inv(**sizes, **options)
        else:
            activations = copy.deepcopy(list(self.activations))
            part = P4InvStack(depth=self.depth, activations=activations, **sizes, **options)
        with torch.no_grad():
            for name, tensor in part.state_dict().items():
                if not name.startswith("activations."):
                    tensor.copy_(self.state_dict()[name][index])
        return part

    def _own_state(self) -> dict[str, Tensor]:
        """The state of the P4Inv layers, without that of the activations."""
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("activations.")}

    def extra_repr(self) -> str:
        models = "" if self.models is None else f", models={self.models}"
        return f"{self.features}, depth={self.depth}, rank={self.rank}, bias={self.bias is not None}{models}"

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """All layers from the first to the last, and the log|det| of the whole."""
        return self._run(x, inverse=False)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """All inverses from the last layer to the first, and the log|det| of that."""
        return self._run(y, inverse=True)

    def _run(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        leading = self.seed.shape[:-1]
        self._check(x, leading)
        rows = x.reshape(*leading, -1, self.features)
        steps = [(self.activations[i % len(self.activations)], inverse) for i in range(self.depth)]
        with without_autocast(x):
            W, C = algebra.capacitance(self.A_inv, self.U, self.V)
            linear = (algebra.sign_and_logabsdet(C)[1] + self.logabsdet_A).sum(-1, keepdim=True)
        if self.features > self.narrow:
            y, total = self._step_by_step(rows, W, C, steps)
        elif inverse:
            with without_autocast(x):
                M = (self.A_inv - W @ algebra.solve_capacitance(C, self.V.mT @ self.A_inv)).movedim(-3, 0).flip(0)
                b = -(M @ self._biases().flip(0).mT).mT
            rows, first = bijection(steps.pop(), rows)
            y, total = chain(rows, M, b if leading else b.squeeze(1), [*reversed(steps), None], len(self.activations))
            total = total + first
        else:
            M = (self.A + self.U @ self.V.mT).movedim(-3, 0)
            b = self._biases()
            y, total = chain(rows, M, b if leading else b.squeeze(1), steps, len(self.activations))
        total = total + (-linear if inverse else linear).to(total.dtype)
        return y.reshape(x.shape), total.reshape(x.shape[:-1])

    def _biases(self) -> Tensor:
        """As rows, layers first: (L, 1, n) or (L, m, 1, n)."""
        b = self.U.new_zeros(self.U.shape[:-1]) if self.bias is None else self.bias
        return b.movedim(-2, 0).unsqueeze(-2)

    def _step_by_step(self, x: Tensor, W: Tensor, C: Tensor, steps: list[Step]) -> tuple[Tensor, Tensor]:
        As, inverses, Us, Vs, Ws, Cs = (T.movedim(-3, 0).unbind() for T in (self.A, self.A_inv, self.U, self.V, W, C))
        b = self._biases().unbind()
        total = x.new_zeros(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))
        inverse = steps[0][1]
        for i in reversed(range(self.depth)) if inverse else range(self.depth):
            if not inverse:
                x = algebra.perturbed_product(As[i], Us[i], Vs[i], x) + b[i]
            x, logabsdet = bijection(steps[i], x)
            total = total + logabsdet
            if inverse:
                x = algebra.perturbed_inverse_product(inverses[i], Vs[i], Ws[i], Cs[i], x - b[i])
        return x, total

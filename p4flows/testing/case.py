"""What all checks of a layer have in common: how it is made, called, perturbed and trained, and how exact is exact."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from p4flows.checks import items, number
from p4flows.outcomes import MergeOutcome
from p4flows.perturbation import P4Layer
from p4flows.training.scheduler import MergeScheduler

__all__ = ["Case", "Outputs", "keeps_function", "require"]

Outputs = list[Tensor]


def require(condition: Any, message: str) -> None:
    """AssertionError with the message unless the condition is true, also where Python leaves assertions out (-O)."""
    if not condition:
        raise AssertionError(message)


def keeps_function(outcome: Tensor) -> bool:
    """Whether a merge with these outcomes leaves the function as it was (of a layer that is not ``deferred``)."""
    return not ((outcome == MergeOutcome.RESET) | (outcome == MergeOutcome.PARTIAL)).any()


class Case:
    """A constructor of equal layers, and an example of their input."""

    def __init__(
        self,
        constructor: Callable[[], P4Layer],
        example: Tensor | Sequence[Tensor] | None,
        steps: int,
        scale: float,
        tolerance: float | None,
    ) -> None:
        self.constructor, self.steps, self.scale = constructor, steps, scale
        layer = self.new()
        self.dtype = next(p.dtype for p in layer.perturbation)
        usual = torch.finfo(self.dtype).eps ** 0.5
        self.tolerance = usual if tolerance is None else number("tolerance", tolerance, 0)
        if example is None:
            n = next((getattr(layer, name) for name in ("features", "in_features") if hasattr(layer, name)), None)
            if n is None:
                raise ValueError("example: expected an input, as the layer has neither features nor in_features")
            example = torch.randn(7, n, dtype=self.dtype, generator=self.generator(1))
        parts = (example,) if isinstance(example, Tensor) else example
        self.example = items("example", parts, "a tensor, or several", lambda x: isinstance(x, Tensor))

    def new(self, seed: int = 0) -> P4Layer:
        """A new layer, made after ``torch.manual_seed(seed)``."""
        torch.manual_seed(seed)
        try:
            layer = self.constructor()
        except TypeError as error:
            raise ValueError(f"constructor: expected one that takes no arguments; it says: {error}") from error
        if not isinstance(layer, P4Layer):
            raise ValueError(f"constructor: expected one that returns a P4Layer, got {type(layer).__name__}")
        return layer

    def generator(self, seed: int = 0) -> torch.Generator:
        return torch.Generator("cpu").manual_seed(seed)

    def call(self, layer: P4Layer, function: Callable[..., Any] | None = None) -> Outputs:
        """What the layer makes of the example: all tensors that it returns. ``function`` computes it if it is given."""
        parameter = layer.perturbation[0]
        return self.call_with(function or layer, [x.to(parameter.device, parameter.dtype) for x in self.example])

    def call_with(self, function: Callable[..., Any], inputs: Sequence[Tensor]) -> Outputs:
        """All tensors that the function returns, alone or in a tuple or a dict."""
        results = function(*inputs)
        if isinstance(results, Tensor):
            return [results]
        return [
            each for each in (results.values() if isinstance(results, dict) else results) if isinstance(each, Tensor)
        ]

    def trained(self, layer: P4Layer) -> list[nn.Parameter]:
        """What is trained of the perturbation: nothing, if the layer has frozen it since its S has no neighbours."""
        return [p for p in layer.perturbation if p.requires_grad]

    @torch.no_grad()
    def outputs(self, layer: P4Layer, function: Callable[..., Any] | None = None) -> Outputs:
        """As :meth:`call`, without gradients, in float64 on the CPU."""
        return [out.to("cpu", torch.float64) for out in self.call(layer, function)]

    def perturb(self, layer: P4Layer, generator: torch.Generator, scale: float | None = None) -> None:
        """Normal noise on what is trained of the perturbation."""
        self._add_noise(self.trained(layer), generator, scale)

    def perturb_others(self, layer: P4Layer, generator: torch.Generator) -> None:
        """Normal noise on what is trained beside the perturbation, such as a bias."""
        own = {id(p) for p in layer.perturbation}
        self._add_noise([p for p in layer.parameters() if p.requires_grad and id(p) not in own], generator)

    @torch.no_grad()
    def _add_noise(
        self, parameters: list[nn.Parameter], generator: torch.Generator, scale: float | None = None
    ) -> None:
        for p in parameters:
            noise = torch.randn(p.shape, dtype=torch.float64, generator=generator)
            p.add_((self.scale if scale is None else scale) * noise.to(p))

    def merge(self, layer: P4Layer, force: bool = False) -> Tensor:
        """Merge as the scheduler does; the outcomes without reasons."""
        group = type(layer).group([layer])
        outcome = type(layer).merge_all(group, force)[0]
        type(layer).correct_all(group, where_needed=True)
        return MergeOutcome.without_reason(outcome)

    def changed(self, layer: P4Layer, rounds: int = 3, seed: int = 2) -> P4Layer:
        """The layer after a few perturbations and merges, at B₀."""
        generator = self.generator(seed)
        for _ in range(rounds):
            self.perturb(layer, generator)
            self.merge(layer, force=True)
        layer.reset()
        return layer

    def train(self, layer: P4Layer, steps: int, state: Any = None) -> tuple[list[float], Any]:
        """Train towards the function of a changed layer; the losses, and the state to go on from."""
        with torch.no_grad():
            targets = [out.detach() for out in self.call(self.changed(self.new()).to(layer.perturbation[0].dtype))]
        optimizer: Optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=self.scale / 10)
        scheduler = MergeScheduler(layer, optimizer, force_every=2, correct_every=3)
        parts: tuple[Any, ...] = (layer, optimizer, scheduler)
        for part, own in zip(parts, state or (), strict=False):
            part.load_state_dict(own)
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            each = [nn.functional.mse_loss(a, b) for a, b in zip(self.call(layer), targets, strict=True)]
            loss = torch.stack(each).sum()
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
        return losses, [copy.deepcopy(part.state_dict()) for part in parts]

    # --- what is asserted ---------------------------------------------------------------------------------------

    def assert_close(self, a: Outputs, b: Outputs, what: str, tolerance: float | None = None) -> None:
        tolerance = self.tolerance if tolerance is None else tolerance
        for left, right in zip(a, b, strict=True):
            difference = (left - right).abs().max()
            allowed = tolerance * (1 + left.abs().max())
            require(
                difference <= allowed, f"{what}: expected a difference of at most {allowed:.2g}, got {difference:.2g}"
            )

    def assert_equal_states(self, a: P4Layer, b: P4Layer, what: str) -> None:
        left, right = a.state_dict(), b.state_dict()
        require(left.keys() == right.keys(), f"{what}: expected the entries {set(left)}, got {set(right)}")
        for name, value in left.items():
            same = torch.equal(torch.nan_to_num(value), torch.nan_to_num(right[name]))
            require(same, f"{what}: expected equal states, but {name!r} differs")

    def assert_holds(self, layer: P4Layer, when: str, tolerance: float | None = None) -> None:
        """The property, and that no buffer is infinite or NaN."""
        tolerance = self.tolerance if tolerance is None else tolerance
        for name, buffer in layer.named_buffers():
            require(buffer.isfinite().all(), f"{when}: the buffer {name!r} is not finite")
        violation = float(layer.violation())
        require(
            0 <= violation <= tolerance, f"{when}: expected a violation of at most {tolerance:.2g}, got {violation:.2g}"
        )

"""The checks of what a layer computes and becomes, each by itself."""

from __future__ import annotations

import copy
import warnings

import torch
from torch import Tensor, nn

from p4flows.outcomes import MergeOutcome
from p4flows.testing.case import Case, keeps_function, require

__all__ = [
    "compiling",
    "conversions",
    "declarations",
    "devices",
    "extremes",
    "groups",
    "half_precision",
    "identity",
    "merging",
    "modes",
    "not_finite",
    "training",
]

_HALF = torch.bfloat16


def declarations(case: Case) -> None:
    """B is made of parameters of the layer, of which ``zeroed`` and ``redrawn`` are two separate parts."""
    layer = case.new()
    B = layer.perturbation
    require(isinstance(B, tuple), f"perturbation: expected a tuple of parameters, got {B!r}")
    require(all(isinstance(p, nn.Parameter) for p in B), "perturbation: expected instances of nn.Parameter")
    own = {id(p) for p in layer.parameters()}
    parts = [{id(p) for p in each} for each in (B, layer.zeroed, layer.redrawn)]
    require(parts[0] <= own, "perturbation: expected parameters of the layer")
    require(parts[1] | parts[2] <= parts[0], "zeroed, redrawn: expected parameters of the perturbation")
    require(not parts[1] & parts[2], "zeroed, redrawn: expected different parameters")
    require(layer.merge_every in range(1, 2**31), f"merge_every: expected an integer >= 1, got {layer.merge_every!r}")
    penalty = layer.penalty()
    require(penalty.shape == (), f"penalty: expected a scalar, got shape {tuple(penalty.shape)}")
    require(penalty.isfinite(), f"penalty: expected a finite one, got {penalty!r}")
    if penalty.requires_grad and case.trained(layer):
        found = torch.autograd.grad(penalty, case.trained(layer), allow_unused=True)
        require(all(g is None or g.isfinite().all() for g in found), "penalty: expected a finite gradient at B0")
    for name, outcome in (("merge", layer.merge()), ("correct", layer.correct())):
        kind = outcome.dtype if isinstance(outcome, Tensor) else repr(outcome)
        require(kind == torch.int64, f"{name}: expected outcomes as an int64 tensor, got {kind}")


def identity(case: Case) -> None:
    """A layer starts at B₀, where neither a reset nor a merge nor a correction changes the function, and in S."""
    for layer in (case.new(), case.changed(case.new())):
        before = case.outputs(layer)
        case.assert_holds(layer, "at B0")
        for name, do in (("reset", layer.reset), ("merge", layer.merge), ("correct", layer.correct)):
            do()
            require(all((p == 0).all() for p in layer.zeroed), f"{name}: expected zeroed parameters to be zero")
            case.assert_close(before, case.outputs(layer), f"{name} at B0 changes the function")


def merging(case: Case) -> None:
    """A perturbation changes the function, a merge keeps it and ends at B₀; a reset goes back."""
    layer = case.changed(case.new())
    frozen = case.outputs(layer)
    case.perturb(layer, case.generator(3))
    before = case.outputs(layer)
    other = copy.deepcopy(layer)
    other.reset()
    case.assert_close(frozen, case.outputs(other), "reset does not go back to the function of the frozen parameters")
    own = [id(tensor) for tensor in (*layer.parameters(), *layer.buffers())]
    outcome = case.merge(layer)
    same = own == [id(tensor) for tensor in (*layer.parameters(), *layer.buffers())]
    require(same, "merge: expected parameters and buffers to be changed in place, got other tensors")
    skipped = bool(MergeOutcome.is_skip(outcome).all())
    require(not skipped, f"merge: expected a perturbation of size {case.scale:g} to be merged, got {outcome!r}")
    after = case.outputs(layer)
    acts = any(not torch.equal(a, b) for a, b in zip(frozen, before, strict=True))
    require(acts or layer.deferred or not case.trained(layer), "a perturbation does not change the function")
    if layer.deferred:
        case.assert_close(frozen, before, "a deferred perturbation changes the function before the merge")
    elif keeps_function(outcome):
        case.assert_close(before, after, "merging changes the function")
        require(all((p == 0).all() for p in layer.zeroed), "merge: expected zeroed parameters to be zero")
        declared = {id(p) for p in layer.zeroed}
        zeros = [p for p in case.trained(layer) if not p.any()]
        # An optimizer's averages of their gradients are reset with them, so that a scheduler has to know.
        require(all(id(p) in declared for p in zeros), "zeroed: expected all parameters that a merge sets to zero")
    layer.reset()
    case.assert_close(after, case.outputs(layer), "a merge does not end at B0")
    case.assert_holds(layer, "after a merge")


def not_finite(case: Case) -> None:
    """A perturbation with NaN or infinity in it is not merged, and a reset gets rid of it."""
    for number in (float("nan"), float("inf")):
        for i in range(len(case.new().perturbation)):
            layer = case.changed(case.new())
            frozen = case.outputs(layer)
            p = layer.perturbation[i]
            if not p.requires_grad:
                continue
            p.detach().view(-1)[0] = number
            outcome = case.merge(layer, force=True)
            refused = MergeOutcome.is_skip(outcome) | (outcome == MergeOutcome.RESET)
            require(refused.any(), f"merge: expected {number} in the perturbation to be refused, got {outcome!r}")
            case.assert_holds(layer, f"after a merge of {number}")
            layer.reset()
            require(all(each.isfinite().all() for each in layer.perturbation), f"reset: {number} stays")
            case.assert_close(
                frozen, case.outputs(layer), f"{number} in a perturbation gets into the frozen parameters"
            )


def extremes(case: Case) -> None:
    """Perturbations of any size leave all buffers finite, and the property but for rounding; a skip changes nothing."""
    largest = torch.finfo(case.dtype).max
    for size in (1.0, 1e3, largest**0.5, largest / 8):
        layer = case.changed(case.new())
        for seed in range(2):
            case.perturb(layer, case.generator(seed), size)
            before = copy.deepcopy(layer)
            outcome = case.merge(layer, force=bool(seed))
            entries = max((float(a.abs().max()) for a in layer.buffers() if a.is_floating_point()), default=0.0)
            case.assert_holds(layer, f"after a merge of {size:g}", case.tolerance * (1 + entries))
            if MergeOutcome.is_skip(outcome).all():
                case.assert_equal_states(before, layer, f"a skipped merge of {size:g}")
            layer.reset()


def training(case: Case) -> None:
    """A layer that a MergeScheduler merges learns the function of another one, and keeps its property."""
    layer = case.new()
    if not case.trained(layer):
        return
    losses, _ = case.train(layer, 100)
    require(losses[-1] < 0.9 * losses[0], f"training: expected a loss below {losses[0]:.3g}, got {losses[-1]:.3g}")
    case.assert_holds(layer, "after training")


def groups(case: Case) -> None:
    """Layers that are merged together become what they become alone."""
    alone = [case.new(seed) for seed in range(3)]
    for seed, layer in enumerate(alone):
        case.perturb(layer, case.generator(seed))
    together = copy.deepcopy(alone)
    if len({layer.group_key for layer in together}) == 1:
        kind = type(together[0])
        outcomes = MergeOutcome.without_reason(kind.merge_all(kind.group(together)))
        expected = torch.stack([layer.merge() for layer in alone])
        require(torch.equal(outcomes, expected), f"merge_all: expected {expected!r}, got {outcomes!r}")
        for one, other in zip(alone, together, strict=True):
            case.assert_close(case.outputs(one), case.outputs(other), "merge_all differs from merge")


def modes(case: Case) -> None:
    """``train()`` and ``eval()`` compute one function, and neither they nor ``forward`` change anything."""
    layer = case.changed(case.new())
    case.perturb(layer, case.generator(6))
    before = copy.deepcopy(layer)
    outputs = [case.outputs(layer.train(mode)) for mode in (False, True)]
    case.assert_close(outputs[0], outputs[1], "train and eval differ", 0)
    case.assert_equal_states(before, layer, "train, eval or forward")
    other = copy.deepcopy(layer).eval()
    for each in (layer.train(), other):
        case.merge(each)
    case.assert_equal_states(layer, other, "merges in train and in eval")


def conversions(case: Case) -> None:
    """Conversions to float64, float32 and back keep the function and the property, and the layer merges after them."""
    layer = case.changed(case.new())
    tolerance = max(torch.finfo(dtype).eps for dtype in (torch.float32, case.dtype)) ** 0.5
    for dtype in (torch.float64, torch.float32, case.dtype):
        before = case.outputs(layer)
        layer.to(dtype)
        case.assert_close(before, case.outputs(layer), f"conversion to {dtype}", tolerance)
        case.changed(layer, 1)
        case.assert_holds(layer, f"after conversion to {dtype}", tolerance)


def half_precision(case: Case) -> None:
    """In bfloat16 the layer runs and merges."""
    layer = case.changed(case.new()).to(_HALF)
    case.perturb(layer, case.generator(8))
    require(all(out.isfinite().all() for out in case.outputs(layer)), "half precision: expected finite outputs")
    case.merge(layer)
    case.assert_holds(layer, "after a merge in half precision", torch.finfo(_HALF).eps ** 0.5)


def devices(case: Case) -> None:
    """On the accelerator of this machine, if there is one, a layer merges as on the CPU."""
    if not torch.accelerator.is_available() or (case.dtype == torch.float64 and "mps" in str(_accelerator())):
        return
    here = case.changed(case.new())
    there = case.changed(case.new().to(_accelerator()))
    case.assert_close(case.outputs(here), case.outputs(there), f"on {_accelerator()}")
    case.assert_holds(there, f"on {_accelerator()}")
    case.assert_close(case.outputs(here), case.outputs(there.cpu()), f"back from {_accelerator()}")


def _accelerator() -> torch.device | None:
    return torch.accelerator.current_accelerator()


def compiling(case: Case) -> None:
    """``torch.compile`` makes one graph of the layer, which stays right, and the same, over merges."""
    layer, generator = case.changed(case.new()), case.generator(9)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: layer(*x), fullgraph=True, backend="aot_eager")

    def run() -> None:
        try:
            results = case.call(layer, compiled)
        except RuntimeError as error:  # of which all of the compiler's are
            raise AssertionError(f"expected one graph that lasts, got {error}") from error
        case.assert_close(case.outputs(layer), [out.detach().cpu().double() for out in results], "compiled")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, on what it traces
        run()
        with torch.compiler.set_stance("fail_on_recompile"):
            for _ in range(3):
                case.perturb(layer, generator)
                case.merge(layer, force=True)
                case.perturb(layer, generator)
                run()

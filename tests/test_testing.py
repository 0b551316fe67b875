"""p4flows.testing finds what is wrong with a layer: one fault after the other."""

import pytest
import torch
from torch import nn

from p4flows import MergeOutcome, P4Layer, P4Linear, P4Orthogonal
from p4flows.testing import CHECKS, check_perturbation


class Positive(P4Layer):
    """Factors a > 0, perturbed to ``a exp(b c)``, with b zeroed and c redrawn."""

    def __init__(self):
        super().__init__()
        self.features = 3
        self.register_buffer("a", torch.ones(3))
        self.register_buffer("merges", torch.zeros((), dtype=torch.int64))
        self.b = nn.Parameter(torch.zeros(3))
        self.c = nn.Parameter(torch.ones(3), requires_grad=False)

    perturbation = property(lambda self: (self.b, self.c))
    zeroed = property(lambda self: (self.b,))
    redrawn = property(lambda self: (self.c,))

    def forward(self, x):
        return x * self.a * (self.b * self.c).exp()

    @torch.no_grad()
    def merge(self, force=False):
        new, finite = self.a * (self.b * self.c).exp(), self.b.isfinite().all()
        sane = finite & (new.isfinite() & (new > 0)).all()
        self.a.copy_(torch.where(sane, new, self.a))
        if sane | ~finite:
            self.reset()
        return torch.where(sane, int(MergeOutcome.MERGED), int(MergeOutcome.SKIPPED)).where(finite, 3)

    @torch.no_grad()
    def reset(self):
        self.merges += 1
        self.b.zero_()
        self.c.copy_(1 + 0.5 * torch.sin(self.merges + torch.arange(3)))

    def violation(self):
        return (-self.a).clamp(min=0).max().double()


class PerturbationsAreTensors(Positive):
    perturbation = property(lambda self: (self.a,))


class ForgetsHalf(Positive):
    def merge(self, force=False):
        with torch.no_grad():
            self.b /= 2
        return super().merge(force)


class StaysPerturbed(Positive):
    def merge(self, force=False):
        b = self.b.detach().clone()
        outcome = super().merge(force)
        self.b.data.copy_(b)
        return outcome


class ResetMerges(Positive):
    def reset(self):
        with torch.no_grad():
            self.a *= (self.b * self.c).exp().nan_to_num()
        super().reset()

    def merge(self, force=False):
        if self.b.isfinite().all():
            self.reset()
            return torch.tensor(1)
        super().reset()
        return torch.tensor(3)


class MergesNaN(Positive):
    def merge(self, force=False):
        with torch.no_grad():
            self.a *= (self.b * self.c).exp()
        self.reset()
        return torch.tensor(1)


class LeavesTheSet(Positive):
    def merge(self, force=False):
        outcome = super().merge(force)
        if self.merges % 20 == 0:
            self.a[0] = -1
        return outcome


class DrawsFromTorch(Positive):
    def reset(self):
        super().reset()
        self.c.data.normal_()


class NeverDraws(Positive):
    def reset(self):
        with torch.no_grad():
            self.b.zero_()


class HasNoGradient(Positive):
    def forward(self, x):
        return x * self.a * (self.b * self.c).square().exp()


class ForgetsInStateDicts(Positive):
    def __init__(self):
        super().__init__()
        a = self.a
        del self.a
        self.register_buffer("a", a, persistent=False)


class SharesItsState(Positive):
    def __deepcopy__(self, memo):
        return self


class EvaluatesOtherwise(Positive):
    def forward(self, x):
        return super().forward(x) if self.training else x * self.a


class GroupsOtherwise(Positive):
    group_key = 0

    @classmethod
    def merge_all(cls, layers, force=False):
        if len(layers) > 1:
            layers[0].reset()
        return super().merge_all(layers, force)


class DoesNotConvert(Positive):
    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.a.dtype == torch.float64:
            self.a.fill_(1)
        return self


class OverflowsInHalfPrecision(Positive):
    def forward(self, x):
        return super().forward(x) if x.dtype != torch.bfloat16 else x / 0


class BreaksTheGraph(Positive):
    def forward(self, x):
        return super().forward(x) if self.a[0] > 0 else x


class IsCompiledAnewAfterMerges(Positive):
    count = 0

    def reset(self):
        super().reset()
        self.count += 1

    def forward(self, x):
        return super().forward(x) + (self.count - self.count)


class SkipsEverySeventh(Positive):
    count = 0

    def merge(self, force=False):
        self.count += 1
        return torch.tensor(0) if self.count % 7 == 0 else super().merge(force)


class ZeroesMoreThanItSays(Positive):
    zeroed = ()


class SaysNothingOfTheSet(Positive):
    def violation(self):
        return torch.zeros((), dtype=torch.float64)


class IsLedOutByAnotherParameter(Positive):
    """The factors are ``a d exp(b c)``, and the optimizer does with d what it likes."""

    def __init__(self):
        super().__init__()
        self.d = nn.Parameter(torch.tensor(0.2))

    def forward(self, x):
        return self.d * super().forward(x)

    def violation(self):
        return (-self.a * self.d.detach()).clamp(min=0).max().double()


class Scales(Positive):
    """The same with an inverse and a log-determinant, as in nflows."""

    def forward(self, x):
        return super().forward(x), self._log().expand(x.shape[:-1])

    def inverse(self, y):
        return y / (self.a * (self.b * self.c).exp()), -self._log().expand(y.shape[:-1])

    def _log(self):
        return self.a.log().sum() + (self.b * self.c).sum()


class HasAWrongInverse(Scales):
    def inverse(self, y):
        return y / self.a, super().inverse(y)[1]


class HasAWrongLogDeterminant(Scales):
    def _log(self):
        return super()._log() + 0.5


class HasOneLogDeterminant(Scales):
    def inverse(self, y):
        return super().inverse(y)[0]


class Overflows(Positive):
    def merge(self, force=False):
        finite = self.b.isfinite().all()
        with torch.no_grad():
            self.a *= (self.b * self.c).exp().where(finite, torch.ones(()))
        self.reset()
        return torch.tensor(1).where(finite, 3)


class DropsWhatItSkips(Positive):
    def merge(self, force=False):
        outcome = super().merge(force)
        if outcome == MergeOutcome.SKIPPED:
            self.b.data.zero_()
        return outcome


class TrainsAnotherParameter(Positive):
    def merge(self, force=False):
        outcome = super().merge(force)
        self.b = nn.Parameter(self.b.detach().clone())
        return outcome


class ReplacesItsBuffer(Positive):
    def merge(self, force=False):
        outcome = super().merge(force)
        self.a = self.a.clone()
        return outcome


class DetachesItsInput(Positive):
    def forward(self, x):
        return super().forward(x.detach())


class DetachesItsLogDeterminant(Scales):
    def forward(self, x):
        y, logabsdet = super().forward(x)
        return y, logabsdet.detach()


class DetachesItsInverse(Scales):
    def inverse(self, y):
        with torch.no_grad():
            return super().inverse(y)


class LosesThePerturbation(Positive):
    def state_dict(self, *args, **kwargs):
        state = super().state_dict(*args, **kwargs)
        return state | {name: torch.zeros_like(value) for name, value in state.items() if name == "b"}


class MergesInTrainingOnly(Positive):
    def merge(self, force=False):
        return super().merge(force) if self.training else torch.tensor(0)


class PenalisesWithoutASlope(Positive):
    def penalty(self):
        return torch.linalg.vector_norm(self.b).sqrt()


class AveragesSomethingElse(Positive):
    trained_matrix = property(lambda self: (self.a * (self.b * self.c).exp()).detach())

    def set_matrix(self, M):
        with torch.no_grad():
            self.a.copy_(2 * M)
            self.b.zero_()


class CannotBeCalled(Positive):
    def merge(self):
        return super().merge()


class DoesNotLearn(Positive):
    def merge(self, force=False):
        self.reset()
        return torch.tensor(1)


class ReturnsAnOutcomeThatIsNoTensor(Positive):
    def merge(self, force=False):
        super().merge(force)
        return MergeOutcome.MERGED


FAULTS = [
    (PerturbationsAreTensors, "declarations"),
    (ReturnsAnOutcomeThatIsNoTensor, "declarations"),
    (MergesNaN, "not_finite"),
    (ForgetsHalf, "merging"),
    (StaysPerturbed, "merging"),
    (ResetMerges, "merging"),
    (LeavesTheSet, "sequences"),
    (DrawsFromTorch, "draws"),
    (NeverDraws, "draws"),
    (HasNoGradient, "gradients"),
    (ForgetsInStateDicts, "resuming"),
    (SharesItsState, "copies"),
    (EvaluatesOtherwise, "modes"),
    (GroupsOtherwise, "groups"),
    (DoesNotConvert, "conversions"),
    (OverflowsInHalfPrecision, "half_precision"),
    (BreaksTheGraph, "compiling"),
    (IsCompiledAnewAfterMerges, "compiling"),
    (DoesNotLearn, "training"),
    (SkipsEverySeventh, "loading"),
    (ZeroesMoreThanItSays, "merging"),
    (SaysNothingOfTheSet, "noticing"),
    (IsLedOutByAnotherParameter, "sequences"),
    (HasAWrongInverse, "bijection"),
    (HasAWrongLogDeterminant, "bijection"),
    (HasOneLogDeterminant, "bijection"),
    (Overflows, "extremes"),
    (DropsWhatItSkips, "extremes"),
    (TrainsAnotherParameter, "merging"),
    (ReplacesItsBuffer, "merging"),
    (DetachesItsInput, "gradients"),
    (DetachesItsLogDeterminant, "gradients"),
    (DetachesItsInverse, "gradients"),
    (LosesThePerturbation, "resuming"),
    (LosesThePerturbation, "loading"),
    (MergesInTrainingOnly, "modes"),
    (PenalisesWithoutASlope, "declarations"),
    (AveragesSomethingElse, "averages"),
    (CannotBeCalled, "identity"),
]


@pytest.mark.parametrize("layer", [Positive, Scales])
def test_a_layer_without_faults_passes(layer):
    check_perturbation(layer)


class Shifts(Positive):
    """``a + b c``: additive, with vectors and not matrices for directions."""

    additive = True

    def forward(self, x):
        return x + self.a + self.b * self.c

    def merge(self, force=False):
        with torch.no_grad():
            finite = self.b.isfinite().all()
            self.a += (self.b * self.c).where(finite, torch.zeros(()))
        self.reset()
        return torch.tensor(1).where(finite, 3)

    def violation(self):
        return torch.zeros((), dtype=torch.float64).where(self.a.isfinite().all(), torch.inf)


def test_directions_may_be_vectors():
    check_perturbation(Shifts, skip=["extremes"])


def test_a_layer_that_has_nothing_to_train_passes():
    check_perturbation(lambda: P4Orthogonal(1), steps=100)
    assert not any(p.requires_grad for p in P4Orthogonal(1).perturbation)


@pytest.mark.parametrize(("layer", "check"), FAULTS, ids=[layer.__name__ for layer, _ in FAULTS])
def test_faults_are_found(layer, check):
    with pytest.raises(AssertionError, match=f"^{check}: "):
        check_perturbation(layer, only=[check])


def test_every_check_finds_a_fault():
    assert {check for _, check in FAULTS} | {"identity", "devices"} == set(CHECKS)


def test_the_fault_of_a_start_that_is_no_identity():
    class StartsElsewhere(Positive):
        def __init__(self):
            super().__init__()
            nn.init.ones_(self.b)

    with pytest.raises(AssertionError, match=r"^identity: reset at B0 changes the function"):
        check_perturbation(StartsElsewhere, only=["identity"])


def test_the_generator_of_torch_is_left_as_it_was():
    before = torch.get_rng_state()
    check_perturbation(Positive, steps=5, skip=["compiling"])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_merge_that_returns_no_tensor_is_explained():
    layer = ReturnsAnOutcomeThatIsNoTensor()
    with pytest.raises(TypeError, match=r"merge: expected a MergeOutcome as an int64 tensor, .* got .*MERGED"):
        ReturnsAnOutcomeThatIsNoTensor.merge_all([layer])


def test_wrong_arguments():
    for arguments, message in (
        ({"constructor": None}, "constructor: expected a function that makes a P4Layer, got None"),
        ({"constructor": lambda: nn.Linear(2, 2)}, "constructor: expected one that returns a P4Layer, got Linear"),
        ({"only": ["everything"]}, "only: expected names of checks, declarations, "),
        ({"skip": ["everything"]}, "skip: expected names of checks, declarations, "),
        ({"steps": 0}, "steps: expected an integer >= 1, got 0"),
        ({"scale": 0.0}, "scale: expected a finite number > 0, got 0.0"),
        ({"tolerance": -1.0}, "tolerance: expected a finite number >= 0, got -1.0"),
        ({"example": 3}, "example: expected a tensor, or several, got 3"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            check_perturbation(**{"constructor": lambda: P4Linear(3, 2), **arguments})


def test_an_example_is_needed_where_the_width_is_not_known():
    class Nameless(Positive):
        def __init__(self):
            super().__init__()
            del self.features

    with pytest.raises(
        ValueError, match="example: expected an input, as the layer has neither features nor in_features"
    ):
        check_perturbation(Nameless)
    check_perturbation(Nameless, torch.ones(3), only=["merging"])

"""Any sequence of operations keeps the tracked numbers right, and never stores one that is not finite."""

import io
import math

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from p4flows import MergeOutcome, MergeScheduler, P4Inv, P4InvStack

N = 4
BUFFERS = ("A", "A_inv", "sign_A", "logabsdet_A")
numbers = st.sampled_from([math.nan, math.inf, -math.inf, 1e30, 3e38])


def create(stack, rank, dtype):
    options = {"rank": rank, "seed": 3, "dtype": dtype, "bounds_det": (-4.0, 8.0)}
    return P4InvStack(N, 3, **options) if stack else P4Inv(N, **options)


class Tracking(RuleBasedStateMachine):
    """A layer beside an oracle: the frozen matrix in float64, updated by whatever merges say they have merged."""

    @initialize(
        stack=st.booleans(), rank=st.sampled_from([1, 2, N]), dtype=st.sampled_from([torch.float32, torch.float64])
    )
    def start(self, stack, rank, dtype):
        self.make = lambda: create(stack, rank, dtype)
        self.layer = self.make()
        self.A = self.layer.A.double().clone()
        self.corrections, self.largest = 0, torch.ones(self.layer.merges.shape, dtype=torch.float64)
        self.worst = torch.ones_like(self.largest)

    def product(self):
        return self.layer.U.detach().double() @ self.layer.V.detach().double().mT

    @rule(seed=st.integers(0, 2**32), scale=st.sampled_from([1e-6, 1e-2, 0.3, 3.0]))
    def perturb(self, seed, scale):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.layer.U += scale * torch.randn(self.layer.U.shape, generator=generator)

    @rule(which=st.sampled_from(["U", "V"]), number=numbers, place=st.integers(0, 10**6))
    def inject(self, which, number, place):
        flat = getattr(self.layer, which).detach().view(-1)
        flat[place % flat.numel()] = number

    @rule(G=st.sampled_from([1.0, 1e-3, 1e-8, 0.0]))
    def aim_at_a_singular_matrix(self, G):
        """U so that the determinant is ``G`` times that of A."""
        with torch.no_grad():
            v = self.layer.V[..., :1].double()
            if v.isfinite().all() and v.abs().max() < 1e6:
                self.layer.U.zero_()
                u = self.A @ v * ((G - 1) / (v.mT @ v).clamp(min=1e-3))
                self.layer.U[..., :1] = u

    @rule(force=st.booleans())
    def merge(self, force):
        product, outcome = self.product(), self.layer.merge(force)
        merged = (outcome == MergeOutcome.MERGED) | (outcome == MergeOutcome.FORCED)
        self.A = torch.where(merged[..., None, None], self.A + product, self.A)
        self.corrections += int(type(self.layer).correct_all([self.layer], where_needed=True).any())
        assert (self.layer.U[outcome != MergeOutcome.SKIPPED] == 0).all()
        finite = product.isfinite().flatten(-2).all(-1)
        assert ((outcome == MergeOutcome.RESET) <= ~finite).all()

    @rule(seed=st.integers(0, 2**32), scale=st.sampled_from([1e-2, 0.3, 3.0]), force=st.booleans())
    def perturb_and_merge(self, seed, scale, force):
        self.perturb(seed, scale)
        self.merge(force)

    @rule(which=st.sampled_from(["U", "V"]), number=numbers, place=st.integers(0, 10**6), force=st.booleans())
    def inject_and_merge(self, which, number, place, force):
        self.inject(which, number, place)
        self.merge(force)

    @rule(G=st.sampled_from([-1.0, 1e-3, 1e-8]))
    def merge_next_to_a_singular_matrix(self, G):
        self.aim_at_a_singular_matrix(G)
        self.merge(True)

    @rule(order=st.sampled_from([None, 2, 3, 7]))
    def correct(self, order):
        self.layer.correct(order)
        self.corrections += 1

    @rule()
    def reset(self):
        self.layer.reset()
        assert (self.layer.U == 0).all()

    @rule()
    def save_and_load(self):
        file = io.BytesIO()
        torch.save(self.layer.state_dict(), file)
        file.seek(0)
        self.layer = self.make()
        self.layer.load_state_dict(torch.load(file, weights_only=True))

    @rule(number=numbers)
    def compute_with_bad_input(self, number):
        x = torch.zeros(3, N, dtype=self.layer.A.dtype)
        x[1, 2] = number
        x = x.expand(*self.layer.merges.shape[:-1], 3, N)
        before = [getattr(self.layer, name).clone() for name in BUFFERS]
        for direction in (self.layer, self.layer.inverse):
            y, logabsdet = direction(x)
            (y.sum() + logabsdet.sum()).backward()
        for name, old in zip(BUFFERS, before, strict=True):
            assert torch.equal(getattr(self.layer, name), old)
        self.layer.zero_grad()

    @invariant()
    def nothing_stored_is_not_finite(self):
        for name, buffer in self.layer.named_buffers():
            assert buffer.isfinite().all(), name

    @invariant()
    def frozen_matrices_are_right(self):
        eps = torch.finfo(self.layer.A.dtype).eps
        self.largest = torch.maximum(self.largest, self.A.abs().amax((-2, -1)))
        # Every correction starts from A as the layer has it, rounded.
        allowed = 2 * eps * self.largest * (2 + self.corrections)
        assert ((self.layer.A - self.A).abs().amax((-2, -1)) <= allowed).all()
        sign, logabsdet = torch.linalg.slogdet(self.layer.A.double())
        condition = torch.linalg.cond(self.layer.A.double())
        # Errors of rounding A, and those that tracking has picked up in float64 where A was closest to singular.
        self.worst = torch.maximum(self.worst, condition)
        allowed = 20 * eps * condition + 1e-9 + 1e3 * torch.finfo(torch.float64).eps * self.worst
        known = allowed < 1e-2
        assert ((self.layer.logabsdet_A - logabsdet).abs() <= allowed)[known].all()
        assert (self.layer.sign_A == sign)[known].all()
        residual = torch.linalg.matrix_norm(self.layer.A.double() @ self.layer.A_inv.double() - torch.eye(N))
        assert (residual <= allowed)[known].all()

    @precondition(lambda self: self.product().isfinite().all() and self.product().abs().max() < 1e10)
    @invariant()
    def effective_values_are_right(self):
        M = self.A + self.product()
        eps = torch.finfo(self.layer.A.dtype).eps
        size = (self.A.abs().amax((-2, -1)) + self.product().abs().amax((-2, -1))).clamp(min=1)
        assert ((self.layer.matrix - M).abs().amax((-2, -1)) <= 20 * eps * size).all()
        sign, logabsdet = torch.linalg.slogdet(M)
        condition = torch.linalg.cond(M) * torch.linalg.cond(self.A) * size
        allowed = 100 * eps * condition + 1e-9 + 1e3 * torch.finfo(torch.float64).eps * self.worst
        known = allowed < 1e-2
        assert ((self.layer.logabsdet - logabsdet).abs() <= allowed)[known].all()
        assert (self.layer.sign == sign)[known].all()


Tracking.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
TestTracking = Tracking.TestCase


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize(("which", "rank"), [("U", 1), ("V", 1), ("U", 2), ("U", N)])
def test_a_gradient_that_is_not_finite_costs_one_perturbation_and_no_more(number, which, rank):
    layer = P4Inv(N, rank=rank, bias=False, seed=1)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    scheduler = MergeScheduler(layer, optimizer, every=4)
    for step in range(40):
        optimizer.zero_grad()
        y, logabsdet = layer(torch.randn(16, N))
        (y.square().sum(-1) / 2 - logabsdet).mean().backward()
        if step == 17:
            getattr(layer, which).grad[2, 0] = number
        optimizer.step()
        scheduler.step()
        assert all(buffer.isfinite().all() for buffer in layer.buffers())
    assert scheduler.counters["resets"] == 1
    assert scheduler.counters["merged"] == 9
    assert layer.U.isfinite().all()
    assert all(value.isfinite().all() for state in optimizer.state.values() for value in state.values())

"""P4Lipschitz: its norm is never above the bound, and it learns up to there."""

import math

import pytest
import torch
from torch import nn

from p4flows import AveragedModel, MergeOutcome, MergeScheduler, P4Lipschitz


def norm(M):
    return torch.linalg.matrix_norm(M.detach().double(), 2).item()


def perturb(layer, scale):
    with torch.no_grad():
        layer.U.copy_(scale * torch.randn_like(layer.U))
    return layer


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (32, 32), (1, 5), (5, 1)])
@pytest.mark.parametrize("rank", [1, None])
def test_no_merge_leads_out_of_the_set(shape, rank, dtype):
    layer = P4Lipschitz(*shape, 0.9, rank, dtype=dtype)
    assert norm(layer.A) <= layer.norm_bound <= 0.9
    outcomes = set()
    for i in range(60):
        if i % 6 == 0:
            layer.set_matrix(torch.zeros_like(layer.A))
        perturb(layer, (0.001, 0.03, 3.0)[i % 3])
        before = layer.matrix.detach()
        outcomes.add(outcome := int(layer.merge(force=i % 2 == 0)))
        assert norm(layer.A) <= layer.norm_bound <= 0.9
        if outcome == MergeOutcome.MERGED:
            rounding = 16 * torch.finfo(dtype).eps  # of half precision, A beside what it is rounded from
            torch.testing.assert_close(layer.A, before, atol=rounding, rtol=rounding)
        else:
            P, values, Qh = torch.linalg.svd(before.double(), full_matrices=False)
            tolerance = max(1e-5, 40 * torch.finfo(dtype).eps) * values[0].item()
            nearest = P * values.clamp(max=0.9) @ Qh
            torch.testing.assert_close(layer.A.double(), nearest, atol=tolerance, rtol=0)
    assert outcomes == {MergeOutcome.MERGED, MergeOutcome.PARTIAL}


def test_a_merge_within_the_set_needs_no_factorisation(monkeypatch):
    layer = P4Lipschitz(8, 8, 1.0)
    layer.set_matrix(torch.zeros(8, 8))
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda *_: pytest.fail("factorised"))
    for _ in range(5):
        perturb(layer, 0.005)
        assert layer.merge() == MergeOutcome.MERGED
    assert norm(layer.A) < layer.norm_bound <= 1


@pytest.mark.parametrize("rank", [1, 3])
def test_a_merge_that_scales_back_changes_no_more_than_it_has_to(rank):
    layer = P4Lipschitz(20, 20, 1.0, rank)
    layer.set_matrix(torch.linalg.qr(torch.randn(20, 20)).Q * (1 - 1e-6))
    before = layer.A.clone()
    perturb(layer, 0.3)
    perturbed = layer.matrix.detach()
    assert layer.merge() == MergeOutcome.PARTIAL
    assert torch.linalg.matrix_rank(layer.A - perturbed, tol=1e-3) <= rank  # Weyl
    assert norm(layer.A) > 1 - 1e-4
    assert (layer.A - perturbed).norm() < (before - perturbed).norm()


def test_what_is_not_finite_or_would_overflow():
    layer = perturb(P4Lipschitz(4, 3), 0.1)
    A = layer.A.clone()
    with torch.no_grad():
        layer.U[1] = math.nan
    assert layer.merge() == MergeOutcome.RESET
    with torch.no_grad():
        layer.U.fill_(3e38)
        layer.U[0] = -3e38
    assert layer.merge() == MergeOutcome.SKIPPED
    assert torch.equal(layer.A, A)


def test_the_penalty_pulls_the_perturbation_back():
    layer = perturb(P4Lipschitz(6, 6, 0.5), 0.3)
    assert layer.effective_bound() > 0.5
    optimizer = torch.optim.SGD([layer.U], lr=0.05)
    for _ in range(300):
        layer.direction.copy_(torch.linalg.svd(layer.matrix.detach())[2][0])
        loss = layer.penalty()
        assert loss.dtype == torch.float64
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert norm(layer.matrix) < 0.51
    layer.reset()
    assert layer.penalty() == 0


def test_the_effective_bound():
    layer = perturb(P4Lipschitz(6, 9, 0.5), 0.1)
    assert norm(layer.matrix) <= layer.effective_bound() < 1.01 * norm(layer.matrix)


def test_learns_up_to_the_bound_and_no_further():
    torch.manual_seed(0)
    T = 3 * torch.linalg.qr(torch.randn(8, 8)).Q
    layer = P4Lipschitz(8, 8, bound=2.0, bias=False)
    optimizer = torch.optim.Adam([layer.U], lr=0.01)
    scheduler = MergeScheduler(layer, optimizer).attach()
    for _ in range(500):
        x = torch.randn(64, 8)
        loss = (layer(x) - x @ T.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert scheduler.counters["partial"] > 0
    scheduler.merge()
    assert layer.violation() == 0
    assert (layer.A - 2 / 3 * T).norm() < 0.1 * T.norm()  # the nearest matrix in the set


def test_conversions_and_checkpoints_of_other_precisions_stay_in_the_set():
    layer = P4Lipschitz(16, 16, 1.0, dtype=torch.float64)
    layer.set_matrix(torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64)).Q * (1 - 1e-12))
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        other = P4Lipschitz(16, 16, 1.0, dtype=dtype)
        other.load_state_dict(state)
        for each in (other, layer.to(dtype)):
            assert norm(each.A) <= each.norm_bound <= 1
            assert each.norm_bound.dtype == torch.float64


def test_a_checkpoint_of_a_larger_bound_is_refused():
    large = P4Lipschitz(6, 6, 0.9)
    large.set_matrix(0.8 * torch.eye(6))
    layer = P4Lipschitz(6, 6, 0.5)
    before = layer.A.clone()
    with pytest.raises(RuntimeError, match=r"A: expected a spectral norm of at most 0.5, got 0.8"):
        layer.load_state_dict(large.state_dict())
    assert torch.equal(layer.A, before)
    large.set_matrix(0.4 * torch.eye(6))  # which is in the smaller set too
    layer.load_state_dict(large.state_dict())
    assert norm(layer.A) <= layer.norm_bound <= 0.5


@pytest.mark.parametrize("number", [math.nan, math.inf, 0.0, 0.1])
def test_what_a_state_says_of_the_norm_is_proved(number):
    state = P4Lipschitz(6, 4, 0.5).state_dict()
    state["norm_bound"] = torch.tensor(number, dtype=torch.float64)
    layer = P4Lipschitz(6, 4, 0.5)
    layer.load_state_dict(state)
    assert norm(layer.A) <= layer.norm_bound <= 0.5


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_state_that_is_not_finite_is_refused(number):
    state = P4Lipschitz(6, 4, 0.5).state_dict()
    state["A"][0, 0] = number
    with pytest.raises(RuntimeError, match=r"A: expected a matrix whose entries are finite"):
        P4Lipschitz(6, 4, 0.5).load_state_dict(state)


def test_set_matrix_refuses_what_is_not_in_the_set():
    layer = P4Lipschitz(3, 3, 0.5)
    before = layer.A.clone()
    with pytest.raises(ValueError, match=r"M: expected a spectral norm of at most 0.5, got 1"):
        layer.set_matrix(torch.eye(3))
    assert torch.equal(layer.A, before)


def test_averages_between_merges_are_in_the_set():
    model = nn.Sequential(P4Lipschitz(8, 8, 0.9))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    MergeScheduler(model, optimizer, every=10).attach()
    averaged = AveragedModel(model)
    for _ in range(25):
        optimizer.zero_grad()
        (-model(torch.randn(16, 8)).square().mean()).backward()
        optimizer.step()
        averaged.update_parameters(model)
        assert norm(averaged.module[0].A) <= averaged.module[0].norm_bound <= 0.9
    assert norm(model[0].matrix) > 0.9


def test_what_is_not_finite_does_not_stay_where_power_iteration_starts():
    state = P4Lipschitz(6, 4, 0.5).state_dict()
    state["direction"][0] = torch.nan
    layer = P4Lipschitz(6, 4, 0.5)
    layer.load_state_dict(state)
    assert layer.direction.isfinite().all()
    assert layer.penalty().isfinite()


def test_merges_of_nothing_leave_what_is_known_of_the_norm():
    layer = P4Lipschitz(6, 4, 0.5)
    before = layer.norm_bound.clone()
    for _ in range(100):
        layer.merge()
    assert layer.norm_bound == before


def test_averages_stay_in_the_set():
    model = nn.Sequential(P4Lipschitz(6, 6, 0.5))
    averaged = AveragedModel(model)
    for _ in range(5):
        perturb(model[0], 1.0).merge()
        averaged.update_parameters(model)
        assert norm(averaged.module[0].A) <= averaged.module[0].norm_bound <= 0.5


@pytest.mark.parametrize("bound", [0, 1e-40, -1.0, math.nan, math.inf, None, "1"])
def test_wrong_bound(bound):
    with pytest.raises(ValueError, match=r"bound: expected a finite number >= 1.17549e-38"):
        P4Lipschitz(3, 3, bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_bound_of_any_size_is_kept(dtype):
    for bound in (1e-37, 1e300):
        layer = P4Lipschitz(4, 5, bound, dtype=dtype)
        perturb(layer, min(bound, 1.0)).merge()
        assert 0 < norm(layer.A) <= layer.norm_bound <= bound
        perturb(layer, torch.finfo(dtype).max ** 0.4).merge()
        assert norm(layer.A) <= layer.norm_bound <= bound

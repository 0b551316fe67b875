"""What InvertibleLinear does not follow: out of bounds, singular, not finite."""

import copy
import math

import pytest
import torch
from registry import matrix

from p4flows import InvertibleLinear, MergeOutcome, MergeScheduler

N = 8


def ahead(scale=0.1, n=N, dtype=torch.float64, **options):
    """A layer whose weight is ahead of its A by noise."""
    layer = InvertibleLinear(n, **{"init": matrix(n), "dtype": dtype} | options)
    with torch.no_grad():
        layer.weight.add_(scale * torch.randn(n, n, dtype=torch.float64))
    return layer


def assert_right(layer, tolerance=1e-11):
    """A, its inverse and its determinant belong together."""
    A = layer.A.double()
    sign, logabsdet = torch.linalg.slogdet(A)
    assert (A @ layer.A_inv.double() - torch.eye(len(A), dtype=torch.float64)).abs().max() < tolerance
    assert abs(layer.logabsdet_A - logabsdet) < tolerance
    assert layer.sign_A == sign


def test_bounds_let_a_part_through():
    layer = ahead(0, init=torch.eye(N), bounds_det=(-1.0, 1.0))
    with torch.no_grad():
        layer.weight.mul_(1.2)  # ln|det| = 8 ln 1.2 = 1.46
    assert layer.merge() == MergeOutcome.PARTIAL
    assert 0.4 < layer.logabsdet_A <= 1
    torch.testing.assert_close(layer.lag, torch.linalg.matrix_norm(layer.weight - layer.A) / layer.A.norm())
    for _ in range(20):
        outcome = InvertibleLinear.merge_all([layer])
    assert outcome == MergeOutcome.SKIPPED_DETERMINANT
    assert 0.9 < layer.logabsdet_A <= 1
    assert_right(layer)
    before = copy.deepcopy(layer)
    assert layer.merge() == MergeOutcome.SKIPPED
    assert torch.equal(layer.A, before.A)
    assert layer.merge(force=True) == MergeOutcome.FORCED
    torch.testing.assert_close(layer.logabsdet_A.item(), N * math.log(1.2))
    assert layer.lag < 1e-14


def test_a_crossing_that_is_out_of_bounds_is_forced():
    layer = InvertibleLinear(3, rank=1, bounds_update=(0.0, None), dtype=torch.float64)
    with torch.no_grad():
        layer.weight[2, 2] = -0.3
    assert InvertibleLinear.merge_all([layer]) == MergeOutcome.SKIPPED_UPDATE
    assert layer.sign_A == 1
    assert layer.merge(force=True) == MergeOutcome.FORCED
    assert layer.sign_A == -1
    assert_right(layer)


def test_a_singular_weight_is_approached_and_never_reached():
    layer = InvertibleLinear(3, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.tensor([1.0, 1.0, 0.0])))
    for i in range(40):
        layer.merge(force=i % 10 == 9)
        assert all(buffer.isfinite().all() for buffer in layer.buffers())
        torch.testing.assert_close(layer.A @ layer.A_inv, torch.eye(3).double(), atol=1e-9, rtol=0)
    assert layer.lag < 1e-6
    with pytest.raises(ValueError, match="weight: expected invertible"):
        layer.settle()


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("n", [N, 140])
def test_a_weight_that_is_not_finite_is_never_followed(number, force, n):
    layer, other = ahead(0.01, n=n), ahead(0.01, n=n)
    with torch.no_grad():
        layer.weight[1, 2] = number
    before = copy.deepcopy(layer)
    outcomes = InvertibleLinear.merge_all([layer, other], force)
    assert outcomes.tolist() == [MergeOutcome.SKIPPED_NOT_FINITE, MergeOutcome.MERGED]
    assert layer.merge(force) == MergeOutcome.SKIPPED
    for name, value in layer.tracked.state_dict().items():
        assert torch.equal(value, before.tracked.state_dict()[name]), name
    if layer.directions is not None:
        assert torch.equal(layer.directions, before.directions)
    with pytest.raises(ValueError, match="weight: expected invertible"):
        layer.settle()
    layer.reset()
    assert layer.lag == 0
    assert layer.merge() == MergeOutcome.MERGED


def test_a_scheduler_says_that_a_weight_is_not_finite():
    layer = ahead()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    scheduler = MergeScheduler(layer, optimizer)
    scheduler.step()
    with torch.no_grad():
        layer.weight[0, 0] = math.nan
    with pytest.warns(UserWarning, match="a weight is not finite"):
        scheduler.step()
    scheduler.step()  # which says it once
    assert scheduler.counters["skipped_not_finite"] == 2
    assert scheduler.counters["merged"] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, N, 128])
def test_a_matrix_that_follows_with_full_rank_becomes_the_weight(n, dtype):
    layer = InvertibleLinear(n, init=matrix(n), dtype=dtype)
    for i in range(5):
        with torch.no_grad():
            layer.weight.add_((-1) ** i * torch.randn(n, n, dtype=dtype) / n)
        assert layer.merge() == MergeOutcome.MERGED
        assert layer.lag == 0
        assert torch.equal(layer.A, layer.weight)
        assert layer.matrix_double.equal(layer.weight.double())
        sign, logabsdet = torch.linalg.slogdet(layer.weight.double())
        assert layer.sign_A == sign
        torch.testing.assert_close(layer.logabsdet_A, logabsdet)
        exact = torch.linalg.inv(layer.weight.double())
        torch.testing.assert_close(layer.tracked.exact[1], exact, rtol=1e-9, atol=1e-9)


def test_layers_that_jump_together_do_as_each_by_itself():
    def layers():
        torch.manual_seed(0)
        good, singular, broken, bounded = (ahead(0.01) for _ in range(4))
        with torch.no_grad():
            singular.weight[0] = 0
            broken.weight[1, 1] = math.nan
            bounded.weight.copy_(-bounded.A)
        return [good, singular, broken, bounded]

    together, alone = layers(), layers()
    outcomes = InvertibleLinear.merge_all(together)
    assert outcomes.tolist() == [InvertibleLinear.merge_all([layer]).item() for layer in alone]
    assert outcomes.tolist() == [
        MergeOutcome.MERGED,
        MergeOutcome.PARTIAL,
        MergeOutcome.SKIPPED_NOT_FINITE,
        MergeOutcome.MERGED,
    ]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one.A, other.A)
        torch.testing.assert_close(one.logabsdet_A, other.logabsdet_A)
        assert_right(one)


def test_bounds_let_a_part_of_a_low_rank_update_through():
    layer = InvertibleLinear(3, rank=1, bounds_update=(-1.0, None), dtype=torch.float64)
    with torch.no_grad():
        layer.weight[2, 2] = 0.2  # ln 0.2 = -1.6
    assert layer.merge() == MergeOutcome.PARTIAL
    torch.testing.assert_close(layer.A[2, 2].item(), 0.6)
    assert_right(layer)
    assert layer.merge() == MergeOutcome.PARTIAL  # ln 1/3 = -1.1
    torch.testing.assert_close(layer.A[2, 2].item(), 0.4)
    assert layer.merge() == MergeOutcome.MERGED
    assert layer.lag < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_is_forced_that_is_singular_to_rounding(dtype):
    torch.manual_seed(1)
    M = torch.randn(5, 5, dtype=torch.float64)
    M[4] = M[0] + M[1]
    layer = InvertibleLinear(5, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(M)
    x = torch.randn(20, 5, dtype=dtype)
    for i in range(60):
        layer.merge(force=i % 10 == 9)
        assert layer.violation() < 1e-3
        back = layer.inverse(layer(x)[0])[0]
        assert (back - x).abs().max() < (1 if dtype == torch.float32 else 0.01)


def test_singular_matrices_are_not_settled_on():
    torch.manual_seed(1)
    M = torch.randn(5, 5, dtype=torch.float64)
    M[4] = M[0] + M[1]
    layer = InvertibleLinear(5, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(M)
    for attempt in (layer.settle, lambda: layer.set_matrix(M)):
        with pytest.raises(ValueError, match="expected invertible matrices, got one that is numerically singular"):
            attempt()
    assert torch.equal(layer.A, torch.eye(5).double())


@pytest.mark.parametrize(("n", "rate"), [(129, 0.02), (150, 0.005), (512, 0.01)])
def test_it_keeps_up_where_training_is_fast(n, rate):
    C = torch.randn(n, n, generator=torch.Generator().manual_seed(1)) / n**0.5
    x = torch.randn(256, n, generator=torch.Generator().manual_seed(2)) @ C.T
    layer, dense = InvertibleLinear(n, bias=False), torch.eye(n).requires_grad_()
    optimizers = torch.optim.Adam(layer.parameters(), rate), torch.optim.Adam([dense], rate)
    MergeScheduler(layer, optimizers[0]).attach()
    losses = []
    for _ in range(30):
        y, logabsdet = layer(x)
        z = x @ dense.T
        losses = [
            (y.square().sum(-1) / 2 - logabsdet).mean() / n,
            (z.square().sum(-1).mean() / 2 - torch.linalg.slogdet(dense).logabsdet) / n,
        ]
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert layer.lag < 0.006
    assert abs(losses[0] - losses[1]) < 0.05

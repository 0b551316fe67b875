"""InvertibleLinear: a matrix that follows a trained weight, with nothing lost on the way."""

import copy
import math

import pytest
import torch
from registry import matrix
from torch import nn

from p4flows import InvertibleLinear, MergeOutcome, MergeScheduler

N = 8
ranks = pytest.mark.parametrize("rank", [1, 3, None])


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


# --- following ----------------------------------------------------------------------------------------------


@ranks
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_weight_is_reached(rank, dtype):
    layer = ahead(rank=rank, dtype=dtype)
    W = layer.weight.detach().clone()
    lag = torch.linalg.matrix_norm(W.double() - layer.A.double()) / torch.linalg.matrix_norm(layer.A.double())
    torch.testing.assert_close(layer.lag, lag, rtol=1e-6, atol=0)
    for _ in range(60):
        assert layer.merge() == MergeOutcome.MERGED
    assert layer.lag < 1e-14
    assert torch.equal(layer.weight, W)
    torch.testing.assert_close(layer.A, W, rtol=0, atol=1e-14)
    assert_right(layer, 1e-11 if dtype == torch.float64 else 1e-5)


def test_an_update_is_the_best_of_its_rank_once_the_directions_have_settled():
    layer = ahead(rank=2)
    E = layer.weight.detach() - layer.A
    with torch.no_grad():
        layer.directions.copy_(torch.linalg.svd(E).Vh[:2].mT)
    before = layer.A.clone()
    layer.tracked.A_inv.copy_(torch.linalg.inv(before))
    layer.merge()
    best = torch.linalg.svd(E)
    # The lag is large here, so that there are four updates, of the eight that E has directions for.
    remaining = torch.linalg.svdvals(layer.weight.detach() - layer.A)
    torch.testing.assert_close((layer.weight.detach() - layer.A).norm(), remaining.norm())
    assert remaining[0] < best.S[2] * 1.001


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("bounds", [{}, {"bounds_update": (-0.2, 0.2)}])
def test_what_does_not_fit_is_made_up_for_later(rank, bounds):
    """A weight that moves in all directions all the time, by far more than the rank and the bounds let through."""
    layer = ahead(0, rank=rank, init="orthogonal", **bounds)
    outcomes = set()
    for _ in range(50):
        with torch.no_grad():
            layer.weight.add_(0.05 * torch.randn(N, N))
        outcomes.add(layer.merge().item())
    assert layer.lag > 1e-3
    assert (MergeOutcome.PARTIAL in outcomes) == bool(bounds)
    for i in range(400):
        layer.merge(force=i % 10 == 0)  # as a scheduler does, which lets det A cross zero
    assert layer.lag < 1e-14
    torch.testing.assert_close(layer.A, layer.weight.detach())
    assert_right(layer)


def test_the_lag_grows_with_the_step_and_more_updates_hold_it_down():
    lags = []
    for scale in (1e-4, 1e-1):
        layer = ahead(0, n=40, rank=8)
        for _ in range(20):
            with torch.no_grad():
                layer.weight.add_(scale * torch.randn(40, 40))
            layer.merge()
        lags.append(layer.lag.item())
    assert lags[0] < 0.001 < lags[1]
    far = ahead(0.1, n=40, rank=8)
    near = ahead(0.0005, n=40, rank=8)
    for layer, updates in ((far, 4), (near, 1)):
        E = layer.weight.detach() - layer.A
        layer.merge()
        assert torch.linalg.matrix_rank(layer.matrix_double - (layer.weight.detach() - E), rtol=1e-9) == 8 * updates


@pytest.mark.parametrize("rank", [1, 2])
def test_a_weight_that_was_reached_and_moves_again_is_followed(rank):
    """Directions that were left at zero, or in parallel, would never find it."""
    layer = InvertibleLinear(6, rank=rank, dtype=torch.float64)
    layer.merge()
    for row, column in ((4, 5), (5, 2), (3, 0), (5, 5)):
        with torch.no_grad():
            layer.weight[row, column] += 0.5
        for _ in range(10):
            layer.merge()
        assert layer.lag < 1e-14
        assert (layer.directions.norm(dim=0) > 0.5).all()
    assert_right(layer)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-3, 300.0])
def test_half_precision_follows_small_and_large_weights(dtype, scale):
    layer = InvertibleLinear(12, rank=2, dtype=dtype)
    with torch.no_grad():
        layer.weight.add_(scale * torch.randn(12, 12))
    for _ in range(80):
        assert layer.merge() == MergeOutcome.MERGED
    assert layer.lag < 1e-9
    assert torch.equal(layer.A, layer.weight)
    assert layer.directions.isfinite().all()


@pytest.mark.parametrize("n", [5, 31])
@pytest.mark.parametrize("rank", [1, 4, None])
def test_minus_identity_is_reached_from_identity_by_training(n, rank):
    """All n eigenvalues have to pass zero at about the same time."""
    layer = InvertibleLinear(n, bias=False, rank=rank)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    scheduler = MergeScheduler(layer, optimizer).attach()
    signs = set()
    for _ in range(600):
        optimizer.zero_grad()
        x = torch.randn(64, n)
        (layer(x)[0] + x).square().mean().backward()
        optimizer.step()
        signs.add(layer.sign_A.item())
        assert all(buffer.isfinite().all() for buffer in layer.buffers())
    assert signs == {1.0, -1.0}
    assert (layer.matrix + torch.eye(n)).abs().max() < 0.02
    assert_right(layer, 1e-6)
    assert scheduler.counters["skipped"] == 0
    assert scheduler.counters["merged"] + scheduler.counters["partial"] + scheduler.counters["forced"] == 600


# --- many, and wide -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 4])
def test_layers_that_are_followed_together_are_each_as_by_itself(rank, dtype):
    """Also where some are far behind, take only a part, or are not finite."""
    scales = [1e-4, 0.3, 0.01, 3.0, 1e-4]
    together = nn.ModuleList(
        ahead(scale, rank=rank, seed=i, dtype=dtype, bounds_update=(-3.0, None)) for i, scale in enumerate(scales)
    )
    together[2].weight.data[0, 0] = math.nan
    apart = copy.deepcopy(together)
    outcomes = set()
    for _ in range(6):
        found = InvertibleLinear.merge_all(together).tolist()
        assert found == [InvertibleLinear.merge_all([layer]).item() for layer in apart]
        outcomes |= set(found)
        for a, b in zip(together, apart, strict=True):
            torch.testing.assert_close(a.tracked.exact, b.tracked.exact, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(a.logabsdet_A, b.logabsdet_A, rtol=1e-9, atol=1e-9)
    assert outcomes >= {MergeOutcome.MERGED, MergeOutcome.SKIPPED_NOT_FINITE}


def test_a_wide_layer_in_single_precision():
    torch.manual_seed(0)
    n = 300
    layer = InvertibleLinear(n, init="orthogonal")
    optimizer = torch.optim.Adam(layer.parameters(), lr=3e-3)
    scheduler = MergeScheduler(layer, optimizer).attach()
    mixing = torch.eye(n) + 0.5 * torch.randn(n, n) / n**0.5
    for step in range(200):
        optimizer.zero_grad()
        z, logabsdet = layer(torch.randn(32, n) @ mixing)
        x, inverse_logabsdet = layer.inverse(torch.randn(32, n))
        (z.square().sum(-1) / 2 - logabsdet + x.square().sum(-1) / 20 - inverse_logabsdet / 10).mean().backward()
        optimizer.step()
        if step % 20 == 19:
            A = layer.A.double()
            eye = torch.eye(n, dtype=torch.float64)
            best = (A @ torch.linalg.inv(A).float().double() - eye).abs().max()
            assert (A @ layer.A_inv.double() - eye).abs().max() <= max(1e-5, 3 * best)
            assert abs(torch.linalg.slogdet(A).logabsdet - layer.logabsdet_A) <= 1e-4
            assert layer.lag < 0.1
    assert scheduler.counters["merged"] + scheduler.counters["forced"] + scheduler.counters["partial"] == 200

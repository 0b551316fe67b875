"""Numbers that stay right: drift, error-controlled correction, singular crossings."""

import logging

import pytest
import torch
from registry import matrix

from p4flows import Correction, MergeScheduler, P4Inv, P4InvStack
from p4flows.tracking import algebra
from p4flows.tracking.correction import drifted_
from p4flows.tracking.group import Group
from p4flows.tracking.hyperpower import cheapest_order


def exact_inverse_residual(A):
    """max|A X - I| for X the inverse of A, rounded to the dtype of A."""
    X = torch.linalg.inv(A.double()).to(A.dtype)
    return algebra.residual(A.double(), X.double()).abs().max().item()


def residual(layer):
    return algebra.residual(layer.A.double(), layer.A_inv.double()).abs().max().item()


def logabsdet_error(layer):
    return (torch.linalg.slogdet(layer.A.double())[1] - layer.logabsdet_A).abs().max().item()


@pytest.mark.parametrize(("n", "merges"), [(2, 1000), (66, 1000), (300, 200)])
@pytest.mark.parametrize("rank", [1, 2, None])
def test_rounding_does_not_add_up_in_single_precision(n, merges, rank):
    generator = torch.Generator().manual_seed(n)
    layer = P4Inv(n, rank, seed=3)
    scheduler = MergeScheduler(layer, torch.optim.SGD(layer.parameters(), lr=1.0), every=1)
    for i in range(merges):
        with torch.no_grad():
            layer.U.normal_(std=0.01, generator=generator)
        scheduler.step()
        if i % (merges // 20) == 0 or i == merges - 1:
            assert residual(layer) <= max(1e-5, 3 * exact_inverse_residual(layer.A))
            assert logabsdet_error(layer) < 1e-4
            assert scheduler.counters["corrections"] <= i / 50 + 1
    assert scheduler.counters["merged"] + scheduler.counters["forced"] > merges // 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_forced_merge_next_to_a_singular_matrix_is_corrected(dtype):
    """G near zero makes A as good as singular; coming back must leave no trace."""
    layer = P4Inv(20, rank=1, init=matrix(20), dtype=dtype, seed=1)
    for _ in range(5):
        with torch.no_grad():
            v = layer.V[:, 0].double()
            w = torch.randn(20, dtype=torch.float64)
            u = layer.A.double() @ w * (1e-6 - 1) / (v @ w)  # so that G = 1e-6
            layer.U.copy_(u[:, None])
        layer.merge(force=True)
        P4Inv.correct_all([layer], where_needed=True)
        with torch.no_grad():
            layer.U.copy_(torch.randn(20, 1, dtype=torch.float64))
        layer.merge(force=True)
        P4Inv.correct_all([layer], where_needed=True)
        exact = exact_inverse_residual(layer.A)
        assert residual(layer) <= max(1e-5 if dtype == torch.float32 else 1e-9, 3 * exact)
        assert logabsdet_error(layer) < 1e-4


@pytest.mark.parametrize(("rank", "steps"), [(1, 6_000), (4, 3_000), (None, 3_000)])
def test_training_through_a_singular_matrix(rank, steps):
    """As in Figure 5, in fewer dimensions: from I to -I, where the determinant changes its sign."""
    layer = P4Inv(31, rank, bias=False, seed=2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=2e-2)
    scheduler = MergeScheduler(layer, optimizer, every=1, force_every=10, correct_every=50)
    signs = set()
    for _ in range(steps):
        x = torch.randn(32, 31)
        optimizer.zero_grad()
        (layer(x)[0] + x).square().mean().backward()
        optimizer.step()
        scheduler.step()
        signs.add(layer.sign_A.item())
    assert signs == {1.0, -1.0}
    assert layer.sign_A == -1
    assert (layer.matrix + torch.eye(31)).abs().max() < 0.1
    assert logabsdet_error(layer) < 1e-5
    assert residual(layer) < 1e-5


@pytest.mark.parametrize("n", [30, 1024])
@pytest.mark.parametrize("rank", [1, 30])
def test_the_estimate_of_the_residual(n, rank):
    generator = torch.Generator().manual_seed(0)
    A = matrix(n)[None]
    L, R = (torch.randn(1, n, rank, generator=generator, dtype=torch.float64) for _ in range(2))
    A_inv = torch.linalg.inv(A) + 1e-3 * L @ R.mT
    exact = torch.linalg.matrix_norm(algebra.residual(A, A_inv)).item()
    probes = torch.randn(1, 200, n, generator=generator, dtype=torch.float64)
    norms = algebra.residual_estimate(A, A_inv, probes)
    assert norms[0].item() == pytest.approx(exact, rel=0.3)
    assert norms[1].item() == pytest.approx(torch.linalg.matrix_norm(A_inv).item(), rel=0.3)
    estimates = [algebra.residual_estimate(A, A_inv, p)[0].item() for p in probes.split(4, 1)]
    assert all(exact / 20 < estimate < exact * 4 for estimate in estimates)


def test_the_floor_that_rounding_leaves():
    A = matrix(200).float()
    A_inv = torch.linalg.inv(A.double()).float()
    floor = torch.linalg.matrix_norm(algebra.residual(A.double(), A_inv.double())).item()
    assert algebra.rounding_floor(A, A_inv).item() == pytest.approx(floor, rel=0.2)


def test_the_order_with_the_fewest_products():
    """Against all sequences of orders 2, 3 and 7, which cost 2, 3 and 6 products."""
    costs = {2: 2, 3: 3, 7: 6}

    def cheapest(exponent):
        return min((c + (cheapest(exponent / o) if o < exponent else 0)) for o, c in costs.items())

    for residual in (0.9, 0.5, 0.011, 1.1e-5, 1.1e-7):
        for target in (1e-6, 1e-13):
            if target < residual:
                size, cost = residual, 0
                while size > target:
                    order = cheapest_order(size, target)
                    size, cost = size**order, cost + costs[order]
                assert cost <= cheapest(
                    torch.log(torch.tensor(target)).item() / torch.log(torch.tensor(residual)).item()
                )


@pytest.mark.parametrize(
    "make",
    [lambda: P4Inv(12, seed=1), lambda: P4Inv(12, 1), lambda: P4InvStack(12, 3, seed=1)],
    ids=["P4Inv", "P4Inv-rank1", "P4InvStack"],
)
@pytest.mark.parametrize(
    ("damage", "outcome"), [(1e-9, Correction.NONE), (1e-4, Correction.ITERATED), (3.0, Correction.INVERTED)]
)
def test_the_scheduler_corrects_at_once_what_has_drifted(make, damage, outcome, caplog):
    layer = make()
    scheduler = MergeScheduler(layer, torch.optim.SGD(layer.parameters(), lr=0.1), every=1)
    with torch.no_grad():
        layer.A_inv_double += damage * torch.randn(layer.A_inv.shape, generator=torch.Generator().manual_seed(0))
        layer.logabsdet_A += 0.01 if damage > 1e-6 else 0
    with caplog.at_level(logging.WARNING, "p4flows"):
        scheduler.step()
    count = layer.merges.numel()
    assert scheduler.counters["corrections"] == count * (outcome != Correction.NONE)
    assert scheduler.counters["inversions"] == count * (outcome == Correction.INVERTED)
    assert ("inverted" in caplog.text) == (outcome == Correction.INVERTED)
    assert layer.residual().max() < 1e-6
    assert layer.logabsdet_A.abs().max() < 1e-6


def test_only_what_has_drifted_is_corrected():
    layers = [P4Inv(8, seed=i) for i in range(5)]
    layers[3].A_inv_double.mul_(1.01)
    (state,) = Group(layers).states()
    assert drifted_(state).tolist() == [False, False, False, True, False]
    before = [layer.A_inv_double.clone() for layer in layers]
    outcomes = P4Inv.correct_all(layers, where_needed=True)
    assert outcomes.tolist() == [0, 0, 0, Correction.ITERATED, 0]
    for i, (layer, old) in enumerate(zip(layers, before, strict=True)):
        assert torch.equal(layer.A_inv_double, old) == (i != 3)
        torch.testing.assert_close(layer.A_inv, layer.A_inv_double.float(), rtol=0, atol=0)


def test_inverting_one_matrix_does_not_leave_another_uncorrected():
    layers = [P4Inv(8, seed=i) for i in range(3)]
    layers[0].A_inv_double.mul_(1.01)
    layers[2].A_inv_double.mul_(5.0)
    assert P4Inv.correct_all(layers).tolist() == [Correction.ITERATED, Correction.ITERATED, Correction.INVERTED]
    for layer in layers:
        torch.testing.assert_close(layer.A_inv_double, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-14)


def test_a_skipped_round_is_not_probed(monkeypatch):
    layer = P4Inv(4, bounds_det=(5.0, 6.0))
    scheduler = MergeScheduler(layer, torch.optim.SGD(layer.parameters(), lr=1.0), every=1, force_every=None)
    monkeypatch.setattr(P4Inv, "correct_all", lambda *_, **__: pytest.fail("probed"))
    scheduler.step()


@pytest.mark.parametrize("order", [None, 2, 3, 7])
def test_an_inverse_beyond_all_correction_is_left_as_it_is(order):
    layer = P4Inv(3, dtype=torch.float64)
    layer.A.fill_(1.0)  # singular, so that there is no inverse to be had
    layer.A_inv.fill_(1e100)
    assert layer.correct(order) == Correction.INVERTED
    assert torch.equal(layer.A_inv, torch.full_like(layer.A_inv, 1e100))
    assert layer.logabsdet_A == 0  # nothing infinite is stored


def test_a_matrix_beyond_correction_does_not_keep_others_from_theirs():
    layers = [P4Inv(3, dtype=torch.float64, init="orthogonal", seed=i) for i in range(2)]
    layers[0].A.fill_(1.0)
    layers[0].A_inv.fill_(1e100)
    layers[1].A_inv.mul_(1.01)
    P4Inv.correct_all(layers)
    assert layers[1].residual() < 1e-14

"""P4Inv beyond the harness: starting matrices, merging and its bounds, correction, precision, memory, bad input."""

import math

import pytest
import torch
from registry import PERMUTATION, matrix, perturb
from torch.utils._python_dispatch import TorchDispatchMode

from p4flows import PAPER_BOUNDS, MergeOutcome, P4Inv
from p4flows.tracking import algebra
from p4flows.tracking.hyperpower import hyperpower
from p4flows.tracking.noise import directions, normal

ranks = pytest.mark.parametrize("rank", [1, 3])


def layer_with(rank=1, n=8, **options):
    return perturb(P4Inv(n, rank, init=matrix(n), dtype=torch.float64, bounds_det=(None, None), **options))


# --- starting matrices --------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 8])
@pytest.mark.parametrize("init", ["identity", "reverse", "orthogonal"])
def test_named_starts(n, init):
    layer = P4Inv(n, init=init, dtype=torch.float64)
    eye = torch.eye(n, dtype=torch.float64)
    expected = {"identity": eye, "reverse": eye.flip(0)}.get(init, layer.A)
    torch.testing.assert_close(layer.matrix, expected)
    torch.testing.assert_close(layer.A.T @ layer.A, eye)
    assert layer.sign == torch.linalg.slogdet(layer.A).sign
    assert layer.logabsdet.abs() < 1e-12
    assert layer.U.abs().max() == 0


def test_random_orthogonal_starts_depend_on_the_seed_only():
    assert torch.equal(P4Inv(5, init="orthogonal", seed=3).A, P4Inv(5, init="orthogonal", seed=3).A)
    assert not torch.equal(P4Inv(5, init="orthogonal", seed=3).A, P4Inv(5, init="orthogonal", seed=4).A)


def test_permutation_start_indexes_as_nflows_does():
    x = torch.randn(3, 6)
    assert torch.equal(P4Inv(6, init=PERMUTATION)(x)[0], x[..., PERMUTATION])


def test_matrix_start_is_inverted_in_float64():
    M = matrix(40)
    layer = P4Inv(40, init=M)
    torch.testing.assert_close(layer.A, M.float(), rtol=0, atol=0)
    torch.testing.assert_close(layer.A_inv, torch.linalg.inv(M.float().double()).float(), rtol=0, atol=0)
    torch.testing.assert_close(layer.logabsdet_A, torch.linalg.slogdet(M.float().double()).logabsdet)


@pytest.mark.parametrize("init", [matrix(4), PERMUTATION[:4].argsort()])
def test_the_given_start_is_not_changed_by_training(init):
    before = init.clone()
    perturb(P4Inv(4, init=init, dtype=torch.float64)).merge(force=True)
    assert torch.equal(init, before)


# --- merging ------------------------------------------------------------------------------------------------


@ranks
def test_merging_keeps_the_function_and_starts_a_new_perturbation(rank):
    layer = layer_with(rank)
    x = torch.randn(5, 8, dtype=torch.float64)
    before = [*layer(x), *layer.inverse(x), layer.sign, layer.matrix]
    V = layer.V.clone()
    assert layer.merge() == MergeOutcome.MERGED
    for old, new in zip(before, [*layer(x), *layer.inverse(x), layer.sign, layer.matrix], strict=True):
        torch.testing.assert_close(new, old, atol=1e-12, rtol=1e-12)
    assert layer.U.abs().max() == 0
    assert not torch.equal(layer.V, V)
    assert layer.merges == 1


def test_merging_many_layers_at_once_is_merging_each():
    together = [layer_with(2, seed=i) for i in range(4)]
    apart = [layer_with(2, seed=i) for i in range(4)]
    with torch.no_grad():
        for a, b in zip(together, apart, strict=True):
            b.load_state_dict(a.state_dict())
        together[1].U[0, 0] = apart[1].U[0, 0] = float("nan")
        for layers in (together, apart):
            layers[2].U.copy_(-torch.linalg.pinv(layers[2].V.T @ layers[2].A_inv))  # C = 0
    outcomes = P4Inv.merge_all(together)
    assert outcomes.tolist() == [1, 3, MergeOutcome.SKIPPED_UPDATE, 1]
    assert [layer.merge() for layer in apart] == [1, 3, 0, 1]
    for a, b in zip(together, apart, strict=True):
        for key, value in a.state_dict().items():
            torch.testing.assert_close(value, b.state_dict()[key], msg=key)


def nearly_singular(G, **options):
    """A rank-one layer whose capacitance has the given determinant."""
    layer = P4Inv(4, rank=1, dtype=torch.float64, **options)
    with torch.no_grad():
        layer.U.copy_((G - 1) * layer.V / layer.V.square().sum())
    return layer


@pytest.mark.parametrize(
    ("G", "options", "outcome"),
    [
        (0.2, PAPER_BOUNDS, MergeOutcome.MERGED),
        (-0.2, PAPER_BOUNDS, MergeOutcome.MERGED),
        (0.05, PAPER_BOUNDS, MergeOutcome.SKIPPED),  # ln|G det A| = -3 < -2.5
        (0.05, {}, MergeOutcome.MERGED),
        (1e-3, {}, MergeOutcome.SKIPPED),  # ln|G| = -6.9 < -6
        (1e-3, {"bounds_update": (None, None)}, MergeOutcome.MERGED),
        (1e7, PAPER_BOUNDS, MergeOutcome.SKIPPED),  # ln|G det A| = 16.1 > 15.5
        (1e7, {}, MergeOutcome.MERGED),
        (1e7, {"bounds_det": (-2.5, math.inf)}, MergeOutcome.MERGED),
    ],
)
def test_bounds_of_appendix_a(G, options, outcome):
    layer = nearly_singular(G, **options)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    assert layer.merge() == outcome
    if outcome == MergeOutcome.SKIPPED:
        assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
        assert layer.merge(force=True) == MergeOutcome.FORCED
    torch.testing.assert_close(layer.logabsdet.exp() * layer.sign, torch.tensor(G, dtype=torch.float64))
    torch.testing.assert_close(layer.A @ layer.A_inv, torch.eye(4, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("singular_values", "options", "outcome"),
    [
        ((1.0, 0.01), {}, MergeOutcome.MERGED),
        ((1e4, 1e-4), {}, MergeOutcome.SKIPPED_UPDATE),  # det = 1, and yet nearly singular
        ((1e4, 1e-4), {"bounds_update": (-10.0, None)}, MergeOutcome.MERGED),
        ((1e4, 1e-4), {"bounds_update": (None, 7.0)}, MergeOutcome.SKIPPED_UPDATE),
        ((1e4, 1e-4), {"bounds_update": (None, None)}, MergeOutcome.MERGED),
        ((0.9, 0.9), {"bounds_update": (-0.2, 0.2)}, MergeOutcome.MERGED),
        ((0.9, 0.7), {"bounds_update": (-0.2, 0.2)}, MergeOutcome.SKIPPED_UPDATE),
        ((1.3, 0.9), {"bounds_update": (-0.2, 0.2)}, MergeOutcome.SKIPPED_UPDATE),
        ((10.0, 10.0), {"bounds_det": (None, 4.0)}, MergeOutcome.SKIPPED_DETERMINANT),
    ],
)
def test_the_bounds_on_an_update_of_higher_rank_hold_for_every_direction(singular_values, options, outcome):
    """And the outcome of ``merge_all`` names the bound, where ``merge`` says plainly that it was skipped."""
    layer = P4Inv(4, rank=2, init=2 * torch.eye(4), dtype=torch.float64, **{"bounds_det": (None, None)} | options)
    with torch.no_grad():
        factors = torch.diag(torch.tensor(singular_values, dtype=torch.float64)) - torch.eye(2)
        layer.U.copy_(2 * layer.V @ torch.linalg.inv(layer.V.mT @ layer.V) @ factors)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    if MergeOutcome.is_skip(torch.tensor(outcome)):
        assert layer.merge() == MergeOutcome.SKIPPED
    assert P4Inv.merge_all([layer]).tolist() == [outcome]
    if MergeOutcome.is_skip(torch.tensor(outcome)):
        assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
        assert layer.merge(force=True) == MergeOutcome.FORCED
    torch.testing.assert_close(layer.A @ layer.A_inv, torch.eye(4, dtype=torch.float64), atol=1e-8, rtol=0)


def test_a_singular_update_is_never_merged():
    layer = P4Inv(4, rank=1, dtype=torch.float64)
    with torch.no_grad():
        layer.V.copy_(torch.tensor([[1.0], [0], [0], [0]]))
        layer.U.copy_(-layer.V)
    assert layer.logabsdet == -math.inf
    assert layer.sign == 0
    assert layer.merge(force=True) == MergeOutcome.SKIPPED
    assert layer.A_inv.isfinite().all()


@pytest.mark.parametrize("parameter", ["U", "V"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("force", [False, True])
@ranks
def test_a_perturbation_that_is_not_finite_is_reset_without_a_merge(rank, parameter, value, force):
    layer = layer_with(rank)
    A, A_inv, logabsdet = layer.A.clone(), layer.A_inv.clone(), layer.logabsdet_A.clone()
    with torch.no_grad():
        getattr(layer, parameter)[3] = value
    assert layer.merge(force) == MergeOutcome.RESET
    assert torch.equal(layer.A, A)
    assert torch.equal(layer.A_inv, A_inv)
    assert torch.equal(layer.logabsdet_A, logabsdet)
    assert layer.U.abs().max() == 0
    assert layer.V.isfinite().all()


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e30), (torch.float64, 1.5e308)])
def test_an_update_that_would_overflow_is_not_stored(dtype, size):
    layer = P4Inv(4, bounds_update=(None, None), bounds_det=(None, None), dtype=dtype)
    with torch.no_grad():
        layer.U.fill_(size)
        layer.V.fill_(size)
    assert layer.merge(force=True) == MergeOutcome.SKIPPED
    assert layer.A.isfinite().all()
    assert layer.A_inv.isfinite().all()


def test_reset_drops_the_perturbation():
    layer = layer_with(2)
    A = layer.A.clone()
    layer.reset()
    assert torch.equal(layer.matrix, A)
    assert layer.merges == 1


@pytest.mark.parametrize(("n", "k"), [(5, 2), (40, 8), (6, 6)])
def test_directions_of_higher_rank_are_orthogonal_and_cover_all_alike(n, k):
    seeds = torch.arange(2000)
    V = directions(seeds, torch.zeros_like(seeds), n, k)
    torch.testing.assert_close(V.mT @ V, n / k * torch.eye(k).double().expand(len(V), k, k))
    covered = V @ V.mT
    torch.testing.assert_close(covered.mean(0), torch.eye(n).double(), atol=6 / len(V) ** 0.5, rtol=0)
    assert abs(V.mean(0)).max() < 6 / len(V) ** 0.5  # no sign is preferred
    assert torch.equal(directions(seeds[3], torch.tensor(0), n, k), V[3])
    assert V.is_contiguous()
    assert torch.equal(directions(seeds, seeds, n, 1), normal(seeds, seeds, (n, 1)))


def test_new_perturbations_are_standard_normal_and_differ():
    seeds = torch.arange(50)
    draws = torch.stack([normal(seeds, torch.full_like(seeds, count), (101, 3)) for count in range(20)])
    flat = draws.flatten()
    n = len(flat)
    assert abs(flat.mean()) < 4 / n**0.5
    assert abs(flat.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs(flat.pow(4).mean() - 3) < 4 * (96 / n) ** 0.5
    rows = draws.flatten(0, 1).flatten(1)
    correlation = rows @ rows.T / rows.shape[1]
    correlation.fill_diagonal_(0)
    assert correlation.abs().max() < 6 / rows.shape[1] ** 0.5
    assert torch.equal(normal(seeds[3], torch.tensor(7), (101, 3)), draws[7, 3])


# --- correction ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("order", "polynomial"), [(2, lambda R: R @ R), (3, lambda R: R @ R @ R), (7, None)])
def test_hyperpower_residual(order, polynomial):
    A = matrix(12)
    X = torch.linalg.inv(A)
    X = X + 0.02 * torch.randn_like(X)
    R = algebra.residual(A, X)
    eye = torch.eye(12, dtype=torch.float64)
    expected = polynomial(R) if polynomial else torch.linalg.matrix_power(R, 7) @ (3 * eye + R) @ (3 * eye + R) / 16
    assert R.abs().max() > 1e-2
    torch.testing.assert_close(algebra.residual(A, hyperpower(X, R, order)), expected, atol=1e-13, rtol=1e-9)


@pytest.mark.parametrize("order", [2, 3, 7])
def test_correct_repairs_the_inverse_and_the_log_determinant(order):
    layer = P4Inv(12, init=matrix(12), dtype=torch.float64)
    with torch.no_grad():
        layer.A_inv += 1e-3 * torch.randn_like(layer.A_inv)
        layer.logabsdet_A += 0.1
        layer.sign_A *= -1
    before = layer.residual()
    layer.correct(order)
    assert layer.residual() < 100 * before**order + 1e-13
    sign, logabsdet = torch.linalg.slogdet(layer.A)
    torch.testing.assert_close(layer.logabsdet, logabsdet)
    assert layer.sign == sign


@pytest.mark.parametrize("damage", [1.0, 1e6, math.nan, math.inf])
def test_correct_recovers_an_inverse_that_is_beyond_iteration(damage):
    layer = P4Inv(12, init=matrix(12), dtype=torch.float64)
    with torch.no_grad():
        layer.A_inv += damage * torch.randn_like(layer.A_inv)
    layer.correct()
    assert layer.residual() < 1e-12


def test_correct_keeps_a_finite_inverse_when_the_matrix_is_singular():
    layer = P4Inv(3, dtype=torch.float64)
    with torch.no_grad():
        layer.A.zero_()
    layer.correct()
    assert layer.A_inv.isfinite().all()
    assert layer.logabsdet_A.isfinite()


# --- penalty ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("G", [0.01, 0.5, 1e8])
def test_penalty_of_appendix_a(G):
    layer = nearly_singular(G, **PAPER_BOUNDS | {"penalty_weight": 0.3})
    with torch.no_grad():
        layer.logabsdet_A += 1
    expected = sum(max(x - 15, 0) ** 2 + max(-2 - x, 0) ** 2 for x in (math.log(G), math.log(G) + 1))
    assert layer.penalty().item() == pytest.approx(0.3 * expected)


def test_penalty_is_finite_with_a_finite_gradient_at_a_singular_matrix():
    layer = P4Inv(2, rank=1, dtype=torch.float64)
    with torch.no_grad():
        layer.V.copy_(torch.tensor([[1.0], [0]]))
        layer.U.copy_(-layer.V)
    layer.penalty().backward()
    assert layer.U.grad.isfinite().all()


def test_a_step_down_the_penalty_leaves_the_ill_conditioned_regime():
    layer = nearly_singular(0.01)
    layer.penalty().backward()
    before = layer.logabsdet
    with torch.no_grad():
        layer.U -= 1e-4 * layer.U.grad
    assert layer.logabsdet > before


# --- precision and memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "merges", "bounds_det"), [(1, 2000, (-2.5, 15.5)), (1, 2000, (None, None)), (64, 300, (None, None))]
)
def test_many_random_merges_in_float32(rank, merges, bounds_det):
    n = 512
    layer = P4Inv(n, rank, bounds_det=bounds_det)
    for i in range(1, merges + 1):
        with torch.no_grad():
            layer.U.normal_(std=0.3 / math.sqrt(n))
        layer.merge(force=i % 10 == 0)
        if i % 50 == 0:
            layer.correct()
    assert layer.merges >= merges // 10
    exact = torch.linalg.inv(layer.A.double()).float()
    best = algebra.residual(layer.A, exact).abs().max()
    assert layer.residual() <= 20 * best
    assert abs(layer.logabsdet_A - torch.linalg.slogdet(layer.A.double()).logabsdet) <= 5e-3


def test_log_determinants_of_high_dimensions_neither_over_nor_underflow():
    for scale in (0.01, 100.0):
        layer = P4Inv(400, init=scale * torch.eye(400))
        y, logabsdet = layer(torch.ones(2, 400))
        torch.testing.assert_close(logabsdet, torch.full((2,), 400 * math.log(scale)))
        torch.testing.assert_close(layer.inverse(y)[0], torch.ones(2, 400))


@pytest.mark.parametrize("convert", ["float", "half", "bfloat16"])
def test_the_tracked_log_determinant_stays_float64(convert):
    layer = layer_with()
    exact = layer.logabsdet_A.clone()
    getattr(layer, convert)()
    assert layer.logabsdet_A.dtype == torch.float64
    assert layer.logabsdet_A == exact
    layer.merge()
    assert layer.logabsdet_A.dtype == torch.float64


def test_autocast_keeps_the_log_determinant_in_full_precision():
    layer = perturb(P4Inv(64, init="orthogonal"), 0.3)
    x = torch.randn(5, 64)
    exact = layer(x)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for direction, sign in ((layer, 1), (layer.inverse, -1)):
            y, logabsdet = direction(x)
            assert y.dtype in (torch.bfloat16, torch.float32)
            torch.testing.assert_close(sign * logabsdet, exact, rtol=0, atol=1e-6)


class Allocations(TorchDispatchMode):
    """The largest new storage that any operation creates."""

    def __init__(self, *known):
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@ranks
def test_no_call_allocates_an_n_by_n_temporary(rank):
    n, batch = 256, 4
    layer = perturb(P4Inv(n, rank))
    x = torch.randn(batch, n, requires_grad=True)
    with Allocations(layer.A, layer.A_inv, layer.A_double, layer.A_inv_double) as allocations:
        for direction in (layer, layer.inverse):
            y, logabsdet = direction(x)
            (y.square().sum() + logabsdet.sum()).backward()
        layer.penalty().backward()
        layer.merge()
    assert 0 < allocations.largest < n * n / 8
    with Allocations() as allocations:
        assert layer.inverse_matrix.isfinite().all()
    assert allocations.largest >= n * n


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features": 0}, "features: expected an integer >= 1, got 0"),
        ({"features": 2.0}, "features: expected an integer >= 1, got 2.0"),
        ({"features": "3"}, "features"),
        ({"rank": 0}, "rank: expected an integer >= 1 and <= 4, got 0"),
        ({"rank": 5}, "rank: expected an integer >= 1 and <= 4, got 5"),
        ({"rank": True}, "rank"),
        ({"seed": 0.5}, "seed: expected an integer, got 0.5"),
        ({"init": "eye"}, "init: expected .identity., .reverse."),
        ({"init": torch.tensor([0, 1, 1, 2])}, "permutation of 0 ... 3"),
        ({"init": torch.tensor([0, 1, 2])}, "permutation of 0 ... 3"),
        ({"init": torch.randn(4)}, r"shape \(4,\)"),
        ({"init": torch.randn(4, 3)}, r"shape \(4, 3\)"),
        ({"init": torch.zeros(4, 4)}, "singular"),
        ({"init": torch.ones(4, 4)}, "singular"),
        ({"init": torch.full((4, 4), math.nan)}, "finite"),
        ({"init": torch.eye(4) * 1j}, "real"),
        ({"bounds_update": (1, 0)}, "bounds_update: expected low < high"),
        ({"bounds_det": (2, 2)}, "bounds_det: expected low < high"),
        ({"bounds_det": 3}, "bounds_det: expected a pair"),
        ({"bounds_penalty": (math.nan, 1)}, "bounds_penalty"),
        ({"penalty_weight": -1.0}, "penalty_weight"),
        ({"dtype": torch.int64}, "dtype: expected a floating-point type"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        P4Inv(**{"features": 4, **arguments})


def test_wrong_order():
    with pytest.raises(ValueError, match="order: expected 2, 3, 7 or None, got 5"):
        P4Inv(2).correct(5)


@pytest.mark.parametrize("k", [2, 5, 64])
@pytest.mark.parametrize("scale", [1e-100, 1.0, 1e100])
def test_the_largest_singular_value(k, scale):
    M = torch.randn(20, k, k, dtype=torch.float64)
    M[0], M[1], M[2] = torch.eye(k), matrix(k), torch.diag(torch.arange(k))
    exact = torch.linalg.svdvals(M)[:, 0].log() + math.log(scale)
    excess = algebra.log_spectral_norm(scale * M) - exact
    assert excess.min() > -1e-9
    assert excess.max() < math.log(k) / 256 + 1e-9
    M[3, 0, 1], M[4] = math.nan, math.inf
    assert not (algebra.log_spectral_norm(M)[3:5] <= math.inf).any()


@pytest.mark.parametrize("n", [1024, 1025, 1032])
def test_matrix_vector_products_of_large_matrices(n):
    M, u = torch.randn(n, n - 3, dtype=torch.float64), torch.randn(n, dtype=torch.float64)
    torch.testing.assert_close(algebra.matrix_vector(M, u[:-3]), M @ u[:-3])
    torch.testing.assert_close(algebra.vector_matrix(u, M), u @ M)


@pytest.mark.parametrize("rank", [1, 3])
def test_a_wide_layer_against_the_dense_oracle(rank):
    layer = P4Inv(1024, rank, init="orthogonal")
    with torch.no_grad():
        layer.U.normal_(std=0.01)
    M = layer.matrix.double()
    sign, logabsdet = torch.linalg.slogdet(M)
    x = torch.randn(4, 1024)
    for _ in range(2):
        torch.testing.assert_close(layer(x)[1].double(), logabsdet.expand(4), atol=1e-4, rtol=0)
        torch.testing.assert_close(layer(x)[0].double(), x.double() @ M.T, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            layer.inverse(x)[0].double(), torch.linalg.solve(M, x.double().T).T, atol=1e-3, rtol=1e-3
        )
        assert layer.sign == sign
        assert layer.merge() == MergeOutcome.MERGED


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_is_forced_that_is_singular_to_rounding(dtype):
    torch.manual_seed(1)
    M = torch.randn(5, 5, dtype=torch.float64)
    M[4] = M[0] + M[1]
    layer = P4Inv(5, dtype=dtype)
    with torch.no_grad():
        layer.U.copy_((M - layer.A.double()) @ torch.linalg.inv(layer.V.double()).T)
    assert layer.merge(force=True) == MergeOutcome.SKIPPED
    assert torch.equal(layer.A, torch.eye(5, dtype=dtype))

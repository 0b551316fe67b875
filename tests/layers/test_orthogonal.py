"""P4Orthogonal: it stays in O(n), learns there, and costs what it says."""

import pytest
import torch
from registry import N, matrix, perturb, train
from torch.optim import swa_utils

from p4flows import AveragedModel, MergeOutcome, MergeScheduler, P4Orthogonal
from p4flows.tracking import rotation
from p4flows.tracking.rotation import nearest_orthogonal

ranks = pytest.mark.parametrize("rank", [1, 2, 5, 6])


def defect(M):
    return (M.mT.double() @ M.double() - torch.eye(M.shape[-1], dtype=torch.float64)).abs().max().item()


def generator(layer):
    """The skew-symmetric K, as the documentation has it."""
    U, V = layer.U.detach(), layer.V.detach()
    return (U @ V.T - V @ U.T) / 2


@ranks
@pytest.mark.parametrize("scale", [1e-8, 0.1, 3.0, 1e4])
def test_the_perturbed_matrix_is_the_cayley_transform_and_orthogonal(rank, scale):
    layer = perturb(P4Orthogonal(N, rank, init="orthogonal", seed=3, dtype=torch.float64), scale)
    K, identity = generator(layer), torch.eye(N, dtype=torch.float64)
    expected = torch.linalg.solve(identity - K / 2, identity + K / 2) @ layer.A
    tolerance = 1e-13 * max(1, scale)
    torch.testing.assert_close(layer.matrix, expected, atol=tolerance, rtol=0)
    assert defect(layer.matrix) < tolerance
    assert torch.linalg.det(layer.matrix).item() == pytest.approx(layer.sign.item(), abs=1e-6)
    before = layer.matrix.detach().clone()
    assert layer.merge() == MergeOutcome.MERGED
    assert defect(layer.A) < 1e-14
    torch.testing.assert_close(layer.A, before, atol=10 * tolerance, rtol=0)
    assert torch.equal(layer.matrix, layer.A)  # exactly, at B0


def test_rank_one_is_two_householder_reflections():
    layer = P4Orthogonal(N, 1, bias=False, dtype=torch.float64)
    v = layer.V.detach()[:, 0]
    u = torch.randn(N, dtype=torch.float64)
    u -= v * (u @ v) / (v @ v)
    with torch.no_grad():
        layer.U[:, 0] = u

    def reflection(a):
        return torch.eye(N, dtype=torch.float64) - 2 * torch.outer(a, a) / (a @ a)

    torch.testing.assert_close(layer.matrix, reflection(v + (v @ v) * u / 4) @ reflection(v))


@ranks
def test_a_step_of_sgd_is_on_average_one_of_riemannian_gradient_descent(rank):
    """``E[V Vᵀ] = I``, so that K is minus the learning rate times the skew part of the gradient, on average."""
    torch.manual_seed(0)
    G, mean, draws = torch.randn(N, N, dtype=torch.float64), 0, 4000
    layer = P4Orthogonal(N, rank, bias=False, seed=5, dtype=torch.float64)
    for _ in range(draws):
        (gradient,) = torch.autograd.grad((layer.matrix * G).sum(), layer.U)
        with torch.no_grad():
            layer.U.copy_(-gradient)
        mean += generator(layer) / draws
        layer.reset()
    skew = (G - G.T) / 2
    assert (mean + skew).norm() < 0.1 * skew.norm()


def test_ten_thousand_merges_in_float32():
    layer, noise = P4Orthogonal(64, 4), torch.Generator().manual_seed(0)
    for _ in range(10_000):
        with torch.no_grad():
            layer.U.copy_(0.1 * torch.randn(layer.U.shape, generator=noise))
        layer.merge()
    assert layer.merges == 10_000
    assert defect(layer.A) < 1e-6  # 1e-5 is what is asked for
    assert defect(layer.A_double) < 1e-12
    x = torch.randn(9, 64)
    y, logabsdet = layer(x)
    torch.testing.assert_close(layer.inverse(y)[0], x, atol=1e-5, rtol=0)
    assert (logabsdet == 0).all()


def test_learns_a_rotation_and_never_the_reflection_of_it():
    torch.manual_seed(0)
    T = nearest_orthogonal(torch.randn(16, 16, dtype=torch.float64)).float()
    T[0] *= torch.linalg.det(T).sign()
    ends = []
    for target in (T, T * torch.tensor([-1.0, *[1.0] * 15])[:, None]):
        layer = P4Orthogonal(16, bias=False)
        optimizer = torch.optim.Adam([layer.U], lr=0.03)
        MergeScheduler(layer, optimizer).attach()
        for step in range(600):
            x = torch.randn(64, 16)
            loss = (layer(x)[0] - x @ target.T).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.param_groups[0]["lr"] = 0.03 * (1 - step / 600)
            optimizer.step()
        ends.append(loss.item())
        assert layer.violation() < 1e-6
        assert layer.sign == 1
    assert ends[0] < 1e-4
    assert ends[1] > 0.05


def test_a_perturbation_that_is_too_large_is_skipped():
    layer = P4Orthogonal(4, 1, dtype=torch.float64)
    A = layer.A.clone()
    with torch.no_grad():
        layer.U.fill_(1e308)
        layer.U[0] = -1e308
    assert layer.merge(force=True) == MergeOutcome.SKIPPED
    assert torch.equal(layer.A, A)
    assert P4Orthogonal.merge_all([layer])[0] == MergeOutcome.SKIPPED_RANGE


def test_many_layers_are_merged_in_one_call():
    layers = [perturb(P4Orthogonal(N, 2, seed=i)) for i in range(4)]
    with torch.no_grad():
        layers[2].U[0, 0] = torch.nan
    matrices = [layer.matrix.detach() for layer in layers]
    A = layers[2].A.clone()
    assert P4Orthogonal.merge_all(layers).tolist() == [1, 1, MergeOutcome.RESET, 1]
    for i in (0, 1, 3):
        torch.testing.assert_close(layers[i].A, matrices[i])
    assert torch.equal(layers[2].A, A)
    assert all((layer.U == 0).all() for layer in layers)
    other = P4Orthogonal(5, 2)
    assert other.group_key != layers[0].group_key == layers[1].group_key


def test_correction():
    layer = P4Orthogonal(N)
    assert layer.correct() == 0
    layer.A_double.copy_(2 * matrix(N))
    assert P4Orthogonal.correct_all([layer], where_needed=True).tolist() == [0]
    assert layer.correct() == 2
    assert layer.violation() < 1e-6
    assert layer.correct() == 0


def test_nearest_orthogonal_and_newton_schulz():
    M = matrix(N)
    Q = nearest_orthogonal(M)
    assert defect(Q) < 1e-14
    for _ in range(20):  # no other one is nearer
        noise = torch.randn(N, N, dtype=torch.float64)
        other = Q @ torch.linalg.matrix_exp(0.1 * (noise - noise.T))
        assert (other - M).norm() > (Q - M).norm()
    near = Q + 1e-4 * torch.randn(N, N, dtype=torch.float64)
    assert defect(rotation.newton_schulz(near)) < 10 * defect(near) ** 2


def test_setting_matrices():
    layer = P4Orthogonal(N, dtype=torch.float64)
    Q = nearest_orthogonal(matrix(N))
    layer.set_matrix(Q)
    torch.testing.assert_close(layer.matrix, Q)
    assert layer.sign == torch.linalg.det(Q).sign() == -1
    before = layer.A.clone()
    for M, message in (
        (matrix(N), r"M: expected an orthogonal matrix, got one with max\|MᵀM - I\| = "),
        (torch.eye(N + 1), r"M: expected a real tensor of shape"),
        (torch.full((N, N), torch.nan), "M: expected a matrix whose entries are finite"),
    ):
        with pytest.raises(ValueError, match=message):
            layer.set_matrix(M)
        assert torch.equal(layer.A, before)
    layer.set_average(3 * matrix(N))
    torch.testing.assert_close(layer.A, Q)


@pytest.mark.parametrize("init", [matrix(4).tolist(), 2 * torch.eye(4), torch.zeros(4, 4)])
def test_wrong_init(init):
    with pytest.raises(ValueError, match=r"init: expected an (orthogonal|invertible) matrix"):
        P4Orthogonal(4, init=init)


def test_an_init_that_is_orthogonal_up_to_rounding_is_polished():
    Q = nearest_orthogonal(matrix(N)).half()
    layer = P4Orthogonal(N, init=Q)
    assert defect(layer.A_double) < 1e-14
    torch.testing.assert_close(layer.A, Q.float(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("inverse", [False, True])
def test_export(inverse):
    layer = train(P4Orthogonal(N), 30)
    x = torch.randn(5, N)
    torch.testing.assert_close(layer.to_linear(inverse)(x), (layer.inverse if inverse else layer)(x)[0])


def test_averages_are_orthogonal():
    torch.manual_seed(0)
    layer = P4Orthogonal(N, dtype=torch.float64)
    averaged = AveragedModel(layer, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.8))
    mean = None
    for _ in range(6):
        train(layer, 9)
        averaged.update_parameters(layer)
        current = layer.matrix.detach()
        mean = current if mean is None else nearest_orthogonal(0.8 * mean + 0.2 * current)
    torch.testing.assert_close(averaged.module.matrix, mean)
    assert defect(averaged.module.A) < 1e-14


def test_autocast_keeps_the_rotation_in_full_precision():
    layer = perturb(P4Orthogonal(N))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, logabsdet = layer(torch.randn(5, N))
        factors = layer._factors()
    assert y.dtype == torch.bfloat16
    assert logabsdet.dtype == torch.float32
    assert {each.dtype for each in factors} == {torch.float32}


def test_no_square_temporary_in_either_direction():
    n = 512
    layer = perturb(P4Orthogonal(n, 2, dtype=torch.float32))
    x = torch.randn(3, n)
    for direction in (layer, layer.inverse):
        with torch.profiler.profile(profile_memory=True) as profile:
            direction(x)[0].sum().backward()
        assert max(event.cpu_memory_usage for event in profile.events()) < n * n * 4


def test_a_state_with_a_matrix_that_is_not_orthogonal_is_refused():
    layer = P4Orthogonal(N, seed=3)
    before = layer.A.clone()
    for change, message in (
        (lambda A: 1.01 * A, r"A: expected an orthogonal matrix, got one with max\|MᵀM - I\| = 0.02"),
        (lambda A: A * torch.nan, r"A: expected a matrix whose entries are finite"),
    ):
        state = train(P4Orthogonal(N)).state_dict()
        state |= {name: change(state[name]) for name in ("A", "A_double")}
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict(state)
        assert torch.equal(layer.A, before)


def test_a_state_of_little_precision_becomes_orthogonal():
    state = train(P4Orthogonal(N, init="reverse")).state_dict()
    state |= {"A_double": state["A"].double(), "sign_A": -state["sign_A"]}
    assert defect(state["A_double"]) > 1e-9
    layer = P4Orthogonal(N)
    layer.load_state_dict(state)
    assert defect(layer.exact) < 1e-12
    assert layer.sign == torch.linalg.det(layer.exact).sign()


def test_a_state_that_says_two_things_of_A_is_read_from_the_exact_one():
    state = P4Orthogonal(N, init="orthogonal").state_dict()
    state["A"] *= 2
    layer = P4Orthogonal(N)
    layer.load_state_dict(state)
    assert layer.violation() < 1e-6

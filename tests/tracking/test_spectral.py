"""Certified upper bounds of spectral norms: never below the norm, and close to it."""

import pytest
import torch

from p4flows.tracking.spectral import certified_norm, clipped


def spectrum(values, m, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    P, Q = (torch.linalg.qr(torch.randn(k, k, generator=generator, dtype=torch.float64)).Q for k in (m, n))
    k = min(m, n)
    return P[:, :k] * torch.as_tensor(values, dtype=torch.float64)[:k] @ Q[:, :k].T


CASES = {
    "one large": [5.0] + [0.1] * 39,
    "all equal": [1.0] * 40,
    "a cluster": [1.0] * 10 + [0.999] * 10 + [0.5] * 20,
    "decaying": [2.0**-i for i in range(40)],
    "tiny": [1e-150] * 40,
    "huge": [1e100] * 40,
}


@pytest.mark.parametrize("shape", [(40, 40), (40, 60), (60, 40), (1, 40), (40, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_is_an_upper_bound_and_close(name, shape, dtype):
    M = spectrum(CASES[name], *shape).to(dtype)
    if not M.isfinite().all():
        pytest.skip("beyond the range of the dtype")
    norm = torch.linalg.matrix_norm(M.double(), 2).item()
    x = torch.ones(shape[1], dtype=dtype)
    for _ in range(3):
        t = certified_norm(M, x)
        assert t >= norm * (1 - 1e-15)
    assert t <= 1.0045 * norm + 1e-300


def test_never_fails_where_power_iteration_does():
    """A start at a right angle to the singular vector of the norm, which power iteration then never finds."""
    values = torch.full((30,), 0.1, dtype=torch.float64)
    values[0] = 1
    M, x = torch.diag(values), torch.zeros(30, dtype=torch.float64)
    x[1] = 1
    t = certified_norm(M, x)
    assert 1 <= t < 4
    assert certified_norm(M, torch.zeros(30, dtype=torch.float64)) >= 1


@pytest.mark.parametrize(("norm", "provable"), [(1 - 1e-9, True), (1 + 1e-9, False), (1.3, False), (0.5, True)])
def test_a_wanted_bound_is_proved_where_it_holds(norm, provable):
    M = spectrum([norm] * 20, 20, 20)
    t = certified_norm(M, torch.ones(20, dtype=torch.float64), wanted=1.0)
    assert (t <= 1) == provable
    assert t >= norm * (1 - 1e-15)


def test_zero():
    assert certified_norm(torch.zeros(3, 4), torch.ones(4)) == 0


def test_the_start_moves_to_the_singular_vector():
    M = spectrum([3.0] + [1.0] * 19, 20, 20)
    x = torch.ones(20, dtype=torch.float64)
    certified_norm(M, x)
    torch.testing.assert_close(torch.linalg.vector_norm(M @ x).item(), 3.0, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (1, 4)])
def test_clipping_gives_the_nearest_matrix(shape):
    M = spectrum([3.0, 1.5, 1.0, 0.5, *[0.1] * 30], *shape)
    P, values, Qh = torch.linalg.svd(M, full_matrices=False)
    torch.testing.assert_close(clipped(M, 1.2), P * values.clamp(max=1.2) @ Qh)
    torch.testing.assert_close(clipped(M, 3.5), M, atol=1e-15, rtol=0)

"""The peers in benchmarks/speed that are written from formulas, against dense matrices in float64; and memory."""

import pytest
import torch

from benchmarks.speed.memory import allocated
from benchmarks.speed.relative_gradient import RelativeGradient
from benchmarks.speed.woodbury import Woodbury

N, ROWS = 7, 5


def woodbury():
    layer = Woodbury(N, 3).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def dense(layer):
    return torch.eye(N, dtype=torch.float64) + layer.U @ layer.V


def test_woodbury_starts_as_the_identity():
    layer, x = Woodbury(N, 3), torch.randn(ROWS, N)
    for direction in (layer, layer.inverse):
        y, logabsdet = direction(x)
        assert torch.equal(y, x)
        assert logabsdet == 0


def test_woodbury_is_a_dense_matrix_of_its_formula_in_both_directions():
    layer, x = woodbury(), torch.randn(ROWS, N, dtype=torch.float64)
    W = dense(layer)
    y, logabsdet = layer(x)
    torch.testing.assert_close(y, x @ W.T + layer.bias)
    torch.testing.assert_close(logabsdet, torch.linalg.slogdet(W).logabsdet)
    back, inverse_logabsdet = layer.inverse(y)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(inverse_logabsdet, -logabsdet)


@pytest.mark.parametrize("inverse", [False, True])
def test_woodbury_s_gradients_are_those_of_the_dense_matrix(inverse):
    layer = woodbury()
    x, weights = torch.randn(2, ROWS, N, dtype=torch.float64)
    x.requires_grad_()
    W = dense(layer)
    logabsdet = torch.linalg.slogdet(W).logabsdet
    if inverse:
        expected, logabsdet = torch.linalg.solve(W, (x - layer.bias).T).T, -logabsdet
    else:
        expected = x @ W.T + layer.bias
    y, found = layer.inverse(x) if inverse else layer(x)
    wanted = [*layer.parameters(), x]
    gradients = torch.autograd.grad((y * weights).sum() - 3 * found, wanted)
    torch.testing.assert_close(gradients, torch.autograd.grad((expected * weights).sum() - 3 * logabsdet, wanted))


def test_the_relative_gradient_is_that_of_the_dense_matrix_times_w_transposed_w():
    layer = RelativeGradient(N).double()
    x, weights = torch.randn(2, ROWS, N, dtype=torch.float64)
    x.requires_grad_()
    with torch.no_grad():
        layer.weight += 0.5 * torch.randn(N, N)
        layer.bias.normal_()
    W = layer.weight
    y, logabsdet = layer(x)
    expected = x @ W.T + layer.bias
    torch.testing.assert_close(y, expected)
    assert logabsdet.isnan()  # it is not evaluated, and whoever reads it shall see that
    wanted = [W, layer.bias, x]
    found = torch.autograd.grad((y.sin() * weights).sum() - 3 * logabsdet, wanted)
    loss = (expected.sin() * weights).sum() - 3 * torch.linalg.slogdet(W).logabsdet
    G, *others = torch.autograd.grad(loss, wanted)
    torch.testing.assert_close(found, (G @ W.T @ W, *others))


def test_memory_is_that_of_the_work_at_its_peak_and_what_it_leaves():
    left = []

    def work():
        large = torch.ones(3_000)
        left.append(large[:1_000].clone())
        del large
        torch.ones(2_000)

    assert allocated(work, torch.device("cpu")) == (4 * 4_000, 4 * 1_000)

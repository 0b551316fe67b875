"""The gradients of InvertibleLinear are those of a dense matrix at A, with a determinant by LU."""

from itertools import chain, combinations

import pytest
import torch
from registry import matrix
from torch import nn

from p4flows import InvertibleLinear

N = 5
directions = pytest.mark.parametrize("direction", ["forward", "inverse"])
close = {"atol": 1e-10, "rtol": 1e-10}


def ahead(n=N, dtype=torch.float64, **options):
    """A layer whose weight is ahead of its A, so that the two cannot be mistaken for each other."""
    layer = InvertibleLinear(n, init=matrix(n), dtype=dtype, **options)
    with torch.no_grad():
        layer.weight.add_(0.3 * torch.randn(n, n))
        if layer.bias is not None:
            layer.bias.normal_()
    return layer


def dense(direction, M, b, x):
    """The oracle: ``M x + b`` or its inverse, and log|det|."""
    b = 0 if b is None else b
    logabsdet = torch.linalg.slogdet(M).logabsdet.expand(x.shape[:-1])
    if direction == "forward":
        return x @ M.T + b, logabsdet
    # Derivatives of torch.linalg.solve are wrong under vmap of forward mode.
    return (torch.linalg.inv(M) @ (x - b).mT).mT, -logabsdet


def leaves(layer, rows=(4, N)):
    """x, W, b of the layer; and x, A, b for the oracle."""
    x = torch.randn(rows, dtype=layer.A.dtype, requires_grad=True)
    ours = [x, layer.weight] + ([layer.bias] if layer.bias is not None else [])
    theirs = [t.detach().clone().requires_grad_() for t in (x, layer.A, *ours[2:])]
    return ours, theirs


def scalar(outputs):
    """A loss that is not symmetric in anything."""
    weights = (torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view_as(out) for out in outputs)
    return sum((weight * out + 0.1 * out**3).sum() for weight, out in zip(weights, outputs, strict=True))


@directions
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(4, N), (2, 3, N), (N,), (0, N)])
@pytest.mark.parametrize("create_graph", [False, True])
def test_first_derivatives(direction, bias, rows, create_graph):
    layer = ahead(bias=bias)
    ours, theirs = leaves(layer, rows)
    outputs = getattr(layer, direction)(ours[0])
    expected = dense(direction, theirs[1], theirs[2] if bias else None, theirs[0].reshape(-1, N))
    expected = [out.reshape(found.shape) for out, found in zip(expected, outputs, strict=True)]
    torch.testing.assert_close(list(outputs), expected, **close)
    found = torch.autograd.grad(scalar(outputs), ours, create_graph=create_graph)
    torch.testing.assert_close(found, torch.autograd.grad(scalar(expected), theirs), **close)


@directions
@pytest.mark.parametrize("output", [0, 1])
def test_each_output_alone(direction, output):
    layer = ahead()
    ours, theirs = leaves(layer)
    found = torch.autograd.grad(scalar(getattr(layer, direction)(ours[0])[output : output + 1]), ours)
    loss = scalar(dense(direction, theirs[1], theirs[2], theirs[0])[output : output + 1])
    torch.testing.assert_close(
        found, torch.autograd.grad(loss, theirs, allow_unused=True, materialize_grads=True), **close
    )


SUBSETS = list(chain.from_iterable(combinations(range(3), size) for size in (1, 2, 3)))


@directions
@pytest.mark.parametrize("trained", SUBSETS, ids=["".join("xWb"[i] for i in subset) for subset in SUBSETS])
def test_second_derivatives_of_every_subset(direction, trained):
    """Of x, the weight and the bias, those that require gradients; through gradients of gradients, twice."""
    layer = ahead()
    ours, theirs = leaves(layer)
    results = []
    for tensors, function in ((ours, getattr(layer, direction)), (theirs, None)):
        for i, tensor in enumerate(tensors):
            tensor.requires_grad_(i in trained)
        outputs = function(tensors[0]) if function else dense(direction, tensors[1], tensors[2], tensors[0])
        wanted = [tensors[i] for i in trained]
        first = torch.autograd.grad(scalar(outputs), wanted, create_graph=True)
        second = torch.autograd.grad(scalar(first), wanted, create_graph=True)
        results.append([*first, *second, *torch.autograd.grad(scalar(second), wanted)])
    torch.testing.assert_close(*results, **close)


@directions
def test_a_layer_that_is_applied_twice(direction):
    layer = ahead()
    ours, theirs = leaves(layer)
    x, log_first = getattr(layer, direction)(ours[0])
    found = scalar([*getattr(layer, direction)(x), log_first])
    y, expected_log = dense(direction, theirs[1], theirs[2], theirs[0])
    expected = scalar([*dense(direction, theirs[1], theirs[2], y), expected_log])
    first = torch.autograd.grad(expected, theirs, create_graph=True)
    for create_graph in (False, True):
        torch.testing.assert_close(
            torch.autograd.grad(found, ours, retain_graph=True, create_graph=create_graph), first, **close
        )
    second = torch.autograd.grad(scalar(torch.autograd.grad(found, ours, create_graph=True)), ours)
    torch.testing.assert_close(second, torch.autograd.grad(scalar(first), theirs), atol=1e-8, rtol=1e-8)


class _Direction(nn.Module):
    def __init__(self, layer, direction):
        super().__init__()
        self.layer, self.direction = layer, direction

    def forward(self, x):
        return getattr(self.layer, self.direction)(x)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch's own, in jacfwd
@directions
def test_function_transforms(direction):
    layer = ahead()
    module = _Direction(layer, direction)
    W, b, x = layer.weight.detach(), layer.bias.detach(), torch.randn(4, N, dtype=torch.float64)

    def ours(W, b, x):
        return torch.func.functional_call(module, {"layer.weight": W, "layer.bias": b}, (x,))

    def theirs(M, b, x):
        return dense(direction, M, b, x)

    def check(transform):
        torch.testing.assert_close(transform(ours)(W, b, x), transform(theirs)(layer.A, b, x), **close)

    def on_rows(transform):
        def each(f):
            row = transform(lambda *arguments: scalar(f(*arguments[:2], arguments[2][None])), (0, 1, 2))
            return lambda *arguments: torch.func.vmap(row, (None, None, 0))(*arguments)

        return each

    everything = (0, 1, 2)
    check(lambda f: torch.func.grad(lambda *arguments: scalar(f(*arguments)), everything))
    check(on_rows(torch.func.grad))
    check(on_rows(lambda f, arguments: torch.func.hessian(f, arguments)))
    check(lambda f: torch.func.jacrev(f, everything))
    check(lambda f: torch.func.jacfwd(f, everything))
    tangents = torch.randn_like(W), torch.randn_like(b), torch.randn_like(x)
    check(lambda f: lambda *arguments: torch.func.jvp(f, arguments, tangents))


@directions
def test_attributes_have_the_gradients_of_a(direction):
    layer = ahead()
    A = layer.A.clone().requires_grad_()
    for found, expected in (
        (layer.matrix, A),
        (layer.inverse_matrix, torch.linalg.inv(A)),
        (layer.logabsdet, torch.linalg.slogdet(A).logabsdet),
    ):
        torch.testing.assert_close(found, expected, **close)
        (gradient,) = torch.autograd.grad(scalar([found]), layer.weight)
        torch.testing.assert_close(gradient, torch.autograd.grad(scalar([expected]), A)[0], **close)


@directions
def test_autocast_rounds_products_only(direction):
    layer = ahead(64, torch.float32)
    x = torch.randn(16, 64)
    exact, exact_log = getattr(layer, direction)(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, logabsdet = getattr(layer, direction)(x)
        (second,) = torch.autograd.grad(getattr(layer, direction)(x)[1].sum(), layer.weight, create_graph=True)
    assert (y.dtype, logabsdet.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(logabsdet, exact_log)
    assert (y.float() - exact).norm() < 0.02 * exact.norm()
    for found, expected, tolerance in ((logabsdet.sum(), exact_log.sum(), 1e-6), (y.sum(), exact.sum(), 0.02)):
        (gradient,) = torch.autograd.grad(found, layer.weight, retain_graph=True)
        (full,) = torch.autograd.grad(expected, layer.weight, retain_graph=True)
        assert gradient.dtype == torch.float32
        assert (gradient - full).norm() <= tolerance * full.norm()
    torch.testing.assert_close(second, torch.autograd.grad(exact_log.sum(), layer.weight)[0], rtol=1e-3, atol=1e-3)


@directions
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(direction, dtype):
    layer = ahead(16)
    x = torch.randn(8, 16, dtype=torch.float64)
    exact = getattr(layer, direction)(x)
    exact_gradient = torch.autograd.grad(sum(out.sum() for out in exact), [layer.weight, layer.bias])
    y, logabsdet = getattr(layer.to(dtype), direction)(x.to(dtype))
    assert (y.dtype, logabsdet.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(logabsdet.double(), exact[1], rtol=1e-5, atol=1e-5)
    assert (y.double() - exact[0]).norm() < 0.03 * exact[0].norm()
    gradient = torch.autograd.grad(y.sum() + logabsdet.sum(), [layer.weight, layer.bias])
    for found, expected in zip(gradient, exact_gradient, strict=True):
        assert found.dtype == dtype
        assert (found.double() - expected).norm() < 0.03 * expected.norm()


@directions
@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_leaves_the_function_as_it_was(direction, number):
    layer = ahead()
    x = torch.randn(3, N, dtype=torch.float64)
    before = [*getattr(layer, direction)(x), layer.matrix, layer.inverse_matrix, layer.logabsdet]
    with torch.no_grad():
        layer.weight[2, 3] = number
    now = [*getattr(layer, direction)(x), layer.matrix, layer.inverse_matrix, layer.logabsdet]
    torch.testing.assert_close(now, before, rtol=0, atol=0)
    mapped = torch.func.vmap(lambda row: getattr(layer, direction)(row)[0])(x)
    torch.testing.assert_close(mapped, before[0], **close)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch's own, in jacfwd
@pytest.mark.parametrize("n", [2, 3, 5])
def test_second_derivatives_of_rows_one_by_one(n):
    layer = ahead(n)
    x = torch.randn(3, n, dtype=torch.float64)
    inverse = torch.linalg.inv(layer.A)

    def cubed(row):
        return (layer.inverse(row)[0] ** 3).sum()

    def exact(row):
        return ((inverse @ (row - layer.bias.detach())) ** 3).sum()

    expected = torch.stack([torch.autograd.functional.hessian(exact, row) for row in x])
    torch.testing.assert_close(torch.func.vmap(torch.func.hessian(cubed))(x), expected)
    jacobians = torch.func.vmap(torch.func.jacfwd(lambda row: layer.inverse(row)[0]))(x)
    torch.testing.assert_close(jacobians, inverse.expand(3, n, n))

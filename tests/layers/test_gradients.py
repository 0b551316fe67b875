"""The hand-written gradients against autograd on the plain operations, and where they stand aside."""

import pytest
import torch
from registry import matrix, perturb
from torch.autograd import forward_ad

import p4flows.layers.gradients as fast
from p4flows import P4Inv

N = 5
cases = pytest.mark.parametrize(
    ("rank", "bias", "stacked", "fixed"),
    [
        *((1, bias, stacked, False) for bias in (True, False) for stacked in (True, False)),
        *((3, bias, False, fixed) for bias in (True, False) for fixed in (True, False)),
    ],
)
directions = pytest.mark.parametrize("direction", ["forward", "inverse"])


def make(rank, bias, stacked, fixed, monkeypatch):
    """``fixed`` is V: by default that of rank one is trained, and that of a higher rank is not."""
    monkeypatch.setattr(fast, "_STACKED", 1 if stacked else 1024)
    layer = perturb(P4Inv(N, rank, bias, init=matrix(N), dtype=torch.float64), 0.3)
    assert layer.V.requires_grad == (rank == 1)
    layer.V.requires_grad_(not fixed)
    return layer


def inputs(layer):
    x = torch.randn(4, N, dtype=torch.float64, requires_grad=True)
    return x, [p for p in (layer.U, layer.V, layer.bias) if p is not None and p.requires_grad]


def plain(layer, direction, x, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(fast, "_applicable", lambda x: False)
        return getattr(layer, direction)(x)


@cases
@directions
def test_values_and_gradients_are_those_of_the_plain_operations(rank, bias, stacked, fixed, direction, monkeypatch):
    layer = make(rank, bias, stacked, fixed, monkeypatch)
    x, parameters = inputs(layer)
    results = []
    for outputs in (getattr(layer, direction)(x), plain(layer, direction, x, monkeypatch)):
        weights = [torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view_as(out) for out in outputs]
        loss = sum((out * weight).sum() for out, weight in zip(outputs, weights, strict=True))
        results.append([*outputs, *torch.autograd.grad(loss, [x, *parameters])])
    for new, old in zip(*results, strict=True):
        torch.testing.assert_close(new, old, atol=1e-12, rtol=1e-12)


@cases
@directions
def test_first_and_second_derivatives_match_finite_differences(rank, bias, stacked, fixed, direction, monkeypatch):
    layer = make(rank, bias, stacked, fixed, monkeypatch)
    x, parameters = inputs(layer)

    def function(x, *_):
        return getattr(layer, direction)(x)

    assert torch.autograd.gradcheck(function, (x, *parameters))
    assert torch.autograd.gradgradcheck(function, (x, *parameters))


@cases
@directions
def test_either_output_alone_and_any_input_alone_can_be_differentiated(
    rank, bias, stacked, fixed, direction, monkeypatch
):
    layer = make(rank, bias, stacked, fixed, monkeypatch)
    x, parameters = inputs(layer)
    for i in (0, 1):
        gradients = torch.autograd.grad(getattr(layer, direction)(x)[i].sum(), [x, *parameters])
        expected = torch.autograd.grad(
            plain(layer, direction, x, monkeypatch)[i].sum(),
            [x, *parameters],
            allow_unused=True,
            materialize_grads=True,
        )
        for new, old in zip(gradients, expected, strict=True):
            torch.testing.assert_close(new, old, atol=1e-12, rtol=1e-12)
    for kept in [x, *parameters]:
        for tensor in [x, *parameters]:
            tensor.requires_grad_(tensor is kept)
        out = getattr(layer, direction)(x)
        (gradient,) = torch.autograd.grad(out[0].square().sum() + out[1].sum(), kept)
        assert gradient.abs().max() > 0
    with torch.no_grad():
        assert not getattr(layer, direction)(x)[0].requires_grad


@directions
@pytest.mark.parametrize("rank", [1, 3])
def test_any_batch_shape_and_memory_layout(direction, rank):
    layer = perturb(P4Inv(N, rank, dtype=torch.float64))
    x = torch.randn(N, 3, 2, dtype=torch.float64).permute(2, 1, 0)
    y, logabsdet = getattr(layer, direction)(x)
    rows, _ = getattr(layer, direction)(x.reshape(-1, N))
    assert y.shape == x.shape
    assert logabsdet.shape == (2, 3)
    torch.testing.assert_close(y.reshape(-1, N), rows)
    one, logabsdet = getattr(layer, direction)(x[0, 0])
    torch.testing.assert_close(one, y[0, 0])
    assert logabsdet.shape == ()
    empty, logabsdet = getattr(layer, direction)(x[:0])
    assert empty.shape == (0, 3, N)
    assert logabsdet.shape == (0, 3)


@directions
def test_merging_between_forward_and_backward_is_an_error(direction):
    for group in ([P4Inv(N)], [P4Inv(N), P4Inv(N, seed=1)]):
        group = P4Inv.group([perturb(layer) for layer in group])
        P4Inv.merge_all(group)
        perturb(group[0])
        y, logabsdet = getattr(group[0], direction)(torch.randn(3, N, requires_grad=True))
        P4Inv.merge_all(group, force=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (y.sum() + logabsdet.sum()).backward()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch's own, in jacfwd
@directions
@pytest.mark.parametrize("rank", [1, 3])
def test_function_transforms_and_forward_mode(direction, rank):
    layer = perturb(P4Inv(N, rank, dtype=torch.float64))
    x, tangent = torch.randn(2, 4, N, dtype=torch.float64)
    J = {"forward": layer.matrix, "inverse": layer.inverse_matrix}[direction]
    apply = getattr(layer, direction)
    torch.testing.assert_close(torch.func.vmap(torch.func.jacrev(lambda r: apply(r)[0]))(x), J.expand(4, N, N))
    torch.testing.assert_close(torch.func.vmap(torch.func.jacfwd(lambda r: apply(r)[0]))(x), J.expand(4, N, N))
    with forward_ad.dual_level():
        y, _ = apply(forward_ad.make_dual(x, tangent))
        torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, tangent @ J.T)
    state = {name: tensor.detach() for name, tensor in layer.named_parameters()}
    if direction == "forward":
        y, _ = torch.func.functional_call(layer, {**state, "U": torch.zeros_like(layer.U)}, (x,))
        torch.testing.assert_close(y, x @ layer.A.T + layer.bias)

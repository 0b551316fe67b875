"""InvertibleLinear outside of training: conversions, checkpoints, export."""

import copy
import io
import pickle

import pytest
import torch
from registry import matrix
from torch import nn

from p4flows import InvertibleLinear, MergeOutcome, MergeScheduler

N = 8


def model(seed=0):
    """Narrow layers of two kinds, and a wide one."""
    narrow = [InvertibleLinear(N, rank=2, seed=seed + i) for i in range(3)]
    return nn.ModuleList([*narrow, InvertibleLinear(N, seed=seed + 3), InvertibleLinear(140, rank=4, seed=seed + 4)])


def parts_of(layers):
    optimizer = torch.optim.Adam(layers.parameters(), lr=1e-2)
    scheduler = MergeScheduler(layers, optimizer, force_every=3, correct_every=7)
    return {"model": layers, "optimizer": optimizer, "scheduler": scheduler}


def advance(parts, steps):
    optimizer = parts["optimizer"]
    for _ in range(steps):
        optimizer.zero_grad()
        loss = 0
        for layer in parts["model"]:
            y, logabsdet = layer(torch.randn(16, layer.features))
            x, inverse_logabsdet = layer.inverse(torch.randn(16, layer.features))
            loss = loss + (y.square().sum(-1) / 2 - logabsdet + x.square().sum(-1) - inverse_logabsdet).mean()
        loss.backward()
        optimizer.step()
        parts["scheduler"].step()
    return parts


def test_a_resumed_training_is_equal_bit_for_bit():
    parts = advance(parts_of(model()), 25)
    file = io.BytesIO()
    torch.save({name: part.state_dict() for name, part in parts.items()}, file)
    file.seek(0)
    resumed = parts_of(model(seed=100))
    for name, state in torch.load(file, weights_only=True).items():
        resumed[name].load_state_dict(state)
    copies = [
        parts_of(copied) for copied in (copy.deepcopy(parts["model"]), pickle.loads(pickle.dumps(parts["model"])))
    ]
    for other in copies:
        for name in ("optimizer", "scheduler"):
            other[name].load_state_dict(copy.deepcopy(parts[name].state_dict()))
    for each in (parts, resumed, *copies):
        torch.manual_seed(5)
        advance(each, 25)
    for other in (resumed, *copies):
        for name, value in parts["model"].state_dict().items():
            assert torch.equal(value, other["model"].state_dict()[name]), name
        assert other["scheduler"].state_dict() == parts["scheduler"].state_dict()
    assert parts["scheduler"].counters["merged"] > 0


@pytest.mark.parametrize("convert", ["double", "half", "bfloat16", "float"])
def test_conversions_keep_what_is_tracked(convert):
    layer = advance(parts_of(nn.ModuleList([InvertibleLinear(N, rank=2)])), 20)["model"][0]
    A, A_inv, logabsdet = layer.A_double.clone(), layer.A_inv_double.clone(), layer.logabsdet_A - layer.rounding
    getattr(layer, convert)()
    dtype = layer.weight.dtype
    assert {layer.A.dtype, layer.A_inv.dtype, layer.directions.dtype, layer.bias.dtype} == {dtype}
    for found, exact in zip(layer.tracked.exact, (A, A_inv), strict=True):
        assert torch.equal(found, exact)
    torch.testing.assert_close(layer.logabsdet_A, logabsdet, rtol=0, atol=1e-5)
    assert torch.equal(layer.A, A.to(dtype))
    for _ in range(60):
        assert layer.merge() == MergeOutcome.MERGED
    assert layer.lag < 1e-12
    torch.testing.assert_close(layer.tracked.exact[0] @ layer.tracked.exact[1], torch.eye(N).double())
    layer.double()
    torch.testing.assert_close(layer.A @ layer.A_inv, torch.eye(N).double(), rtol=0, atol=1e-13)


def test_settling_makes_the_matrix_the_weight():
    layer = InvertibleLinear(N, init=matrix(N), rank=1)
    with torch.no_grad():
        layer.weight.add_(0.1 * torch.randn(N, N))
    W = layer.weight.detach().clone()
    layer.settle()
    assert layer.lag == 0
    assert torch.equal(layer.A, W)
    assert torch.equal(layer.weight, W)
    torch.testing.assert_close(layer.A_inv_double, torch.linalg.inv(W.double()), rtol=1e-13, atol=1e-13)
    sign, logabsdet = torch.linalg.slogdet(W.double())
    assert layer.sign == sign
    torch.testing.assert_close(layer.logabsdet, logabsdet)
    layer.merge()
    torch.testing.assert_close(layer.A, W)


def test_set_matrix_and_reset():
    layer, M = InvertibleLinear(N, rank=2), matrix(N)
    layer.set_matrix(M)
    assert torch.equal(layer.weight.double(), M.float().double())
    assert torch.equal(layer.A_double, M)
    torch.testing.assert_close(layer.logabsdet, torch.linalg.slogdet(M).logabsdet)
    with torch.no_grad():
        layer.weight.normal_()
    layer.reset()
    assert torch.equal(layer.weight, layer.A)
    assert torch.equal(layer.A_double, M)
    before = copy.deepcopy(layer.state_dict())
    for wrong in (torch.zeros(N, N), torch.full((N, N), torch.nan), torch.eye(3), torch.eye(N) * 1j, 3.0):
        with pytest.raises(ValueError, match="M: expected"):
            layer.set_matrix(wrong)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("inverse", [False, True])
def test_export_to_a_plain_linear_layer(bias, inverse):
    layer = InvertibleLinear(N, bias=bias, init=matrix(N))
    with torch.no_grad():
        layer.weight.add_(0.1)  # ahead, and not what is exported
        if bias:
            layer.bias.normal_()
    linear = layer.eval().to_linear(inverse)
    assert type(linear) is nn.Linear
    assert not linear.training
    assert not any(p.requires_grad for p in linear.parameters())
    x = torch.randn(5, N)
    torch.testing.assert_close(linear(x), (layer.inverse if inverse else layer)(x)[0], rtol=1e-5, atol=1e-5)


def test_frozen_layers_and_weight_decay():
    layer = InvertibleLinear(N, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.5)
    MergeScheduler(layer, optimizer).attach()
    for _ in range(10):
        layer.weight.grad = torch.zeros_like(layer.weight)
        optimizer.step()
    torch.testing.assert_close(layer.matrix, torch.eye(N) * 0.95**10)
    torch.testing.assert_close(layer.logabsdet.item(), 10 * N * torch.tensor(0.95).log().item())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features": 0}, "features: expected an integer >= 1, got 0"),
        ({"rank": 5}, "rank: expected an integer >= 1 and <= 4, got 5"),
        ({"bias": 1}, "bias: expected True or False"),
        ({"seed": 0.5}, "seed: expected an integer, got 0.5"),
        ({"init": torch.zeros(4, 4)}, "init: .*singular"),
        ({"bounds_update": (1, 0)}, "bounds_update: expected low < high"),
        ({"bounds_det": 3}, "bounds_det: expected a pair"),
        ({"dtype": torch.int64}, "dtype: expected a floating-point type"),
        ({"device": "nowhere"}, "device: expected one that can be used here"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        InvertibleLinear(**{"features": 4, **arguments})


def test_the_default_rank():
    ranks = {n: InvertibleLinear(n).rank for n in (1, 20, 64, 128, 129, 300)}
    assert ranks == {1: 1, 20: 20, 64: 64, 128: 128, 129: 16, 300: 16}


def test_a_state_of_lower_rank_loads_where_the_rank_is_full():
    narrow = advance(parts_of(nn.ModuleList([InvertibleLinear(N, rank=2)])), 5)["model"][0]
    layer = InvertibleLinear(N)
    layer.load_state_dict(narrow.state_dict())
    assert torch.equal(layer.A, narrow.A)
    assert layer.directions is None
    assert layer.merge() == MergeOutcome.MERGED
    assert torch.equal(layer.A, layer.weight)

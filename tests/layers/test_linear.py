"""P4Linear: perturbations of layers that are not square and have no inverse."""

import copy
import math

import pytest
import torch
from torch import nn

from p4flows import AveragedModel, MergeOutcome, MergeScheduler, P4Conv2d, P4Linear, P4Lipschitz

sizes = pytest.mark.parametrize(("n", "m", "rank"), [(7, 3, 1), (3, 7, 2), (5, 5, 5), (1, 4, 1)])


def perturbed(n, m, rank=1, **options):
    layer = P4Linear(n, m, rank, dtype=torch.float64, **options)
    with torch.no_grad():
        layer.U.normal_()
    return layer


@sizes
@pytest.mark.parametrize("bias", [True, False])
def test_is_the_dense_layer(n, m, rank, bias):
    layer = perturbed(n, m, rank, bias=bias)
    x = torch.randn(2, 6, n, dtype=torch.float64, requires_grad=True)
    expected = x @ layer.matrix.T + (layer.bias if bias else 0)
    torch.testing.assert_close(layer(x), expected)
    loss = layer(x).square().sum()
    trained = [x, *(p for p in layer.parameters() if p.requires_grad)]
    assert layer.V.requires_grad == (rank == 1)
    for ours, theirs in zip(
        torch.autograd.grad(loss, trained), torch.autograd.grad(expected.square().sum(), trained), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@sizes
def test_merging_and_resetting(n, m, rank):
    layer = perturbed(n, m, rank, seed=4)
    matrix, V = layer.matrix.detach().clone(), layer.V.detach().clone()
    assert layer.merge() == MergeOutcome.MERGED
    torch.testing.assert_close(layer.A, matrix)
    torch.testing.assert_close(layer.matrix, matrix)
    assert (layer.U == 0).all()
    assert layer.merges == 1
    assert not torch.equal(layer.V, V)
    with torch.no_grad():
        layer.U.normal_()
    layer.reset()
    torch.testing.assert_close(layer.matrix, matrix)
    assert layer.merges == 2
    assert layer.correct() == 0
    assert layer.penalty() == 0


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["U", "V"])
def test_what_is_not_finite_is_not_merged(number, which):
    layer = perturbed(4, 3)
    A = layer.A.clone()
    with torch.no_grad():
        getattr(layer, which)[1] = number
    assert layer.merge() == MergeOutcome.RESET
    assert torch.equal(layer.A, A)
    assert layer.matrix.isfinite().all()


def test_a_merge_that_would_overflow_is_skipped():
    layer = P4Linear(4, 3)
    with torch.no_grad():
        layer.U.fill_(1e38)
    assert layer.merge() == MergeOutcome.SKIPPED
    assert (layer.U == 1e38).all()
    assert layer.A.isfinite().all()


def test_trains_with_the_scheduler_like_a_dense_layer():
    torch.manual_seed(0)
    T = torch.randn(3, 8)
    dense = nn.Linear(8, 3, bias=False)
    layer = P4Linear.from_linear(dense, rank=2, seed=1)
    assert torch.equal(layer.matrix, dense.weight)
    losses = []
    for model, lr in ((dense, 0.1), (layer, 0.1 / 2)):
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        scheduler = MergeScheduler(model, optimizer, every=1) if model is layer else None
        for _ in range(400):
            x = torch.randn(32, 8)
            loss = (model(x) - x @ T.T).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if scheduler:
                scheduler.step()
        losses.append(loss.item())
    assert scheduler.counters["merged"] == 400
    assert losses[0] < 1e-5
    assert losses[1] < 1e-3


def test_copies_and_checkpoints_draw_the_same_perturbations():
    layer = perturbed(5, 3, 2, seed=9)
    loaded = P4Linear(5, 3, 2, dtype=torch.float64)
    loaded.load_state_dict(layer.state_dict())
    for other in (copy.deepcopy(layer), loaded):
        torch.testing.assert_close(other.matrix, layer.matrix, rtol=0, atol=0)
        other.merge()
        other.reset()
    layer.merge()
    layer.reset()
    for tensor, theirs in zip(layer.state_dict().values(), loaded.state_dict().values(), strict=True):
        assert torch.equal(tensor, theirs)


def test_wrong_layer():
    with pytest.raises(ValueError, match=r"layer: expected one that has seen an input, got a new LazyLinear"):
        P4Linear.from_linear(nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"layer: expected an nn.Linear or an nn.Conv2d, got Conv1d"):
        P4Linear.from_linear(nn.Conv1d(1, 1, 1))


GEOMETRIES = [
    {},
    {"stride": 2, "padding": 1},
    {"padding": "same", "dilation": 2},
    {"groups": 2, "bias": False},
    {"padding": (2, 1), "padding_mode": "circular"},
    {"kernel_size": (1, 3), "padding": "valid", "groups": 4},
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("rank", [1, 3])
def test_a_convolution_is_that_of_the_effective_matrix(geometry, rank):
    plain = nn.Conv2d(4, 8, **{"kernel_size": 3, **geometry}, dtype=torch.float64)
    layer = P4Linear.from_linear(plain, rank, seed=2)
    assert isinstance(layer, P4Conv2d)
    x = torch.randn(3, 4, 7, 6, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(layer(x), plain(x))
    with torch.no_grad():
        layer.U.normal_()
        plain.weight.copy_(layer.matrix.view_as(plain.weight))
    torch.testing.assert_close(layer(x), plain(x))
    gradients = torch.autograd.grad(layer(x).square().sum(), [x, layer.U])
    weight = layer.matrix.view_as(plain.weight)
    expected = torch.func.functional_call(plain, {"weight": weight}, (x,)).square().sum()
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, [x, layer.U]), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert layer.merge() == MergeOutcome.MERGED
    torch.testing.assert_close(layer(x), plain(x))


def test_a_convolution_trains():
    torch.manual_seed(0)
    target, layer = nn.Conv2d(2, 4, 3), P4Conv2d(2, 4, 3, rank=2)
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=0.03)
    MergeScheduler(layer, optimizer, every=5).attach()
    for _ in range(400):
        x = torch.randn(8, 2, 6, 6)
        loss = (layer(x) - target(x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1e-3


def test_averages_of_linear_layers_in_half_precision_average_what_the_matrix_is_rounded_from():
    layer = P4Linear(5, 3, dtype=torch.bfloat16)
    averaged = AveragedModel(layer)
    matrices = []
    for _ in range(4):
        with torch.no_grad():
            layer.U.normal_(std=0.01)
        layer.merge()
        averaged.update_parameters(layer)
        matrices.append(layer.A_float.clone())
    torch.testing.assert_close(averaged.module.A_float, torch.stack(matrices).mean(0))
    assert torch.equal(averaged.module.A, averaged.module.A_float.bfloat16())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(5, 4), r"input: expected shape \(..., 3\), got \(5, 4\)"),
        (
            torch.zeros(5, 3, dtype=torch.float64),
            r"input: expected dtype torch.float32 as the layer's, got torch.float",
        ),
        (torch.zeros(5, 3).long(), r"input: expected a floating-point tensor, got one of torch.int64"),
    ],
)
@pytest.mark.parametrize("layer", [P4Linear(3, 2), P4Lipschitz(3, 2)])
def test_wrong_input(layer, wrong, message):
    with pytest.raises(ValueError, match=message):
        layer(wrong)


def test_wrong_images():
    layer = P4Conv2d(2, 4, 3)
    with pytest.raises(ValueError, match=r"input: expected shape \(N, 2, H, W\), got \(5, 3, 8, 8\)"):
        layer(torch.zeros(5, 3, 8, 8))
    assert layer(torch.zeros(2, 8, 8)).shape == (4, 6, 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_channels": 0}, "in_channels: expected an integer >= 1, got 0"),
        ({"kernel_size": (3, 0)}, "kernel_size: expected an integer >= 1, got 0"),
        ({"stride": 0}, "stride: expected an integer >= 1, got 0"),
        ({"stride": True}, "stride: expected an integer >= 1, got True"),
        ({"padding": -1}, "padding: expected an integer >= 0, got -1"),
        ({"padding": "all"}, "padding, dilation, groups, padding_mode: expected what nn.Conv2d takes"),
        ({"groups": 3}, "groups, padding_mode: expected what nn.Conv2d takes"),
    ],
)
def test_wrong_convolutions(arguments, message):
    with pytest.raises(ValueError, match=message):
        P4Conv2d(**{"in_channels": 2, "out_channels": 4, "kernel_size": 3} | arguments)

"""Pairs in float64 are exact, whatever they are rounded to; merges are not made in a matrix too coarse for them."""

import copy
from pathlib import Path

import pytest
import torch
from registry import matrix, perturb, train
from torch import nn

from p4flows import InvertibleLinear, MergeOutcome, MergeScheduler, P4Inv, P4InvStack, P4Linear

DATA = Path(__file__).parent.parent / "data"
LAYERS = {
    "P4Inv": lambda n, **options: P4Inv(n, **options),
    "P4Inv-rank1": lambda n, **options: P4Inv(n, rank=1, **options),
    "InvertibleLinear": lambda n, **options: InvertibleLinear(n, **options),
    "P4InvStack": lambda n, **options: P4InvStack(n, 3, **options),
}
names = pytest.mark.parametrize("name", LAYERS)
inits = pytest.mark.parametrize("init", ["identity", "reverse", "orthogonal", "permutation", "matrix"])
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
halves = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def make(name, n, init, dtype=torch.float32):
    start = {"permutation": torch.arange(n).roll(2), "matrix": torch.eye(n) + 0.1 * matrix(n)}.get(init, init)
    return LAYERS[name](n, init=start, seed=3, dtype=dtype)


def assert_exact(layer, tolerance=1e-13):
    A, A_inv = layer.tracked.exact
    assert (A @ A_inv - torch.eye(A.shape[-1], dtype=torch.float64)).abs().max() <= tolerance
    sign, logabsdet = torch.linalg.slogdet(A)
    assert torch.equal(layer.sign_A, sign)
    torch.testing.assert_close(layer.logabsdet_A - layer.rounding, logabsdet, rtol=0, atol=tolerance)


# --- pairs in float64 ---------------------------------------------------------------------------------------


@names
@inits
@dtypes
def test_the_pair_that_a_layer_starts_from(name, init, dtype):
    """A is what is rounded to the dtype of the layer, and A_inv is its inverse in float64."""
    layer = make(name, 7, init, dtype)
    assert torch.equal(layer.tracked.exact[0], layer.A.double())
    assert_exact(layer)
    if dtype != torch.float64:
        assert_exact(layer.double())
        assert layer.A_double is None
        eye = torch.eye(7, dtype=torch.float64)
        torch.testing.assert_close(layer.A @ layer.A_inv, eye.expand_as(layer.A), rtol=0, atol=1e-13)


@names
@inits
def test_the_pair_after_merges(name, init):
    layer = make(name, 7, init)
    for _ in range(5):
        perturb(layer, 0.02)
        assert (layer.merge() == MergeOutcome.MERGED).all()
        assert_exact(layer)
    for dtype in (torch.float64, torch.float16, torch.float32, torch.bfloat16, torch.float64):
        assert_exact(layer.to(dtype))
        perturb(layer, 0.02)
        layer.merge()
        assert_exact(layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_pair_of_a_state_of_version_1(dtype):
    """Which had no pair in float64: A is what counts, and A_inv is its inverse."""
    state = torch.load(DATA / "version_1.pt", weights_only=True)
    model = nn.ModuleDict({"layer": P4Inv(4, rank=2, dtype=dtype), "stack": P4InvStack(2, 3, dtype=dtype)})
    model.load_state_dict(state["model"])
    for name, layer in model.items():
        A, A_inv = layer.tracked.exact
        assert torch.equal(A, state["model"][f"{name}.A"].double())
        torch.testing.assert_close(A @ A_inv, torch.eye(layer.features).double().expand_as(A), rtol=0, atol=1e-13)
        torch.testing.assert_close(layer.logabsdet_A, torch.linalg.slogdet(A)[1], rtol=0, atol=1e-5)
        layer.double()
        assert torch.equal(layer.A, A)
        assert torch.equal(layer.A_inv, A_inv)


@names
@pytest.mark.parametrize("stored", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("loaded", [torch.float32, torch.float64, torch.bfloat16])
def test_the_pair_survives_a_state_dict_of_another_dtype(name, stored, loaded):
    layer = train(make(name, 7, "orthogonal"), 15).to(stored)
    exact = [T.clone() for T in layer.tracked.exact]
    other = make(name, 7, "identity", loaded)
    other.load_state_dict(layer.state_dict())
    for found, expected in zip(other.tracked.exact, exact, strict=True):
        assert torch.equal(found, expected)


# --- P4Linear in half precision -----------------------------------------------------------------------------


def merge_often(layer, merges, size):
    """Merge U = size in all entries; the sum of what was merged, in float64."""
    total = torch.zeros(layer.A.shape, dtype=torch.float64)
    for _ in range(merges):
        with torch.no_grad():
            layer.U.fill_(size)
        total += layer.U.detach().double() @ layer.V.detach().double().T
        assert layer.merge() == MergeOutcome.MERGED
    return total


@halves
@pytest.mark.parametrize("rank", [1, 4])
def test_many_small_merges_add_up(dtype, rank):
    layer = P4Linear(16, 8, rank, dtype=dtype)
    before = layer.A_float.double()
    assert torch.equal(before.to(dtype), layer.A)
    total = merge_often(layer, 1000, 1e-4)
    assert (layer.A_float.double() - before - total).norm() < 1e-3 * total.norm()
    assert torch.equal(layer.A, layer.A_float.to(dtype))
    assert layer.A_float.dtype == torch.float32


def test_layers_that_are_wide_enough_have_one_matrix():
    for dtype in (torch.float32, torch.float64):
        layer = P4Linear(4, 3, dtype=dtype)
        assert layer.A_float is None
        assert "A_float" not in layer.state_dict()


@halves
def test_conversions_keep_what_the_matrix_is_rounded_from(dtype):
    layer = P4Linear(5, 4, rank=2)
    A = layer.A.clone()
    for convert in (dtype, torch.float16, dtype, torch.bfloat16):
        layer.to(convert)
        assert layer.A.dtype == layer.U.dtype == convert
        assert torch.equal(layer.A_float, A)
        assert torch.equal(layer.A, A.to(convert))
    for convert in (torch.float32, dtype, torch.float64):
        layer.to(convert)
        assert torch.equal((layer.A if layer.A_float is None else layer.A_float).double(), A.double())
    assert layer.A_float is None
    assert layer.A.dtype == torch.float64
    layer.to("meta").to(dtype).to_empty(device="cpu")
    assert layer.A_float.dtype == torch.float32


@halves
@pytest.mark.parametrize("assign", [False, True])
def test_states_of_all_dtypes_load_into_each_other(dtype, assign):
    half, single = P4Linear(5, 4, rank=2, dtype=dtype), P4Linear(5, 4, rank=2)
    merge_often(half, 20, 1e-3)
    A = half.A_float.clone()
    again, wide = copy.deepcopy(half), copy.deepcopy(single)
    merge_often(again, 3, 0.5)
    again.load_state_dict(half.state_dict(), assign=assign)
    wide.load_state_dict(half.state_dict())
    assert torch.equal(again.A_float, A)
    assert torch.equal(wide.A, A)
    half.load_state_dict(single.state_dict())
    assert torch.equal(half.A_float, single.A)
    assert torch.equal(half.A, single.A.to(dtype))
    # A state of version 1, which had A alone.
    old = {name: value for name, value in again.state_dict().items() if name != "A_float"}
    half.load_state_dict(old)
    assert torch.equal(half.A_float, again.A.float())


@halves
def test_a_layer_in_half_precision_is_trained(dtype):
    dense = nn.Linear(8, 3, bias=False)
    layer = P4Linear.from_linear(dense.to(dtype), rank=3, seed=1)
    assert torch.equal(layer.A, dense.weight)
    assert torch.equal(layer.A_float, dense.weight.float())
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.02)
    scheduler = MergeScheduler(layer, optimizer, every=1)
    T = torch.randn(3, 8)
    for _ in range(1500):
        x = torch.randn(64, 8)
        loss = (layer(x.to(dtype)).float() - x @ T.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    assert scheduler.counters["merged"] == 1500
    assert (layer.A_float - T).abs().max() < 0.02


def test_an_overflow_is_that_of_the_dtype():
    layer = P4Linear(4, 3, dtype=torch.float16)
    with torch.no_grad():
        layer.U.fill_(6e4)
    assert layer.merge() == MergeOutcome.SKIPPED
    assert layer.A.isfinite().all()
    assert (layer.U == 6e4).all()

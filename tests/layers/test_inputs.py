"""Inputs that are no tensors, and layers that are made on the meta device or under another default device."""

import copy

import numpy as np
import pytest
import torch
from registry import CASES, LAYERS, apply, invert, perturb, train
from torch import nn

from p4flows import BentIdentity, Inverse, InvertibleLinear, MergeScheduler, P4Inv, P4InvStack, P4Linear

PLAIN = [(name, n) for name, n in CASES if "." not in name]  # of no plug-in, which have checks of their own
names = pytest.mark.parametrize(("name", "n"), PLAIN, ids=[f"{name}-n{n}" for name, n in PLAIN])


# --- what is no tensor --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "last", [BentIdentity, lambda: Inverse(BentIdentity()), lambda: P4Inv(3), lambda: P4InvStack(3, 2)]
)
@pytest.mark.parametrize("first", [P4Inv, InvertibleLinear])
def test_layers_in_a_sequential_say_what_to_do(first, last):
    model = nn.Sequential(first(3), last())
    with pytest.raises(
        ValueError, match=r"input: .*pair of tensors.*torch.nn.Sequential cannot chain them.*P4InvStack"
    ):
        model(torch.randn(2, 3))


def test_plain_linear_layers_can_be_chained():
    model = nn.Sequential(P4Linear(3, 4), nn.ReLU(), P4Linear(4, 2))
    assert model(torch.randn(5, 3)).shape == (5, 2)
    with pytest.raises(ValueError, match=r"input: .*pair of tensors"):
        nn.Sequential(P4Inv(3), P4Linear(3, 3))(torch.randn(2, 3))


@names
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numpy_arrays(name, n, dtype):
    layer = LAYERS[name](n)
    for direction in (layer, layer.inverse):
        with pytest.raises(ValueError, match=r"input: expected a floating-point tensor, got numpy.ndarray; torch.as_t"):
            direction(np.zeros((2, n), dtype=dtype))


@names
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (None, "got NoneType"),
        ([1.0, 2.0], "got list"),
        ((1.0, 2.0), "got tuple"),
        (np.float64(1.0), "got numpy.float64"),
        (torch.zeros(2, 6, dtype=torch.int64), "got one of torch.int64"),
        (torch.zeros(2, 6, dtype=torch.bool), "got one of torch.bool"),
        (torch.zeros(2, 6, dtype=torch.complex64), "got one of torch.complex64"),
    ],
)
def test_other_things(name, n, wrong, message):
    layer = LAYERS[name](n)
    for direction in (layer, layer.inverse):
        with pytest.raises(ValueError, match=f"input: expected a floating-point tensor, {message}"):
            direction(wrong)


# --- other devices ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "n", "way"),
    [(name, n, way) for name, n in CASES for way in ("argument", "context", "default") if n > 1 or way == "argument"],
)
def test_made_on_the_meta_device_and_loaded(name, n, way):
    layer = train(LAYERS[name](n, dtype=torch.float64), 10)
    if way == "argument":
        made = LAYERS[name](n, dtype=torch.float64, device="meta")
    elif way == "context":
        with torch.device("meta"):
            made = LAYERS[name](n, dtype=torch.float64)
    else:
        try:
            torch.set_default_device("meta")
            made = LAYERS[name](n, dtype=torch.float64)
        finally:
            torch.set_default_device(None)
    state = layer.state_dict()
    if "Leaky" not in repr(layer):  # the registry's own, which does not know of devices
        assert (way == "argument" and "Bent" in name) or all(tensor.is_meta for tensor in made.state_dict().values())
    shapes = [out.shape for out in apply(made, torch.empty(3, n, dtype=torch.float64, device="meta"))]
    assert shapes == [(3, n), (3,)]
    made.to_empty(device="cpu").load_state_dict(state)
    x = torch.randn(3, n, dtype=torch.float64)
    for direction in (apply, invert):
        torch.testing.assert_close(direction(made, x), direction(layer, x), rtol=0, atol=0)
    for each in (layer, made):
        torch.manual_seed(1)
        train(each, 10)
    for key, value in layer.state_dict().items():
        assert torch.equal(made.state_dict()[key], value), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_plain_linear_layers_made_on_the_meta_device(dtype):
    layer, made = P4Linear(4, 3, rank=2, dtype=dtype), P4Linear(4, 3, rank=2, dtype=dtype, device="meta")
    assert made(torch.empty(2, 4, device="meta", dtype=dtype)).shape == (2, 3)
    made.to_empty(device="cpu").load_state_dict(layer.state_dict())
    for each in (layer, made):
        torch.nn.init.ones_(each.U)
        each.merge()
    for key, value in layer.state_dict().items():
        assert torch.equal(made.state_dict()[key], value), key


@pytest.mark.parametrize(
    "make",
    [lambda: P4Inv(4, device="cpu"), lambda: InvertibleLinear(4, device="cpu"), lambda: P4InvStack(4, 2, device="cpu")],
)
def test_layers_do_not_care_for_the_default_device(make):
    layer = perturb(make(), 0.01)
    reference = copy.deepcopy(layer)
    schedulers = [
        MergeScheduler(each, torch.optim.SGD(each.parameters(), lr=0.1), every=1) for each in (layer, reference)
    ]
    from p4flows.tracking import correction, following

    for module in (correction, following):
        module._probes.cache_clear()
    x = torch.randn(3, 4)
    with torch.device("meta"):  # where nothing has a value
        schedulers[0].step()
        found = [*layer(x), *layer.inverse(x)]
    schedulers[1].step()
    torch.testing.assert_close(found, [*reference(x), *reference.inverse(x)], rtol=0, atol=0)
    assert schedulers[0].counters["merged"] == schedulers[1].counters["merged"] > 0

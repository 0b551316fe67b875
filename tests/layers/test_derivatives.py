"""Derivatives of every order with whatever is frozen, and of layers that are applied more than once."""

from itertools import chain, combinations

import pytest
import torch
from registry import WideP4InvStack, perturb
from torch.autograd import gradcheck, gradgradcheck

from p4flows import InvertibleLinear, P4Inv, P4InvStack, P4Linear

N = 3
LAYERS = {
    "P4Inv-rank1": lambda: P4Inv(N, rank=1, dtype=torch.float64),
    "P4Inv-rank3": lambda: P4Inv(N, rank=3, dtype=torch.float64),
    "P4Inv-rank2-no-bias": lambda: P4Inv(N, rank=2, bias=False, dtype=torch.float64),
    "InvertibleLinear": lambda: InvertibleLinear(N, init="reverse", dtype=torch.float64),
    "P4InvStack-1": lambda: P4InvStack(N, depth=1, dtype=torch.float64),
    "P4InvStack-1-rank1": lambda: P4InvStack(N, depth=1, rank=1, dtype=torch.float64),
    "P4InvStack-3": lambda: P4InvStack(N, depth=3, rank=2, dtype=torch.float64),
    "P4InvStack-wide": lambda: WideP4InvStack(N, depth=1, rank=1, dtype=torch.float64),
    "P4Linear": lambda: P4Linear(N, 2, rank=2, dtype=torch.float64),
}
names = pytest.mark.parametrize("name", LAYERS)
directions = pytest.mark.parametrize("direction", ["forward", "inverse"])


def make(name):
    layer = perturb(LAYERS[name](), 0.3)
    with torch.no_grad():
        layer.bias.normal_() if layer.bias is not None else None
        layer.U.normal_(std=0.3) if isinstance(layer, P4Linear) else None
    return layer


def function_of(layer, direction):
    if isinstance(layer, P4Linear) and direction == "inverse":
        pytest.skip("has no inverse")
    return getattr(layer, direction)


def loss_of(outputs):
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    return sum((out**3).sum() * weight for weight, out in enumerate(outputs, 1))


@names
@directions
def test_every_subset_of_what_requires_gradients(name, direction):
    layer = make(name)
    function = function_of(layer, direction)
    # The weight of an InvertibleLinear is not what it computes with: see test_dense_gradients.py.
    held = [p for p in layer.parameters() if p is not getattr(layer, "weight", None)]
    x = torch.randn(2, N, dtype=torch.float64)
    everything = [x, *held]
    for trained in chain.from_iterable(combinations(everything, size) for size in range(1, len(everything) + 1)):
        for tensor in (*everything, *layer.parameters()):
            tensor.requires_grad_(any(tensor is t for t in trained))
        assert gradcheck(lambda *_: function(x), trained)
        assert gradgradcheck(lambda *_: function(x), trained, atol=1e-4)


@names
@directions
def test_a_frozen_layer_in_higher_derivatives_of_its_input(name, direction):
    """Gradient penalties, Hessians, forces of second order."""
    layer = make(name)
    function = function_of(layer, direction)
    x = torch.randn(2, N, dtype=torch.float64)
    hessians = []
    for frozen in (False, True):
        layer.requires_grad_(not frozen)
        hessians.append(torch.autograd.functional.hessian(lambda x: loss_of(function(x)), x))
        hessians.append(torch.autograd.functional.hessian(lambda x: loss_of(function(x)), x, create_graph=True))
    for hessian in hessians[1:]:
        torch.testing.assert_close(hessian, hessians[0])
    assert hessians[0].abs().max() > 0
    # The frozen log|det| of a linear layer is a constant, which has no derivative.
    layer.requires_grad_(False)
    y = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(function(y)), y, create_graph=True)
    gradient.square().sum().backward()
    assert y.grad.abs().max() > 0


@names
@directions
def test_a_gradient_does_not_depend_on_whether_it_is_to_be_differentiated(name, direction):
    """Where a layer is applied twice its input depends on its own parameters."""
    if name == "P4Linear":
        pytest.skip("cannot be applied to its own output")
    layer = make(name)
    function = function_of(layer, direction)
    trained = [p for p in layer.parameters() if p.requires_grad]
    x = torch.randn(2, N, dtype=torch.float64)
    y, first = function(x)
    z, second = function(y)
    loss = loss_of((z, first, second))
    once = torch.autograd.grad(loss, trained, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, trained, create_graph=True), once)
    if name != "InvertibleLinear":

        def twice(*_):
            y, first = function(x)
            z, second = function(y)
            return z, first + second

        assert gradcheck(twice, trained)
        assert gradgradcheck(twice, trained, atol=1e-4)

"""torch.compile: outputs and gradients as without it, one graph, and a second one for all sizes of batches.

The backend is ``aot_eager``, which traces the forward and the backward pass as the default one does, and needs no
compiler on the machine.
"""

import pytest
import torch
from registry import LAYERS, OTHER_LAYERS, apply, invert, matrix, perturb
from torch._dynamo.backends.registry import lookup_backend

from p4flows import P4Layer

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # torch's own, tracing a Function

SIZES = (5, 9, 14, 3)  # rows; the compiler always makes a graph of its own for one row
KINDS = (
    *("P4Inv", "P4Inv-rank1", "InvertibleLinear", "InvertibleLinear-rank2", "P4InvStack", "P4InvStack-wide"),
    *("P4InvStack-plain", "P4Orthogonal", "bgflow.P4InvFlow", "bgflow.InvertibleSwap", "normflows.P4InvLinear"),
)
N = 6


class Counting:
    """A backend that counts the graphs which are kept: a compiler may give one up and begin anew."""

    def __init__(self):
        self.graphs, self._backend = 0, lookup_backend("aot_eager")

    def __call__(self, graph, inputs):
        compiled = self._backend(graph, inputs)
        self.graphs += 1
        return compiled


def check(model, function, rows):
    """That a function of a model is the same when it is compiled, over merges, and takes two graphs for all sizes."""
    torch._dynamo.reset()
    counting = Counting()
    compiled = torch.compile(function, fullgraph=True, backend=counting)
    for size in SIZES:
        x = rows(size).requires_grad_()
        wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
        expected, found = function(x), compiled(x)
        torch.testing.assert_close(found, expected)
        parts = [i for i, result in enumerate(expected) if result.requires_grad]
        weights = [torch.randn_like(expected[i]) for i in parts]
        gradients, theirs = (
            torch.autograd.grad([results[i] for i in parts], wanted, weights) for results in (expected, found)
        )
        torch.testing.assert_close(theirs, gradients)
        assert all(gradient.abs().max() > 1e-6 for gradient in gradients)
        for module in model.modules():
            if isinstance(module, P4Layer):
                perturb(module)
                module.merge(force=True)
                perturb(module)
    assert counting.graphs == 2


@pytest.mark.parametrize("direction", [apply, invert])
@pytest.mark.parametrize("name", KINDS)
def test_an_invertible_layer(name, direction):
    if name not in LAYERS:
        pytest.skip(f"{name.partition('.')[0]} is not installed")
    layer = perturb(LAYERS[name](N, dtype=torch.float64))
    check(layer, lambda x: direction(layer, x), lambda size: torch.randn(size, N, dtype=torch.float64))


@pytest.mark.parametrize("shape", [lambda logabsdet: logabsdet[..., None], lambda logabsdet: logabsdet.view(5, 1)])
@pytest.mark.parametrize("name", ["P4Inv", "InvertibleLinear"])
def test_a_log_determinant_of_another_shape_keeps_its_gradient(name, shape):
    layer = perturb(LAYERS[name](N, dtype=torch.float64))
    x = torch.randn(5, N, dtype=torch.float64)
    torch._dynamo.reset()
    for direction in (apply, invert):
        compiled = torch.compile(lambda x, f=direction: shape(f(layer, x)[1]), fullgraph=True, backend="aot_eager")
        parameter = layer.weight if name == "InvertibleLinear" else layer.U
        (found,) = torch.autograd.grad(compiled(x).sum(), parameter)
        (expected,) = torch.autograd.grad(direction(layer, x)[1].sum(), parameter)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", OTHER_LAYERS)
def test_a_layer_without_an_inverse(name):
    make, example = OTHER_LAYERS[name]
    layer = perturb(make().double())
    check(layer, lambda x: (layer(x),), lambda size: torch.randn(size, *example.shape[1:], dtype=torch.float64))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("swap", ["P4InvLinear", "InvertibleLinear"])
def test_a_flow_of_several_couplings(swap, inverse):
    pytest.importorskip("nflows")
    import p4flows.nflows
    from benchmarks.paper.realnvp import real_nvp

    flow = real_nvp(N, 3, hidden=8).double()
    assert p4flows.nflows.replace_permutations(flow, layer=getattr(p4flows.nflows, swap)) == 3
    transform = perturb(flow._transform)
    check(
        transform,
        (lambda x: transform.inverse(x)) if inverse else (lambda x: transform(x)),
        lambda size: torch.randn(size, N, dtype=torch.float64) @ matrix(N),
    )

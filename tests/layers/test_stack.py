"""P4InvStack against the same network from separate layers, and its model dimension."""

import pytest
import torch
from registry import matrix, perturb
from torch import nn

from p4flows import BentIdentity, Inverse, MergeScheduler, P4Inv, P4InvStack

N, DEPTH = 3, 5
directions = pytest.mark.parametrize("inverse", [False, True])


def separate(layers, x, inverse):
    """The network of the stack, layer by layer."""
    bent, total = BentIdentity(), 0
    for i in reversed(range(len(layers))) if inverse else range(len(layers)):
        there = (bent.forward, bent.inverse)
        if inverse:
            x, a = there[1 - i % 2](x)
            x, b = layers[i].inverse(x)
        else:
            x, a = layers[i](x)
            x, b = there[i % 2](x)
        total = total + a + b
    return x, total


def layers(rank=2, dtype=torch.float64, **options):
    made = [P4Inv(N, rank, init=matrix(N, i), seed=100 + i, dtype=dtype, **options) for i in range(DEPTH)]
    return nn.ModuleList(perturb(layer) for layer in made)


def run(stack, x, inverse):
    return stack.inverse(x) if inverse else stack(x)


def loss_of(y, logabsdet):
    return (y.square().sum(-1) / 2 - logabsdet).mean()


@directions
@pytest.mark.parametrize("width", ["narrow", "wide"])
@pytest.mark.parametrize(("rank", "fixed"), [(1, False), (2, True), (2, False)])
def test_values_and_gradients_are_those_of_separate_layers(inverse, width, rank, fixed, monkeypatch):
    if width == "wide":
        monkeypatch.setattr(P4InvStack, "narrow", N - 1)
    ours = layers(rank)
    stack = P4InvStack.from_layers(ours)
    assert stack.V.requires_grad == ours[0].V.requires_grad == (rank == 1)
    for module in (stack, *ours):
        module.V.requires_grad_(not fixed)
    x = torch.randn(2, 4, N, dtype=torch.float64, requires_grad=True)
    expected, found = separate(ours, x, inverse), run(stack, x, inverse)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)
    (gx,) = torch.autograd.grad(loss_of(*found), x, retain_graph=True)
    (expected_gx,) = torch.autograd.grad(loss_of(*expected), x, retain_graph=True)
    torch.testing.assert_close(gx, expected_gx, atol=1e-11, rtol=1e-11)
    loss_of(*found).backward()
    loss_of(*expected).backward()
    for name in ("U", "bias") if fixed else ("U", "V", "bias"):
        gradient = torch.stack([getattr(layer, name).grad for layer in ours])
        torch.testing.assert_close(getattr(stack, name).grad, gradient, atol=1e-11, rtol=1e-11)


@directions
@pytest.mark.parametrize(("optimizer", "lr"), [(torch.optim.SGD, 1e-3), (torch.optim.Adam, 1e-2)])
@pytest.mark.parametrize("rank", [1, 2])
def test_training_with_merges_is_that_of_separate_layers(inverse, optimizer, lr, rank):
    ours = layers(rank)
    stack = P4InvStack.from_layers(ours)
    mixing = matrix(N, 9)
    results = []
    for model, function in ((stack, lambda x: run(stack, x, inverse)), (ours, lambda x: separate(ours, x, inverse))):
        chosen = optimizer(model.parameters(), lr=lr)
        scheduler = MergeScheduler(model, chosen, every=4, force_every=2, correct_every=3)
        torch.manual_seed(5)
        for _ in range(30):
            chosen.zero_grad()
            loss = loss_of(*function(torch.randn(32, N, dtype=torch.float64) @ mixing))
            loss.backward()
            chosen.step()
            scheduler.step()
        results.append(scheduler.counters | {"loss": loss.item()})
    assert results[0].pop("loss") == pytest.approx(results[1].pop("loss"), abs=1e-8)
    assert results[0] == results[1]
    assert results[0]["merged"] + results[0]["forced"] >= 5 * DEPTH
    for mine, layer in zip(stack, ours, strict=True):
        torch.testing.assert_close(mine.matrix, layer.matrix, atol=1e-8, rtol=1e-8)
        torch.testing.assert_close(mine.logabsdet, layer.logabsdet, atol=1e-8, rtol=1e-8)
        assert mine.merges == layer.merges


def test_a_layer_of_a_stack_is_that_layer_and_a_copy():
    ours = layers()
    stack = P4InvStack.from_layers(ours)
    for i, layer in enumerate(ours):
        for name, value in layer.state_dict().items():
            torch.testing.assert_close(stack[i].state_dict()[name], value, rtol=0, atol=0)
        torch.testing.assert_close(stack.inverse_matrix[i], layer.inverse_matrix)
        torch.testing.assert_close(stack.sign[i], layer.sign)
    assert len(list(stack)) == len(stack) == DEPTH
    before = stack.matrix.clone()
    perturb(stack[0], 1.0)
    torch.testing.assert_close(stack.matrix, before, rtol=0, atol=0)
    with pytest.raises(IndexError):
        stack[DEPTH]


@directions
def test_models_side_by_side_are_independent(inverse):
    options = {"rank": 2, "init": "orthogonal", "dtype": torch.float64}
    grid = P4InvStack(N, DEPTH, models=3, seed=4, **options)
    singles = [P4InvStack(N, DEPTH, seed=4 + i, **options) for i in range(3)]
    for i, single in enumerate(singles):
        for name, value in single.state_dict().items():
            torch.testing.assert_close(grid[i].state_dict()[name], value, rtol=0, atol=0)
    perturb(grid)
    singles = [grid[i] for i in range(3)]
    x = torch.randn(3, 2, 7, N, dtype=torch.float64)
    y, logabsdet = run(grid, x, inverse)
    assert y.shape == x.shape
    assert logabsdet.shape == x.shape[:-1]
    grid_loss = sum(loss_of(y[i], logabsdet[i]) for i in range(3))
    grid_loss.backward()
    for i, single in enumerate(singles):
        expected = run(single, x[i], inverse)
        torch.testing.assert_close(y[i], expected[0])
        torch.testing.assert_close(logabsdet[i], expected[1])
        loss_of(*expected).backward()
        torch.testing.assert_close(grid.U.grad[i], single.U.grad)
        torch.testing.assert_close(grid.bias.grad[i], single.bias.grad)
    torch.testing.assert_close(grid[1, 2].matrix, grid.matrix[1, 2])
    assert grid[1].activations[0] is not grid.activations[0]
    assert grid.merge(force=True).shape == (3, DEPTH)
    for i, single in enumerate(singles):
        torch.testing.assert_close(grid.matrix[i], single.matrix)


@pytest.mark.parametrize("rank", [1, 2])
def test_a_broken_model_does_not_touch_its_neighbours(rank):
    grid = perturb(P4InvStack(N, DEPTH, rank, models=2, dtype=torch.float64))
    optimizer = torch.optim.Adam(grid.parameters())
    scheduler = MergeScheduler(grid, optimizer, every=1)
    y, logabsdet = grid(torch.randn(2, 8, N, dtype=torch.float64))
    loss_of(y, logabsdet).backward()
    optimizer.step()
    matrix_before = grid.matrix.detach().clone()
    with torch.no_grad():
        grid.U[1, 2, 0] = float("nan")
    scheduler.step()
    assert scheduler.counters["resets"] == 1
    assert scheduler.counters["merged"] + scheduler.counters["skipped"] == 2 * DEPTH - 1
    torch.testing.assert_close(grid.matrix[0], matrix_before[0])
    assert all(t.isfinite().all() for t in grid.state_dict().values())
    # V, which is drawn anew, starts from nothing; where it is not trained it has no state.
    assert not any(t.any() for t in optimizer.state.get(grid.V, {}).values())
    assert (grid.V in optimizer.state) == (rank == 1)


@directions
@pytest.mark.parametrize("rank", [1, 2])
def test_derivatives_of_the_gradient(inverse, rank):
    stack = perturb(P4InvStack(2, 3, rank, dtype=torch.float64))
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    trained = [p for p in stack.parameters() if p.requires_grad]
    assert torch.autograd.gradgradcheck(lambda x, *_: run(stack, x, inverse), (x, *trained))


def test_a_cycle_of_other_bijections():
    bent = BentIdentity()
    cycle = [bent, bent, Inverse(Inverse(Inverse(bent)))]
    stack = perturb(P4InvStack(N, 7, activations=cycle, dtype=torch.float64))
    x = torch.randn(4, N, dtype=torch.float64)
    y, logabsdet = stack(x)
    expected, total = x, 0
    for i, layer in enumerate(stack):
        expected, a = layer(expected)
        expected, b = cycle[i % 3](expected)
        total = total + a + b
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(logabsdet, total)
    back, inverse_logabsdet = stack.inverse(y)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(inverse_logabsdet, -logabsdet)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "depth"),
        ({"models": 0}, "models"),
        ({"activations": []}, "activations"),
        ({"activations": [nn.Tanh()]}, "activations"),
        ({"init": "nothing"}, "init"),
        ({"rank": 4}, "rank"),
        ({"dtype": torch.int32}, "dtype"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        P4InvStack(N, **{"depth": DEPTH, **options})


def test_wrong_layers_and_input():
    with pytest.raises(ValueError, match="equal width"):
        P4InvStack.from_layers([P4Inv(2), P4Inv(3)])
    with pytest.raises(ValueError, match="expected P4Inv"):
        P4InvStack.from_layers([])
    with pytest.raises(ValueError, match=r"\(2, \.\.\., 3\)"):
        P4InvStack(N, DEPTH, models=2)(torch.zeros(4, N))
    with pytest.raises(ValueError, match="index"):
        P4InvStack(N, DEPTH)[0, 1]

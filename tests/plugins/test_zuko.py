import copy

import pytest
import torch
from registry import PERMUTATION, N, matrix, perturb
from torch import nn

zuko = pytest.importorskip("zuko", reason="zuko is not installed (pip install 'p4flows[zuko]')")

from zuko.lazy import Flow, UnconditionalDistribution, UnconditionalTransform  # noqa: E402
from zuko.transforms import LULinearTransform, PermutationTransform, RotationTransform  # noqa: E402

import p4flows  # noqa: E402
from p4flows import MergeScheduler  # noqa: E402
from p4flows.zuko import InvertibleLinear, P4InvLinear, insert_linear, replace_permutations  # noqa: E402

LAYERS = [P4InvLinear, InvertibleLinear]


def base():
    return UnconditionalDistribution(zuko.distributions.DiagNormal, torch.zeros(N), torch.ones(N), buffer=True)


def lazy(kind):
    if kind == "permutation":
        return UnconditionalTransform(PermutationTransform, PERMUTATION, buffer=True)
    if kind == "rotation":
        return UnconditionalTransform(RotationTransform, A=torch.randn(N, N))
    return UnconditionalTransform(LULinearTransform, 0.2 * torch.randn(N, N) + torch.eye(N))


def coupling(context=0):
    return zuko.flows.coupling.GeneralCouplingTransform(N, context, torch.arange(N) < 3, hidden_features=(8,))


def outputs(flow, c=None):
    x = torch.randn(20, N, generator=torch.Generator().manual_seed(5))
    distribution = flow(c)
    torch.manual_seed(6)
    samples = distribution.rsample_and_log_prob((20,) if c is None else ())
    return distribution.log_prob(x), distribution.transform(x), *samples


def train(flow, steps=60):
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    scheduler = MergeScheduler(flow, optimizer).attach()
    data = torch.randn(256, N) @ matrix(N).float()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = -flow().log_prob(data).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, scheduler


@pytest.mark.parametrize("cls", LAYERS)
def test_a_lazy_transform_has_both_directions(cls):
    lazy = perturb(cls(N, init=matrix(N), dtype=torch.float64))
    assert isinstance(lazy, zuko.lazy.LazyTransform)
    transform = lazy(torch.randn(3))
    assert transform.bijective
    assert transform.domain is transform.codomain is torch.distributions.constraints.real_vector
    x = torch.randn(2, 5, N, dtype=torch.float64)
    y, ladj = transform.call_and_ladj(x)
    back, inverse_ladj = transform.inv.call_and_ladj(y)
    assert ladj.shape == inverse_ladj.shape == (2, 5)
    torch.testing.assert_close(back, x, atol=1e-10, rtol=0)
    for direction, at, other, found in ((transform, x, y, ladj), (transform.inv, y, x, inverse_ladj)):
        jacobian = torch.autograd.functional.jacobian(direction, at[0, 0])
        torch.testing.assert_close(found, torch.linalg.slogdet(jacobian)[1].expand(2, 5), atol=1e-10, rtol=0)
        torch.testing.assert_close(direction(at), other, atol=1e-10, rtol=0)
        assert torch.equal(direction.log_abs_det_jacobian(at, other), found)
    assert torch.equal(lazy.inv()(y), back)
    assert torch.equal(transform.inv.inv(x), y)
    twin = cls(N, seed=4, dtype=torch.float64)
    twin.load_state_dict(lazy.state_dict())
    assert torch.equal(twin()(x), y)
    assert torch.equal(copy.deepcopy(lazy)()(x), y)


@pytest.mark.parametrize("cls", LAYERS)
def test_it_is_a_transform_for_torch_too(cls):
    """With a base and other transforms of torch.distributions."""
    lazy = perturb(cls(N))
    normal = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(N), torch.ones(N)), 1)
    transforms = [lazy().inv, torch.distributions.ExpTransform()]
    distribution = torch.distributions.TransformedDistribution(normal, transforms)
    x = distribution.rsample((7,))
    expected = normal.log_prob(lazy()(x.log())) + lazy.layer.logabsdet - x.log().sum(-1)
    torch.testing.assert_close(distribution.log_prob(x), expected.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cls", LAYERS)
def test_a_flow_of_layers_learns(cls):
    flow = Flow([coupling(), cls(N, init="reverse"), coupling(), cls(N, init="reverse", seed=1)], base())
    losses, scheduler = train(flow)
    assert scheduler.steps == 60
    assert scheduler.counters["merged"] == 2 * 60 // cls.make.merge_every
    assert losses[-1] < losses[0] - 0.5
    x, log_prob = flow().rsample_and_log_prob((30,))
    torch.testing.assert_close(flow().log_prob(x), log_prob, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(flow().transform.inv(flow().transform(x)), x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layer", [*LAYERS, p4flows.P4Inv, p4flows.InvertibleLinear])
@pytest.mark.parametrize("kind", ["permutation", "rotation", "LU"])
def test_replacing_keeps_the_function_and_then_learns(kind, layer):
    nested = zuko.lazy.LazyComposedTransform(coupling(), lazy(kind)).inv
    flow = Flow([coupling(), lazy(kind), nested], base())
    expected = outputs(flow)
    assert replace_permutations(flow, layer=layer, linear=kind != "permutation") == 2
    made = [module for module in flow.modules() if isinstance(module, (P4InvLinear, InvertibleLinear))]
    assert [isinstance(module, layer) or isinstance(module.layer, layer) for module in made] == [True, True]
    for new, old in zip(outputs(flow), expected, strict=True):
        torch.testing.assert_close(new, old, atol=1e-4, rtol=1e-4)
    losses, _ = train(flow, 30)
    assert losses[-1] < losses[0]


def test_the_rotations_of_gaussianization():
    flow = zuko.flows.GF(N, transforms=3)
    expected = outputs(flow)[:2]
    with pytest.warns(UserWarning, match="nothing to replace; linear=True replaces LU and rotations"):
        assert replace_permutations(flow) == 0
    assert replace_permutations(flow, linear=True) == 2
    for new, old in zip(outputs(flow)[:2], expected, strict=True):
        torch.testing.assert_close(new, old, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("make", [zuko.flows.MAF, zuko.flows.NSF, zuko.flows.RealNVP, zuko.flows.SOSPF])
def test_layers_are_put_between_autoregressive_transforms(make, layer):
    flow = make(N, 2, transforms=3, hidden_features=(8,))
    c = torch.randn(20, 2)
    expected = outputs(flow, c)
    with pytest.warns(UserWarning, match="insert_linear puts layers between autoregressive transforms"):
        assert replace_permutations(flow) == 0
    assert insert_linear(flow, layer=layer, seed=4) == 2
    transforms = list(flow.transform.transforms)
    behind = [i for i, transform in enumerate(transforms) if type(transform) is layer]
    assert behind == ([1, 4] if make is zuko.flows.SOSPF else [1, 3])  # which has another transform in between
    for new, old in zip(outputs(flow, c), expected, strict=True):
        torch.testing.assert_close(new, old, atol=1e-4, rtol=1e-4)
    with pytest.warns(UserWarning, match="no place between two autoregressive or coupling transforms"):
        assert insert_linear(flow) == 0


def test_inserted_layers_learn():
    flow = zuko.flows.MAF(N, transforms=3, hidden_features=(8,))
    insert_linear(flow, rank=99)
    losses, scheduler = train(flow)
    assert losses[-1] < losses[0] - 0.5
    assert scheduler.counters["merged"] == 2 * 6
    assert {module.layer.rank for module in flow.modules() if isinstance(module, P4InvLinear)} == {N}


def test_shared_dtype_mode_seed_and_options():
    shared = lazy("permutation")
    flow = Flow([coupling(), shared, coupling(), shared, coupling(), coupling(), lazy("permutation")], base())
    flow = flow.double().eval()
    assert replace_permutations(flow, rank=99, seed=40, bias=False) == 2
    assert insert_linear(flow, rank=99, seed=50, bias=False) == 1
    transforms = flow.transform.transforms
    assert transforms[1] is transforms[3]
    layers = [transforms[i].layer for i in (1, 5, 7)]
    assert [int(layer.seed) for layer in layers] == [40, 50, 41]
    assert all(layer.bias is None and layer.rank == N and not layer.training for layer in layers)
    assert {layer.A.dtype for layer in layers} == {torch.float64}


@pytest.mark.parametrize("call", [replace_permutations, insert_linear])
def test_an_error_leaves_the_flow_as_it_was(call):
    flow = Flow([coupling(), lazy("permutation"), coupling(), coupling()], base())
    modules = list(flow.modules())
    with pytest.raises(TypeError, match="unknown"):
        call(flow, unknown=1)
    with pytest.raises(ValueError, match="layer: expected P4InvLinear or InvertibleLinear"):
        call(flow, layer=nn.Linear)
    with pytest.raises(ValueError, match="rank"):
        call(flow, rank=0)
    with pytest.raises(ValueError, match="flow: expected a zuko flow, got a UnconditionalTransform itself"):
        call(lazy("permutation"))
    with pytest.raises(ValueError, match="flow: expected a zuko flow, got 'flow'"):
        call("flow")
    assert list(flow.modules()) == modules


def test_circular_splines_are_a_warning():
    flow = zuko.flows.NCSF(N, transforms=2, hidden_features=(8,))
    with pytest.warns(UserWarning, match="circular splines act on a torus"):
        assert insert_linear(flow) == 1


@pytest.mark.filterwarnings("ignore")  # sbi's own
def test_an_estimator_of_sbi():
    nets = pytest.importorskip("sbi.neural_nets", reason="sbi is not installed (pip install 'p4flows[sbi]')")
    theta, x = torch.randn(50, N), torch.randn(50, 2)
    estimator = nets.posterior_nn("zuko_nsf", num_transforms=3)(theta, x)
    expected = estimator.log_prob(theta[None], x)
    assert insert_linear(estimator, layer=InvertibleLinear) == 2
    torch.testing.assert_close(estimator.log_prob(theta[None], x), expected, atol=1e-4, rtol=1e-4)

import copy

import pytest
import torch
from registry import N, matrix, perturb
from torch import nn

nf = pytest.importorskip("normflows", reason="normflows is not installed (pip install 'p4flows[normflows]')")

import p4flows  # noqa: E402
from p4flows import MergeScheduler  # noqa: E402
from p4flows.normflows import InvertibleLinear, P4InvLinear, replace_permutations  # noqa: E402

LAYERS = [P4InvLinear, InvertibleLinear]


def coupling():
    return nf.flows.AffineCouplingBlock(nf.nets.MLP([N // 2, 8, N], init_zeros=False))


def spline(**options):
    return nf.flows.CoupledRationalQuadraticSpline(N, 1, 8, **options)


def model(*mixing, between=coupling, cls=nf.NormalizingFlow):
    flows = [flow for mix in mixing for flow in (between(), mix)]
    return cls(nf.distributions.DiagGaussian(N, trainable=False), flows)


def lu_permute():
    layer = nf.flows.LULinearPermute(N, identity_init=False)
    with torch.no_grad():
        layer.linear.bias.normal_()
    return layer


def outputs(flow):
    x = torch.randn(20, N, generator=torch.Generator().manual_seed(5))
    z, inverse_logabsdet = flow.inverse_and_log_det(x)
    back, logabsdet = flow.forward_and_log_det(z.detach())
    return flow.log_prob(x), z, inverse_logabsdet, back, logabsdet


def train(flow, steps=60):
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    scheduler = MergeScheduler(flow, optimizer).attach()
    data = torch.randn(256, N) @ matrix(N).float()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = flow.forward_kld(data)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, scheduler


@pytest.mark.parametrize("cls", LAYERS)
def test_a_layer_is_a_flow_with_both_directions(cls):
    layer = perturb(cls(N, init=matrix(N), dtype=torch.float64))
    assert isinstance(layer, nf.flows.Flow)
    z = torch.randn(5, N, dtype=torch.float64)
    x, logabsdet = layer(z)
    back, inverse_logabsdet = layer.inverse(x, context=torch.randn(5, 2))
    assert logabsdet.shape == inverse_logabsdet.shape == (5,)
    torch.testing.assert_close(back, z, atol=1e-10, rtol=0)
    for direction, at, found in ((layer, z, logabsdet), (layer.inverse, x, inverse_logabsdet)):
        jacobian = torch.autograd.functional.jacobian(lambda at, direction=direction: direction(at[None])[0][0], at[0])
        expected = torch.linalg.slogdet(jacobian)[1]
        torch.testing.assert_close(found, expected.expand(5), atol=1e-10, rtol=0)
    twin = cls(N, seed=4, dtype=torch.float64)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(z)[0], x)
    assert torch.equal(copy.deepcopy(layer)(z)[0], x)
    with pytest.raises(ValueError, match=r"inputs: expected shape \(N, features\), got \(5, 6, 2, 2\)"):
        layer(torch.randn(5, N, 2, 2))


@pytest.mark.parametrize("cls", LAYERS)
def test_a_model_of_layers_learns(cls):
    flow = model(cls(N, init="reverse"), cls(N, init="reverse", seed=1))
    losses, scheduler = train(flow)
    assert scheduler.steps == 60
    assert scheduler.counters["merged"] == 2 * 60 // cls.merge_every
    assert losses[-1] < losses[0] - 0.5
    x = torch.randn(20, N)
    torch.testing.assert_close(flow.forward(flow.inverse(x)), x, atol=1e-4, rtol=0)
    samples, log_q = flow.sample(30)
    torch.testing.assert_close(flow.log_prob(samples), log_q, atol=1e-3, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:torch.lu is deprecated")
@pytest.mark.parametrize("layer", [*LAYERS, p4flows.P4Inv, p4flows.InvertibleLinear])
@pytest.mark.parametrize("kind", ["shuffle", "swap", "LU", "affine", "affine by LU"])
def test_replacing_keeps_the_function_and_then_learns(kind, layer):
    make = {
        "shuffle": lambda: nf.flows.Permute(N, mode="shuffle"),
        "swap": lambda: nf.flows.Permute(N, mode="swap"),
        "LU": lu_permute,
        "affine": lambda: nf.flows.InvertibleAffine(N, use_lu=False),
        "affine by LU": lambda: nf.flows.InvertibleAffine(N, use_lu=True),
    }[kind]
    flow = model(make(), make())
    expected = outputs(flow)
    assert replace_permutations(flow, layer=layer, linear="affine" in kind, seed=3) == 2
    made = [module for module in flow.modules() if isinstance(module, layer)]
    assert all(isinstance(module, (P4InvLinear, InvertibleLinear)) for module in made)
    assert len(made) == 2
    for new, old in zip(outputs(flow), expected, strict=True):
        torch.testing.assert_close(new, old, atol=1e-4, rtol=1e-4)
    losses, _ = train(flow, 30)
    assert losses[-1] < losses[0]


def test_a_swap_of_an_odd_number_of_channels():
    flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(5), [nf.flows.Permute(5, mode="swap")])
    z = torch.randn(3, 5)
    expected = flow.forward(z)
    assert replace_permutations(flow) == 1
    assert torch.equal(flow.forward(z), expected)


class Conditional(nn.Module):
    """A base distribution with a context, which normflows leaves to its users."""

    def log_prob(self, z, context):
        return -(z - context.sum(-1, keepdim=True)).square().sum(-1) / 2


def test_nested_shared_and_conditional():
    shared = nf.flows.Permute(N)
    nested = nf.flows.Composite([nf.flows.Reverse(lu_permute()), shared])
    flow = model(shared, nested)
    x = torch.randn(4, N)
    expected = flow.log_prob(x)
    assert replace_permutations(flow, rank=2) == 2
    assert flow.flows[1] is flow.flows[3]._flows[1]
    assert flow.flows[1].rank == 2
    torch.testing.assert_close(flow.log_prob(x), expected, atol=1e-4, rtol=1e-4)

    flow = nf.ConditionalNormalizingFlow(Conditional(), [nf.flows.Permute(N)])
    context = torch.randn(4, 2)
    expected = flow.log_prob(x, context)
    assert replace_permutations(flow) == 1
    torch.testing.assert_close(flow.log_prob(x, context), expected)


def test_dtype_mode_seed_and_options_are_passed_on():
    flow = model(nf.flows.Permute(N), nf.flows.Permute(N)).double().eval()
    replace_permutations(flow, rank=99, seed=40, bias=False)
    layers = [module for module in flow.modules() if isinstance(module, P4InvLinear)]
    assert [int(layer.seed) for layer in layers] == [40, 41]
    assert all(layer.bias is None and layer.rank == N and not layer.training for layer in layers)
    assert {layer.A.dtype for layer in layers} == {torch.float64}


def test_an_error_leaves_the_model_as_it_was():
    flow = model(nf.flows.Permute(N), lu_permute())
    modules = list(flow.modules())
    with pytest.raises(ValueError, match="bias: expected True, since a LULinearPermute has a bias"):
        replace_permutations(flow, bias=False)
    assert list(flow.modules()) == modules
    with pytest.raises(ValueError, match="layer: expected P4InvLinear or InvertibleLinear"):
        replace_permutations(flow, layer=nn.Linear)
    with pytest.raises(ValueError, match="rank"):
        replace_permutations(flow, rank=0)
    with pytest.raises(ValueError, match="model: expected a normflows model that contains permutations, got a Permute"):
        replace_permutations(nf.flows.Permute(N))
    with pytest.raises(ValueError, match="model: expected a normflows model that contains permutations, got 'model'"):
        replace_permutations("model")


def test_what_is_left_alone_is_a_warning():
    flow = model(nf.flows.Invertible1x1Conv(N))
    with pytest.warns(UserWarning, match="image channels: Invertible1x1Conv$|nothing to replace$") as records:
        assert replace_permutations(flow) == 0
    assert len(records) == 2
    base = [nf.distributions.DiagGaussian((4, 2, 2))]
    images = nf.MultiscaleFlow(base, [[nf.flows.Permute(4)]], [])
    with pytest.warns(UserWarning, match="image channels: Permute$|nothing to replace$") as records:
        assert replace_permutations(images) == 0
    assert len(records) == 2


@pytest.mark.parametrize("between", [lambda: spline(tails=None), lambda: spline(tails="circular"), "circular"])
def test_bounded_and_circular_splines_are_a_warning(between):
    if between == "circular":
        between = lambda: nf.flows.CircularCoupledRationalQuadraticSpline(N, 1, 8, ind_circ=[1])  # noqa: E731
    with pytest.warns(UserWarning, match="bounded or circular splines"):
        assert replace_permutations(model(nf.flows.Permute(N), between=between)) == 1


def test_splines_with_tails_are_none():
    assert replace_permutations(model(lu_permute(), between=spline)) == 1

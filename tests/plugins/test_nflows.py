import copy
import importlib
import shutil
import sys
from pathlib import Path

import pytest
import torch
from registry import PERMUTATION, N, matrix, perturb
from torch import nn

pytest.importorskip("nflows")

import nflows
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from nflows.transforms import (
    AffineCouplingTransform,
    CompositeCDFTransform,
    CompositeTransform,
    InverseTransform,
    LULinear,
    MaskedPiecewiseCubicAutoregressiveTransform,
    MultiscaleCompositeTransform,
    NaiveLinear,
    OneByOneConvolution,
    Permutation,
    PiecewiseQuadraticCouplingTransform,
    PiecewiseRationalQuadraticCDF,
    PiecewiseRationalQuadraticCouplingTransform,
    QRLinear,
    RandomPermutation,
    ReversePermutation,
    Sigmoid,
    SqueezeTransform,
    SVDLinear,
)
from nflows.utils import create_mid_split_binary_mask

import p4flows
from p4flows import MergeScheduler
from p4flows.nflows import InvertibleLinear, P4InvLinear, P4OrthogonalLinear, replace_permutations


class Net(nn.Sequential):
    def __init__(self, inputs, outputs):
        super().__init__(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs))

    def forward(self, x, context=None):
        return super().forward(x)


def coupling():
    return AffineCouplingTransform(create_mid_split_binary_mask(N), Net)


def real_nvp():
    """Permutations of all three kinds, at the top, inside an inverse, inside a composite inside an inverse."""
    return Flow(
        CompositeTransform(
            [
                coupling(),
                ReversePermutation(N),
                InverseTransform(coupling()),
                InverseTransform(RandomPermutation(N)),
                CompositeTransform([coupling(), InverseTransform(CompositeTransform([Permutation(PERMUTATION)]))]),
                coupling(),
            ]
        ),
        StandardNormal([N]),
    )


def outputs(flow):
    x = torch.randn(20, N, generator=torch.Generator().manual_seed(5))
    torch.manual_seed(6)
    return flow.log_prob(x), flow.sample(20)


def train(flow, steps=60, **options):
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    scheduler = MergeScheduler(flow, optimizer, **options).attach()
    data = torch.randn(256, N) @ matrix(N).float()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = -flow.log_prob(data).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, scheduler


@pytest.mark.parametrize("rank", [1, 4])
def test_the_flow_computes_the_same_before_the_first_step_and_learns_after_it(rank):
    flow = real_nvp()
    log_prob, samples = outputs(flow)
    assert replace_permutations(flow, rank=rank) == 3
    assert sum(isinstance(m, P4InvLinear) for m in flow.modules()) == 3
    assert not any(isinstance(m, Permutation) for m in flow.modules())
    for new, old in zip(outputs(flow), (log_prob, samples), strict=True):
        torch.testing.assert_close(new, old, atol=1e-5, rtol=0)
    losses, scheduler = train(flow)
    assert scheduler.counters["merged"] == 18
    assert losses[-1] < losses[0] - 0.5
    x = torch.randn(20, N)
    z = flow.transform_to_noise(x)
    back, _ = flow._transform.inverse(z)
    torch.testing.assert_close(back, x, atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore:torch.qr is deprecated")
@pytest.mark.parametrize("cls", [LULinear, QRLinear, SVDLinear, NaiveLinear])
def test_linear_layers_are_replaced_on_request(cls):
    old = cls(N, num_householder=4) if cls in (QRLinear, SVDLinear) else cls(N)
    with torch.no_grad():
        for parameter in old.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    flow = Flow(CompositeTransform([old, InverseTransform(ReversePermutation(N))]), StandardNormal([N]))
    assert replace_permutations(copy.deepcopy(flow)) == 1
    x = torch.randn(20, N)
    log_prob = flow.log_prob(x)
    assert replace_permutations(flow, linear=True, rank=2) == 2
    torch.testing.assert_close(flow.log_prob(x), log_prob, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="bias"):
        replace_permutations(
            CompositeTransform([cls(N, **({"num_householder": 4} if cls in (QRLinear, SVDLinear) else {}))]),
            linear=True,
            bias=False,
        )


def test_a_transform_that_is_used_twice_stays_shared():
    shared = ReversePermutation(N)
    transform = CompositeTransform([shared, coupling(), shared])
    assert replace_permutations(transform) == 1
    assert transform._transforms[0] is transform._transforms[2]


def test_seeds_modes_dtypes_and_options_are_passed_on():
    flow = real_nvp().double().eval()
    replace_permutations(flow, rank=99, seed=40, bias=False, bounds_det=(None, 3.0))
    layers = [m for m in flow.modules() if isinstance(m, P4InvLinear)]
    assert [int(layer.seed) for layer in layers] == [40, 41, 42]
    for layer in layers:
        assert layer.rank == N
        assert layer.bias is None
        assert layer.A.dtype == torch.float64
        assert layer.bounds_det == (None, 3.0)
        assert not layer.training


def images():
    multiscale = MultiscaleCompositeTransform(2)
    shape = multiscale.add_transform(CompositeTransform([ReversePermutation(4), OneByOneConvolution(4)]), (4, 2, 2))
    multiscale.add_transform(ReversePermutation(2), shape)
    return CompositeTransform([SqueezeTransform(), multiscale])


def test_image_channels_are_left_alone_with_a_warning():
    transform = images()
    with pytest.warns(UserWarning, match="image|nothing") as records:
        assert replace_permutations(transform, linear=True) == 0
    messages = [str(record.message) for record in records]
    assert (
        "left alone, as they act on image channels: ReversePermutation, OneByOneConvolution, ReversePermutation"
        in messages
    )
    assert "replace_permutations found nothing to replace" in messages
    transform(torch.randn(3, 1, 4, 4))


def test_multiscale_transforms_of_vectors_are_entered():
    multiscale = MultiscaleCompositeTransform(2)
    shape = multiscale.add_transform(ReversePermutation(N), (N,))
    multiscale.add_transform(CompositeTransform([ReversePermutation(*shape)]), shape)
    x = torch.randn(5, N)
    expected = multiscale(x)[0]
    assert replace_permutations(multiscale) == 2
    torch.testing.assert_close(multiscale(x)[0], expected, atol=1e-6, rtol=0)


def test_an_example_tells_vectors_from_images_where_the_structure_does_not():
    class Flatten(nn.Module):
        def forward(self, x, context=None):
            return x.flatten(1), x.new_zeros(len(x))

    transform = CompositeTransform([ReversePermutation(2), Flatten(), InverseTransform(ReversePermutation(6))])
    with pytest.warns(UserWarning, match="left alone"):
        assert replace_permutations(transform, example=torch.randn(4, 2, 3)) == 1
    assert isinstance(transform._transforms[0], ReversePermutation)
    assert isinstance(transform._transforms[2]._transform, P4InvLinear)
    assert "forward" not in vars(transform._transforms[0])


def test_nothing_to_replace_is_a_warning_and_a_bare_layer_an_error():
    with pytest.warns(UserWarning, match="nothing to replace"):
        assert replace_permutations(CompositeTransform([coupling()])) == 0
    with pytest.raises(ValueError, match="wrap it in a CompositeTransform"):
        replace_permutations(ReversePermutation(N))
    with pytest.raises(ValueError, match="flow_or_transform"):
        replace_permutations("flow")
    with pytest.raises(ValueError, match="rank"):
        replace_permutations(real_nvp(), rank=0)


def test_inputs_other_than_rows_are_an_error_and_context_is_ignored():
    layer = P4InvLinear(3)
    with pytest.raises(ValueError, match=r"expected shape \(N, features\), got \(2, 4, 3\)"):
        layer(torch.randn(2, 4, 3))
    with pytest.raises(ValueError, match=r"expected shape \(N, features\)"):
        layer.inverse(torch.randn(3))
    x = torch.randn(2, 3)
    assert torch.equal(layer(x, context=torch.randn(2, 9))[0], layer(x)[0])


# --- all or nothing ---------------------------------------------------------------------------------------------------


def test_an_error_leaves_the_flow_as_it_was():
    transform = CompositeTransform([ReversePermutation(N), InverseTransform(Permutation(PERMUTATION)), LULinear(N)])
    flow = Flow(transform, StandardNormal([N]))
    modules = list(flow.modules())
    with pytest.raises(ValueError, match="bias: expected True, since a LULinear has a bias"):
        replace_permutations(flow, linear=True, bias=False)
    assert list(flow.modules()) == modules
    with pytest.raises(TypeError, match="unknown"):
        replace_permutations(flow, linear=True, unknown=1)
    with pytest.raises(
        ValueError, match=r"layer: expected P4InvLinear or InvertibleLinear or P4OrthogonalLinear, got <.*\.Linear"
    ):
        replace_permutations(flow, layer=nn.Linear)
    assert list(flow.modules()) == modules


@pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated")
@pytest.mark.parametrize("layer", [InvertibleLinear, p4flows.InvertibleLinear, p4flows.P4Inv])
def test_the_layer_is_chosen(layer):
    flow = Flow(CompositeTransform([coupling(), ReversePermutation(N), coupling(), LULinear(N)]), StandardNormal([N]))
    expected = outputs(flow)
    assert replace_permutations(flow, layer=layer, linear=True) == 2
    made = [module for module in flow.modules() if isinstance(module, layer)]
    assert len(made) == 2
    assert all(type(module) in (InvertibleLinear, P4InvLinear) for module in made)
    for new, old in zip(outputs(flow), expected, strict=True):
        torch.testing.assert_close(new, old, atol=1e-5, rtol=0)
    losses, scheduler = train(flow)
    assert losses[-1] < losses[0] - 0.5
    assert scheduler.steps == 60


@pytest.mark.parametrize("layer", [P4OrthogonalLinear, p4flows.P4Orthogonal])
def test_orthogonal_layers_preserve_volume_as_permutations_do(layer):
    flow = real_nvp()
    expected = outputs(flow)
    assert replace_permutations(flow, layer=layer) == 3
    for new, old in zip(outputs(flow), expected, strict=True):
        torch.testing.assert_close(new, old, atol=1e-5, rtol=0)
    losses, scheduler = train(flow)
    assert losses[-1] < losses[0] - 0.3
    assert scheduler.counters["merged"] == 18
    mixes = [module for module in flow.modules() if isinstance(module, P4OrthogonalLinear)]
    assert len(mixes) == 3
    for mix in mixes:
        perturb(mix)
        x = torch.randn(20, N)
        y, logabsdet = mix(x)
        assert logabsdet.shape == (20,)
        assert (logabsdet == 0).all()
        torch.testing.assert_close((y - mix.bias).norm(dim=-1), x.norm(dim=-1))


@pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated")
def test_an_orthogonal_layer_cannot_take_the_place_of_one_that_is_not():
    flow = Flow(CompositeTransform([ReversePermutation(N), LULinear(N)]), StandardNormal([N]))
    modules = list(flow.modules())
    with torch.no_grad():
        flow._transform._transforms[1].unconstrained_upper_diag.add_(1)
    with pytest.raises(ValueError, match="init: expected an orthogonal matrix"):
        replace_permutations(flow, layer=P4OrthogonalLinear, linear=True)
    assert list(flow.modules()) == modules


# --- copies of nflows -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """A library that carries a copy of nflows' classes, as glasflow does."""
    folder = tmp_path_factory.mktemp("copy")
    target = folder / "copy_of_nflows"
    shutil.copytree(Path(nflows.__file__).parent, target, ignore=shutil.ignore_patterns("__pycache__"))
    for file in target.rglob("*.py"):
        file.write_text(file.read_text().replace("nflows", "copy_of_nflows"))
    sys.path.insert(0, str(folder))
    yield importlib.import_module("copy_of_nflows.transforms")
    sys.path.remove(str(folder))
    for name in [name for name in sys.modules if name.startswith("copy_of_nflows")]:
        del sys.modules[name]


@pytest.mark.filterwarnings("ignore:torch.qr is deprecated")
def test_copies_of_nflows_classes_are_found_by_name_and_behaviour(copied):
    class Own(copied.LULinear):
        """As nessai's."""

    layers = [
        copied.ReversePermutation(N),
        copied.InverseTransform(copied.RandomPermutation(N)),
        Own(N, using_cache=True),
        copied.QRLinear(N, num_householder=4),
        copied.SVDLinear(N, num_householder=4),
        copied.NaiveLinear(N),
    ]
    transform = copied.CompositeTransform(layers).eval()
    with torch.no_grad():
        for parameter in transform.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert not any(isinstance(module, nflows.transforms.Transform) for module in transform.modules())
    x = torch.randn(20, N)
    expected = transform(x)
    assert replace_permutations(transform) == 2
    assert replace_permutations(transform, linear=True) == 4
    for new, old in zip(transform(x), expected, strict=True):
        torch.testing.assert_close(new, old, atol=1e-5, rtol=0)
    torch.testing.assert_close(transform.inverse(transform(x)[0])[0], x, atol=1e-4, rtol=0)


def test_images_and_other_cases_of_copies(copied):
    multiscale = copied.MultiscaleCompositeTransform(2)
    multiscale.add_transform(copied.ReversePermutation(4), (4, 2, 2))
    with pytest.warns(UserWarning, match="image channels: ReversePermutation$|nothing") as records:
        assert replace_permutations(copied.CompositeTransform([copied.SqueezeTransform(), multiscale])) == 0
    assert len(records) == 2
    with pytest.raises(ValueError, match="wrap it in a CompositeTransform"):
        replace_permutations(copied.ReversePermutation(N))


def test_what_has_the_name_only_is_left_alone_with_a_warning():
    class Permutation(nn.Module):
        """Of the same name, but the inverse permutation."""

        def __init__(self):
            super().__init__()
            self.register_buffer("_permutation", PERMUTATION)

        def forward(self, inputs, context=None):
            return inputs[:, PERMUTATION.argsort()], inputs.new_zeros(len(inputs))

    class LULinear(nn.Linear):
        """Of the same name, with a weight that is no method."""

    transform = CompositeTransform([Permutation(), ReversePermutation(N), LULinear(N, N)])
    modules = list(transform.modules())
    with pytest.warns(UserWarning, match="something else than nflows' of this name: Permutation, LULinear"):
        assert replace_permutations(transform, linear=True) == 1
    assert [module in transform.modules() for module in modules[-3:]] == [True, False, True]


@pytest.mark.filterwarnings("ignore")  # glasflow's own, on import
@pytest.mark.parametrize("mixing", ["permutation", "lu", "svd"])
def test_flows_of_glasflow(mixing):
    flows = pytest.importorskip("glasflow.flows", reason="glasflow is not installed (pip install glasflow)")
    flow = flows.RealNVP(N, 3, n_conditional_inputs=2, linear_transform=mixing)
    x, condition = torch.randn(20, N), torch.randn(20, 2)
    expected = flow.log_prob(x, conditional=condition)
    assert replace_permutations(flow) == 3
    if mixing != "permutation":
        assert replace_permutations(flow, linear=True, layer=InvertibleLinear) == 3
    torch.testing.assert_close(flow.log_prob(x, conditional=condition), expected, atol=1e-4, rtol=1e-5)
    samples = flow.sample(20, conditional=condition)
    assert samples.isfinite().all()


@pytest.mark.filterwarnings("ignore")  # nessai's own, on import
@pytest.mark.parametrize(("kind", "mixing"), [("realnvp", "lu"), ("nsf", "permutation"), ("maf", None)])
def test_flows_of_nessai(kind, mixing):
    utils = pytest.importorskip("nessai.flows.utils", reason="nessai is not installed (pip install nessai)")
    options = {} if mixing is None else {"linear_transform": mixing}
    config = {"n_inputs": N, "n_neurons": 8, "n_blocks": 3, "n_layers": 1, "ftype": kind}
    flow = utils.configure_model({**config, "batch_norm_between_layers": False, **options}).eval()
    x = torch.randn(20, N)
    expected = flow.log_prob(x)
    replaced = replace_permutations(flow, linear=True)
    assert replaced == {"realnvp": 6, "nsf": 3, "maf": 3}[kind]
    torch.testing.assert_close(flow.log_prob(x), expected, atol=1e-4, rtol=1e-5)
    z, logabsdet = flow.forward(x)
    back, inverse_logabsdet = flow.inverse(z)
    torch.testing.assert_close(back, x, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(inverse_logabsdet, -logabsdet, atol=1e-3, rtol=1e-3)


# --- what the messages say --------------------------------------------------------------------------------------------


def spline(cls=PiecewiseRationalQuadraticCouplingTransform, **options):
    return cls(create_mid_split_binary_mask(N), Net, **options)


def test_a_flow_of_lu_layers_alone_is_told_of_linear():
    """As sbi's ``nsf`` is made."""
    flow = Flow(CompositeTransform([spline(tails="linear"), LULinear(N), spline(tails="linear"), LULinear(N)]), None)
    with pytest.warns(UserWarning, match="found nothing to replace but LULinear, which linear=True replaces"):
        assert replace_permutations(flow) == 0
    assert replace_permutations(flow, linear=True) == 2


@pytest.mark.filterwarnings("ignore")  # sbi's own, on import
@pytest.mark.parametrize(
    ("model", "message"),
    [("nsf", "linear=True"), ("zuko_nsf", "made of zuko: use p4flows.zuko.replace_permutations or")],
)
def test_estimators_of_sbi_are_told_what_to_do(model, message):
    nets = pytest.importorskip("sbi.neural_nets", reason="sbi is not installed (pip install 'p4flows[sbi]')")
    estimator = nets.posterior_nn(model)(torch.randn(50, 3), torch.randn(50, 2))
    with pytest.warns(UserWarning, match=message):
        assert replace_permutations(estimator) == 0


@pytest.mark.parametrize(
    ("library", "message"),
    [
        ("zuko", "made of zuko: use p4flows.zuko.replace_permutations or p4flows.zuko.insert_linear"),
        ("bgflow", "made of bgflow: use p4flows.bgflow.replace_swaps"),
        ("normflows", "made of normflows: use p4flows.normflows.replace_permutations"),
    ],
)
def test_flows_of_other_libraries_are_told_whose_they_are(library, message):
    class Estimator(nn.Module):
        """As sbi's ZukoFlow, which holds a flow of another library."""

        def __init__(self):
            super().__init__()
            self.net = type("Flow", (nn.Module,), {"__module__": f"{library}.flows"})()

    with pytest.warns(UserWarning, match=message):
        assert replace_permutations(Estimator()) == 0


@pytest.mark.parametrize(
    "make",
    [
        spline,
        lambda: spline(PiecewiseQuadraticCouplingTransform),
        lambda: InverseTransform(spline(apply_unconditional_transform=True)),
        lambda: MaskedPiecewiseCubicAutoregressiveTransform(5, N, 8),
        lambda: PiecewiseRationalQuadraticCDF([N]),
    ],
)
def test_bounded_splines_are_a_warning(make):
    transform = CompositeTransform([make(), ReversePermutation(N)])
    with pytest.warns(UserWarning, match=r"bounded splines \(\w*Piecewise.* with tails=None\) accept inputs"):
        assert replace_permutations(transform) == 1


def test_splines_with_tails_and_those_between_squashing_functions_are_none():
    squashed = CompositeCDFTransform(Sigmoid(), PiecewiseRationalQuadraticCDF([N]))
    transform = CompositeTransform([spline(tails="linear", tail_bound=3.0), ReversePermutation(N), squashed])
    assert replace_permutations(transform) == 1

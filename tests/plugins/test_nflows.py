import copy

import pytest
import torch
from registry import PERMUTATION, N, matrix
from torch import nn

pytest.importorskip("nflows")

from nflows.distributions import StandardNormal
from nflows.flows import Flow
from nflows.transforms import (
    AffineCouplingTransform,
    CompositeTransform,
    InverseTransform,
    LULinear,
    MultiscaleCompositeTransform,
    NaiveLinear,
    OneByOneConvolution,
    Permutation,
    QRLinear,
    RandomPermutation,
    ReversePermutation,
    SqueezeTransform,
    SVDLinear,
)
from nflows.utils import create_mid_split_binary_mask

from p4flows import MergeScheduler
from p4flows.nflows import P4InvLinear, replace_permutations


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

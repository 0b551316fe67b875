import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from registry import N, matrix, perturb
from torch import nn

bg = pytest.importorskip(
    "bgflow", reason="bgflow is neither installed nor checked out where P4FLOWS_BGFLOW says (see CONTRIBUTING.md)"
)

import p4flows  # noqa: E402
from p4flows import MergeScheduler  # noqa: E402
from p4flows.bgflow import (  # noqa: E402
    BentIdentityFlow,
    InvertibleLinearFlow,
    InvertibleSwap,
    P4InvFlow,
    P4InvSwap,
    P4OrthogonalFlow,
    P4OrthogonalSwap,
    as_bgflow_energy,
    from_pppp,
    replace_swaps,
    to_pppp,
)

# bgflow's WrapFlow and SplitFlow make it.
pytestmark = pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")


def coupling(dim0, dim1):
    def net():
        return bg.DenseNet([dim0, 8, dim1], activation=nn.Tanh())

    return bg.CouplingFlow(bg.AffineTransformer(net(), net()))


def real_nvp(dim0=2, dim1=4):
    """Swaps at the top, inside a sequence inside an inverse, and inside a wrapper."""
    return bg.SequentialFlow(
        [
            bg.SplitFlow(dim0, dim1),
            coupling(dim0, dim1),
            bg.SwapFlow(),
            coupling(dim1, dim0),
            bg.InverseFlow(bg.SequentialFlow([coupling(dim0, dim1), bg.SwapFlow()])),
            bg.WrapFlow(bg.SwapFlow(), [0, 1]),
            coupling(dim1, dim0),
            bg.InverseFlow(bg.SplitFlow(dim1, dim0)),
        ]
    )


def generator(flow, target=None):
    prior = bg.NormalDistribution(N)
    return bg.BoltzmannGenerator(prior, flow, target or bg.NormalDistribution(N, torch.zeros(N), 2 * torch.eye(N)))


# --- flows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(N,), (5, N), (2, 3, N)])
def test_flows_are_flows_of_any_batch_shape(shape):
    layers = [perturb(P4InvFlow(N)), BentIdentityFlow(), bg.InverseFlow(perturb(P4InvFlow(N, rank=2)))]
    flow = bg.SequentialFlow([*layers, perturb(InvertibleLinearFlow(N))])
    assert all(isinstance(block, bg.Flow) for block in flow)
    x = torch.randn(shape)
    y, dlogp = flow(x)
    assert y.shape == shape
    assert dlogp.shape == (*shape[:-1], 1)
    back, inverse_dlogp = flow(y, inverse=True)
    torch.testing.assert_close(back, x, atol=1e-5, rtol=0)
    torch.testing.assert_close(inverse_dlogp, -dlogp, atol=1e-5, rtol=0)


def test_inside_wrap_flow_and_boltzmann_generator():
    flow = bg.SequentialFlow(
        [bg.SplitFlow(2, 4), bg.WrapFlow(perturb(P4InvFlow(4)), [1]), bg.InverseFlow(bg.SplitFlow(2, 4))]
    )
    boltzmann = generator(flow)
    x, z = boltzmann.sample(50, with_latent=True)
    energy = boltzmann.energy(x)
    assert energy.shape == (50, 1)
    expected = boltzmann.prior.energy(z) + flow(z)[-1]
    torch.testing.assert_close(energy, expected, atol=1e-4, rtol=0)
    boltzmann.kldiv(50).mean().backward()
    assert flow[1]._flow.U.grad.abs().max() > 0


FLOWS = {
    "P4InvFlow": lambda **options: P4InvFlow(N, **options),
    "P4InvFlow of one": lambda **options: P4InvFlow(1, **options),
    "P4InvSwap": lambda **options: P4InvSwap(2, 4, **options),
    "InvertibleLinearFlow": lambda **options: InvertibleLinearFlow(N, **options),
    "InvertibleLinearFlow of rank one": lambda **options: InvertibleLinearFlow(N, rank=1, bias=False, **options),
    "InvertibleLinearFlow of one": lambda **options: InvertibleLinearFlow(1, **options),
    "InvertibleSwap": lambda **options: InvertibleSwap(2, 4, **options),
    "InvertibleSwap of two": lambda **options: InvertibleSwap(1, 1, init="reverse", **options),
    "P4OrthogonalFlow": lambda **options: P4OrthogonalFlow(N, **{"init": "orthogonal", **options}),
    "P4OrthogonalFlow of rank one": lambda **options: P4OrthogonalFlow(N, rank=1, bias=False, **options),
    "P4OrthogonalSwap": lambda **options: P4OrthogonalSwap(2, 4, **options),
}


def whole(flow, x, inverse=False):
    """A flow of one or two channels as a function of whole vectors (..., n), with dlogp (..., 1)."""
    sizes = (flow.dim1, flow.dim0) if inverse and hasattr(flow, "dim0") else (getattr(flow, "dim0", None), None)
    channels = (x,) if sizes[0] is None else (x[..., : sizes[0]], x[..., sizes[0] :])
    *y, dlogp = flow(*channels, inverse=inverse)
    return torch.cat(y, -1), dlogp


def trained(flow, steps=25):
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    scheduler = MergeScheduler(flow, optimizer, correct_every=3).attach()
    data = torch.randn(64, flow.features, dtype=torch.float64) @ matrix(flow.features)
    for _ in range(steps):
        optimizer.zero_grad()
        z, dlogp = whole(flow, data)
        x, inverse_dlogp = whole(flow, torch.randn_like(data), inverse=True)
        ((z.square() + x.square()).sum(-1, keepdim=True) - 2 * dlogp - 0.1 * inverse_dlogp).mean().backward()
        optimizer.step()
    assert scheduler.counters["merged"] == steps // flow.merge_every
    return flow


@pytest.mark.parametrize("prepare", [lambda flow: flow, perturb, trained], ids=["new", "perturbed", "trained"])
@pytest.mark.parametrize("name", FLOWS)
def test_both_directions_of_every_flow(name, prepare):
    flow = prepare(FLOWS[name](dtype=torch.float64))
    assert isinstance(flow, bg.Flow)
    x = torch.randn(2, 3, flow.features, dtype=torch.float64)
    y, dlogp = whole(flow, x)
    back, inverse_dlogp = whole(flow, y, inverse=True)
    assert dlogp.shape == inverse_dlogp.shape == (2, 3, 1)
    torch.testing.assert_close(back, x, atol=1e-9, rtol=0)
    for inverse, at, found in ((False, x, dlogp), (True, y, inverse_dlogp)):
        jacobian = torch.autograd.functional.jacobian(lambda x, inverse=inverse: whole(flow, x, inverse)[0], at[0, 0])
        expected = torch.linalg.slogdet(jacobian)
        torch.testing.assert_close(found, torch.full_like(found, expected[1].item()), atol=1e-9, rtol=0)
        if not inverse:
            torch.testing.assert_close(flow.sign, expected[0])
            torch.testing.assert_close(flow.logabsdet, expected[1], atol=1e-9, rtol=0)
            torch.testing.assert_close(flow.matrix, jacobian, atol=1e-9, rtol=0)
        else:
            torch.testing.assert_close(flow.inverse_matrix, jacobian, atol=1e-9, rtol=0)
    for twin in (FLOWS[name](dtype=torch.float64, seed=4), copy.deepcopy(flow)):
        twin.load_state_dict(flow.state_dict())
        for inverse in (False, True):
            for new, old in zip(whole(twin, x, inverse), whole(flow, x, inverse), strict=True):
                assert torch.equal(new, old)
    (y.sum() + dlogp.sum() + flow.logabsdet).backward()
    assert all(parameter.grad.isfinite().all() for parameter in flow.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("cls", [P4InvSwap, InvertibleSwap, P4OrthogonalSwap])
@pytest.mark.parametrize(("dim0", "dim1"), [(3, 3), (2, 4), (5, 1)])
def test_a_new_swap_is_bgflow_s_swap(cls, dim0, dim1):
    swap, old = cls(dim0, dim1, rank=2), bg.SwapFlow()
    channels = torch.randn(2, 7, dim0), torch.randn(2, 7, dim1), torch.randn(2, 7, 9)
    for inverse, inputs in ((False, channels), (True, (channels[1], channels[0], channels[2]))):
        for new, expected in zip(swap(*inputs, inverse=inverse), old(*inputs, inverse=inverse), strict=True):
            assert torch.equal(new, expected)


@pytest.mark.parametrize("cls", [P4InvSwap, InvertibleSwap, P4OrthogonalSwap])
def test_reverse_starts_as_the_paper_s_permutation(cls):
    y0, y1, _ = cls(1, 2, init="reverse")(torch.tensor([1.0]), torch.tensor([2.0, 3.0]))
    assert y0.tolist() == [3.0, 2.0]
    assert y1.tolist() == [1.0]


@pytest.mark.parametrize("cls", [P4InvSwap, InvertibleSwap, P4OrthogonalSwap])
def test_wrong_swaps(cls):
    with pytest.raises(ValueError, match="dim1: expected an integer >= 1, got 0"):
        cls(3, 0)
    with pytest.raises(ValueError, match=r"expected tensors of shapes \(..., 2\) and \(..., 3\), got"):
        cls(2, 3)(torch.randn(5, 3), torch.randn(5, 2))
    with pytest.raises(ValueError, match=r"expected tensors of shapes"):
        cls(2, 3)(torch.randn(5, 2))


# --- surgery ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 99])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_replacing_swaps_keeps_the_function(rank, direction):
    flow = real_nvp()
    outer = flow if direction == "forward" else bg.InverseFlow(flow)
    x = torch.randn(20, N)
    expected = [*flow(x), *flow(x, inverse=True)]
    assert replace_swaps(outer, x, rank=rank, seed=5) == 3
    assert not any(isinstance(module, bg.SwapFlow) for module in flow.modules())
    swaps = [module for module in flow.modules() if isinstance(module, P4InvSwap)]
    assert [(swap.dim0, swap.dim1) for swap in swaps] == [(2, 4), (2, 4), (2, 4)]
    assert [int(swap.seed) for swap in swaps] == [5, 6, 7]
    assert {swap.rank for swap in swaps} == {min(rank, N)}
    for new, old in zip([*flow(x), *flow(x, inverse=True)], expected, strict=True):
        torch.testing.assert_close(new, old, atol=1e-5, rtol=0)


def test_one_swap_in_several_places_becomes_several_layers():
    swap = bg.SwapFlow()
    flow = bg.SequentialFlow([swap, coupling(4, 2), swap])
    example = torch.randn(3, 2), torch.randn(3, 4)
    assert replace_swaps(flow, example, init="reverse") == 2
    assert (flow[0].dim0, flow[2].dim0) == (2, 4)
    assert torch.equal(flow[0].A, torch.eye(6).flip(0))


def test_swaps_can_be_refused():
    flow = real_nvp()
    seen = {}

    def skip(name, channels):
        seen[name] = tuple(x.shape for x in channels)
        return "_delegate" in name

    assert replace_swaps(flow, torch.randn(3, N), skip=skip) == 2
    assert seen == dict.fromkeys(("_blocks.2", "_blocks.4._delegate._blocks.1", "_blocks.5._flow"), ((3, 2), (3, 4)))
    assert isinstance(flow[4]._delegate[1], bg.SwapFlow)


def test_dtype_mode_and_options_are_passed_on():
    flow = real_nvp().double().eval()
    replace_swaps(flow, torch.randn(3, N, dtype=torch.float64), bias=False)
    swap = flow[2]
    assert swap.A.dtype == torch.float64
    assert swap.bias is None
    assert not swap.training


def test_what_cannot_be_replaced():
    class Unused(bg.Flow):
        def __init__(self):
            super().__init__()
            self.swap = bg.SwapFlow()

        def _forward(self, x, **_):
            return x, torch.zeros_like(x[..., :1])

    with pytest.warns(
        UserWarning, match="left alone, as the example does not reach it: swap|nothing to replace"
    ) as record:
        assert replace_swaps(Unused(), torch.randn(2, N)) == 0
    assert len(record) == 2
    with pytest.raises(ValueError, match="flow: expected"):
        replace_swaps(bg.SwapFlow(), torch.randn(2, N))
    with pytest.raises(ValueError, match="init: expected"):
        replace_swaps(real_nvp(), torch.randn(2, N), init="identity")
    with pytest.raises(ValueError, match="rank"):
        replace_swaps(real_nvp(), torch.randn(2, N), rank=0)
    flow = real_nvp()
    with pytest.raises((RuntimeError, ValueError)):
        replace_swaps(flow, torch.randn(2, 3))
    assert isinstance(flow[2], bg.SwapFlow)  # an example that fails leaves the flow as it was


@pytest.mark.parametrize(
    ("given", "made"),
    [
        (P4InvSwap, P4InvSwap),
        (p4flows.P4Inv, P4InvSwap),
        (InvertibleSwap, InvertibleSwap),
        (p4flows.InvertibleLinear, InvertibleSwap),
        (P4OrthogonalSwap, P4OrthogonalSwap),
        (p4flows.P4Orthogonal, P4OrthogonalSwap),
    ],
)
def test_the_kind_of_swap_is_chosen(given, made):
    flow = real_nvp()
    x = torch.randn(20, N)
    expected = flow(x)
    assert replace_swaps(flow, x, swap=given, seed=3) == 3
    swaps = [module for module in flow.modules() if type(module) is made]
    assert [(swap.dim0, swap.dim1, swap.rank) for swap in swaps] == [(2, 4, made(2, 4).rank)] * 3
    for new, old in zip(flow(x), expected, strict=True):
        torch.testing.assert_close(new, old, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="swap: expected P4InvSwap or InvertibleSwap or P4OrthogonalSwap, got"):
        replace_swaps(real_nvp(), x, swap=P4InvFlow)


def test_orthogonal_swaps_preserve_volume():
    flow, x = real_nvp(), torch.randn(20, N)
    *_, before = flow(x)
    replace_swaps(flow, x, swap=P4OrthogonalSwap)
    swaps = [module for module in flow.modules() if isinstance(module, P4OrthogonalSwap)]
    for swap in swaps:
        perturb(swap)
        channels = x.split([swap.dim0, swap.dim1], -1)
        *y, dlogp = swap(*channels)
        assert (dlogp == 0).all()
        torch.testing.assert_close(torch.cat(y, -1).sub(swap.bias).norm(dim=-1), x.norm(dim=-1))
    assert before.shape == flow(x)[-1].shape == (20, 1)


def test_an_error_leaves_the_flow_as_it_was(monkeypatch):
    flow = real_nvp()
    modules = list(flow.modules())
    made = []

    def fail_at_the_third(self, *arguments, **options):
        made.append(self)
        if len(made) == 3:
            raise ValueError("no memory")
        original(self, *arguments, **options)

    original = P4InvSwap.__init__
    monkeypatch.setattr(P4InvSwap, "__init__", fail_at_the_third)
    with pytest.raises(ValueError, match="no memory"):
        replace_swaps(flow, torch.randn(2, N))
    assert list(flow.modules()) == modules


def test_a_boltzmann_generator_is_told_of_its_flow():
    boltzmann = generator(real_nvp())
    with pytest.raises(ValueError, match=r"got a BoltzmannGenerator: pass its flow, generator\.flow"):
        replace_swaps(boltzmann, torch.randn(2, N))
    assert replace_swaps(boltzmann.flow, torch.randn(2, N)) == 3


def test_flows_of_another_library_are_told_whose_they_are():
    transforms = pytest.importorskip("nflows.transforms")
    flow = transforms.CompositeTransform([transforms.ReversePermutation(N)])
    with pytest.warns(UserWarning, match="nothing to replace; it is made of nflows: use p4flows.nflows.replace_perm"):
        assert replace_swaps(flow, torch.randn(2, N)) == 0


@pytest.mark.filterwarnings("ignore:your nflows version does not support")
@pytest.mark.parametrize("circular", [False, True])
def test_bounded_splines_and_tori_are_a_warning_unless_swaps_are_chosen(circular):
    pytest.importorskip("nflows", reason="bgflow's splines need nflows")

    def flow():
        net = bg.DenseNet([3, 8, 3 * (12 if circular else 13)], activation=nn.Tanh())
        spline = bg.CouplingFlow(bg.ConditionalSplineTransformer(net, is_circular=circular))
        return bg.SequentialFlow([bg.SplitFlow(3, 3), spline, bg.SwapFlow(), bg.InverseFlow(bg.SplitFlow(3, 3))])

    x = torch.rand(5, N)
    with pytest.warns(
        UserWarning, match=r"bounded splines \(ConditionalSplineTransformer\) accept an interval or a circ"
    ):
        assert replace_swaps(flow(), x) == 1
    assert replace_swaps(flow(), x, skip=lambda name, channels: False) == 1


# --- training -----------------------------------------------------------------------------------------------


def setup(add_penalty=False, **options):
    torch.manual_seed(2)
    flow = real_nvp()
    replace_swaps(flow, torch.randn(2, N), **options)
    boltzmann = generator(flow)
    optimizer = torch.optim.Adam(boltzmann.parameters(), lr=5e-3)
    scheduler = MergeScheduler(flow, optimizer, every=1, correct_every=5, add_penalty=add_penalty)
    return boltzmann, flow, optimizer, scheduler


@pytest.mark.parametrize(("swap", "merges"), [(P4InvSwap, 6), (InvertibleSwap, 60), (P4OrthogonalSwap, 6)])
def test_kl_trainer_with_an_attached_scheduler(swap, merges):
    torch.manual_seed(2)
    flow = real_nvp()
    replace_swaps(flow, torch.randn(2, N), swap=swap)
    boltzmann = generator(flow)
    optimizer = torch.optim.Adam(boltzmann.parameters(), lr=5e-3)
    scheduler = MergeScheduler(flow, optimizer).attach()
    trainer = bg.KLTrainer(boltzmann, optim=optimizer, train_energy=True)
    trainer.train(60, data=torch.randn(500, N) @ matrix(N).float(), batchsize=64)
    losses = trainer.losses()[-1][-1]
    assert scheduler.steps == 60
    assert scheduler.counters["merged"] == 3 * merges
    assert losses[-10:].mean() < losses[:3].mean() - 0.5
    swaps = [module for module in flow.modules() if isinstance(module, swap)]
    assert all((layer.matrix - layer.matrix.round()).abs().max() > 0.02 for layer in swaps)
    x = torch.randn(50, N)
    torch.testing.assert_close(flow(flow(x)[0], inverse=True)[0], x, atol=1e-4, rtol=0)
    copied = replaced(swap)
    copied.load_state_dict(flow.state_dict())
    for new, old in zip(copied(x), flow(x), strict=True):
        torch.testing.assert_close(new, old, atol=1e-6, rtol=0)


def replaced(swap):
    flow = real_nvp()
    replace_swaps(flow, torch.randn(2, N), swap=swap, seed=9)
    return flow


@pytest.mark.parametrize("energy", [False, True])
def test_kl_trainer_matches_a_loop_by_hand_step_for_step(energy):
    data = torch.randn(500, N) @ matrix(N).float()
    boltzmann, flow, optimizer, scheduler = setup()
    trainer = bg.KLTrainer(boltzmann, optim=optimizer, train_energy=energy)
    torch.manual_seed(3)
    np.random.seed(3)
    trainer.train(60, data=data, batchsize=64, schedulers=[(4, scheduler)])
    losses = trainer.losses()[-1]

    by_hand, flow2, optimizer, scheduler2 = setup()
    torch.manual_seed(3)
    np.random.seed(3)
    sampler = bg.DataSetSampler(data)
    for step in range(60):
        if step % 4 == 0:
            scheduler2.step()
        optimizer.zero_grad()
        reports = []
        if energy:
            reports.append(by_hand.kldiv(64).mean())
        reports.append(by_hand.energy(sampler.sample(64)).mean())
        (sum(reports) / len(reports)).backward()
        optimizer.step()
        for loss, report in zip(losses, reports, strict=True):
            assert abs(loss[step] - report.item()) < 1e-6 * max(1, abs(report.item()))
    assert scheduler.counters == scheduler2.counters
    assert scheduler.counters["merged"] == 45
    assert scheduler.counters["corrections"] == 9
    for a, b in zip(flow.state_dict().values(), flow2.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
    assert losses[-1][-10:].mean() < losses[-1][:3].mean() - 0.5
    x = torch.randn(50, N)
    torch.testing.assert_close(flow(flow(x)[0], inverse=True)[0], x, atol=1e-4, rtol=0)


def test_the_penalty_reaches_gradients_without_a_loop():
    data = torch.randn(500, N)
    changes = []
    for add_penalty in (False, True):
        boltzmann, flow, optimizer, scheduler = setup(add_penalty)
        flow[2].bounds_det = (-2.5, 15.5)
        flow[2].logabsdet_A.fill_(-6.0)
        trainer = bg.KLTrainer(boltzmann, optim=optimizer, train_energy=False)
        torch.manual_seed(4)
        np.random.seed(4)
        trainer.train(1, data=data, batchsize=64, schedulers=[(1, scheduler)])
        changes.append(flow[2].U.grad.clone())
    boltzmann, flow, *_ = setup()
    flow[2].bounds_det = (-2.5, 15.5)
    flow[2].logabsdet_A.fill_(-6.0)
    expected = torch.autograd.grad(flow[2].penalty(), flow[2].U)[0]
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(changes[1] - changes[0], expected, atol=1e-4, rtol=1e-4)


def test_energy_training_against_openmm():
    pytest.importorskip("openmm")
    from p4flows.molecules import OpenMMEnergy, alanine_dipeptide

    molecule = alanine_dipeptide()
    bridge = OpenMMEnergy(molecule.system, 600, e_high=1e3, e_max=1e8)
    target = as_bgflow_energy(bridge)
    assert isinstance(target, bg.Energy)
    assert target.dim == 66
    mean = torch.from_numpy(molecule.positions).float().flatten()
    x = mean + 1e-3 * torch.randn(3, 4, 66)
    assert target.energy(x).shape == (3, 4, 1)
    torch.testing.assert_close(target.energy(x)[..., 0], bridge(x))
    torch.testing.assert_close(target.energy(x, temperature=2.0)[..., 0], bridge(x) / 2)
    x = x.requires_grad_()
    (gradient,) = torch.autograd.grad(bridge(x).sum(), x)
    torch.testing.assert_close(target.force(x), -gradient)

    linear = P4InvFlow(66, rank=8, init=1e-2 * torch.eye(66), bounds_det=(None, None))
    with torch.no_grad():
        linear.bias.copy_(mean)
    boltzmann = bg.BoltzmannGenerator(bg.NormalDistribution(66), linear, target)
    optimizer = torch.optim.Adam(linear.parameters(), lr=1e-4)
    scheduler = MergeScheduler(linear, optimizer, every=1)
    trainer = bg.KLTrainer(boltzmann, optim=optimizer, train_likelihood=False)
    trainer.train(80, batchsize=32, schedulers=[(5, scheduler)])
    losses = trainer.losses()[-1][0]
    assert losses[-10:].mean() < losses[:10].mean() - 5
    assert scheduler.counters["merged"] == 16
    z = torch.randn(20, 66)
    torch.testing.assert_close(linear(linear(z)[0], inverse=True)[0], z, atol=1e-2, rtol=0)


# --- bgflow's own layer -------------------------------------------------------------------------------------


def pppp(dim=N, **options):
    layer = bg.InvertiblePPPP(dim, **options).double()
    with torch.no_grad():
        layer.u.normal_(std=0.3)
        layer.v.normal_()
        if isinstance(layer.b, nn.Parameter):
            layer.b.normal_()
    layer.pppp_merge()
    with torch.no_grad():
        layer.u.normal_(std=0.3)
    return layer


def assert_same(a, b, x=None):
    x = torch.randn(20, N, dtype=torch.float64) if x is None else x
    for inverse in (False, True):
        for left, right in zip(a(x, inverse=inverse), b(x, inverse=inverse), strict=True):
            torch.testing.assert_close(left, right, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("init", ["eye", "reverse"])
def test_conversion_from_bgflow_and_back(shift, init):
    old = pppp(shift=shift, init=init, min_logdet=-3, max_logdet=9, penalty_parameter=0.5)
    new = from_pppp(old)
    assert_same(new, old)
    assert new.bounds_update == (-7.0, None)
    assert new.bounds_det == (-3.5, 9.5)
    assert new.bounds_penalty == (-3.0, 9.0)
    assert new.penalty_weight == pytest.approx(0.5)
    back = to_pppp(new)
    assert_same(back, old)
    for key, value in old.state_dict().items():
        if key != "penalty_buffer":
            torch.testing.assert_close(back.state_dict()[key], value, atol=1e-10, rtol=1e-10)
    new.merge()
    assert_same(new, old)


@pytest.mark.parametrize("rank", [1, 3])
def test_conversion_of_any_rank_to_bgflow(rank):
    layer = perturb(P4InvFlow(N, rank=rank, init=matrix(N), dtype=torch.float64))
    assert_same(to_pppp(layer), layer)
    assert_same(from_pppp(to_pppp(layer)), layer)


def test_conversion_keeps_mode_and_dtype():
    old = bg.InvertiblePPPP(N)
    old.training = False
    new = from_pppp(old)
    assert not new.training
    assert new.A.dtype == torch.float32
    assert not to_pppp(new).training


def test_a_checkpoint_whose_determinant_underflowed_is_saved():
    old = bg.InvertiblePPPP(200)
    with torch.no_grad():
        old.A.mul_(0.5)
        old.Ainv.mul_(2)
        old.detA.mul_(0.5**200)
    assert old.detA == 0
    new = from_pppp(old)
    assert new.logabsdet.item() == pytest.approx(200 * np.log(0.5))
    with pytest.raises(ValueError, match=r"ln\|det A\| = -138.629 is out of reach"):
        to_pppp(new)


def test_wrong_layers():
    with pytest.raises(ValueError, match="layer: expected a bgflow InvertiblePPPP, got Linear"):
        from_pppp(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="layer: expected a P4Inv layer, got Linear"):
        to_pppp(nn.Linear(2, 2))


# --- import errors ------------------------------------------------------------------------------------------


def python(code):
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)


def test_the_import_error_says_what_to_install():
    result = python("import sys; sys.modules['bgflow'] = None; import p4flows.bgflow")
    assert result.stderr.strip().splitlines()[-1] == (
        "ImportError: p4flows.bgflow needs bgflow: pip install 'p4flows[bgflow]' for what it imports, and bgflow "
        "itself from its repository: pip install git+https://github.com/noegroup/bgflow"
    )


# What NumPy 2 took away is taken away here; bgflow itself is the real one. It reads the name on import and later.
WITHOUT_INFTY = "import numpy; vars(numpy).pop('infty', None)\n"
RUN = """
import p4flows.bgflow, bgflow, torch
truncated = bgflow.TruncatedNormalDistribution(torch.zeros(2), assert_range=False)
assert truncated.energy(-torch.ones(1, 2)).isinf().all()
assert truncated.energy(torch.ones(1, 2)).isfinite().all()
print("ran")
"""


@pytest.mark.parametrize(
    "before",
    [
        "",
        WITHOUT_INFTY,
        WITHOUT_INFTY + "try:\n    import bgflow\nexcept AttributeError:\n    print('a first import failed')",
    ],
)
def test_the_name_that_numpy_2_lacks_is_supplied(before):
    result = python(before + RUN)
    expected = (["a first import failed"] if "first" in before else []) + ["ran"]
    assert result.stdout.split("\n")[:-1] == expected, result.stderr


def test_deepcopy_after_training():
    boltzmann, flow, *_ = setup()
    boltzmann.kldiv(5).mean().backward()
    x = torch.randn(3, N)
    assert torch.equal(copy.deepcopy(flow)(x)[0], flow(x)[0])

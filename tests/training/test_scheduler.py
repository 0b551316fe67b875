import copy
import math

import pytest
import torch
from registry import N, perturb
from torch import nn

import p4flows.tracking.group
from p4flows import InvertibleLinear, MergeScheduler, P4Inv, attach_on_first_step

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2),
    "SGD-momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "SGD-fused": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "Adam-foreach": lambda p: torch.optim.Adam(p, lr=1e-2, foreach=True),
    "Adam-fused": lambda p: torch.optim.Adam(p, lr=1e-2, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "AMSGrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.9, centered=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
}


class Model(nn.Module):
    """P4 layers of two shapes, one inside a list inside another module, beside ordinary parameters."""

    def __init__(self, dtype=None):
        super().__init__()
        self.first = P4Inv(N, rank=1, seed=1, dtype=dtype)
        self.deep = nn.ModuleList([nn.Sequential(), nn.ModuleDict({"a": P4Inv(N, rank=1, seed=2, dtype=dtype)})])
        self.wide = P4Inv(N, rank=3, seed=3, dtype=dtype)
        self.other = nn.Linear(N, N, dtype=dtype)

    @property
    def p4(self):
        return [self.first, self.deep[1]["a"], self.wide]

    def loss(self):
        x = torch.randn(16, N, dtype=self.other.weight.dtype)
        total = 0
        for layer in self.p4:
            x, logabsdet = layer(x)
            total = total - logabsdet.mean()
        return total + self.other(x).square().mean()


def step(model, optimizer):
    optimizer.zero_grad()
    model.loss().backward()
    optimizer.step()


def test_finds_every_layer_once_and_merges_at_every_nth_step():
    model = Model()
    model.again = model.first
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scheduler = MergeScheduler(model, optimizer, every=3)
    assert {id(layer) for layer in scheduler.layers} == {id(layer) for layer in model.p4}
    merges = []
    for _ in range(7):
        step(model, optimizer)
        scheduler.step()
        merges.append([int(layer.merges) for layer in model.p4])
    assert merges == [[0] * 3] * 2 + [[1] * 3] * 3 + [[2] * 3] * 2
    assert {name: count for name, count in scheduler.counters.items() if count} == {"merged": 6}


def test_a_merge_leaves_the_function_alone():
    model = Model(torch.float64)
    for layer in model.p4:
        perturb(layer)
    before = [layer.matrix.detach() for layer in model.p4]
    MergeScheduler(model, torch.optim.SGD(model.parameters(), lr=1.0), every=1).step()
    for layer, matrix in zip(model.p4, before, strict=True):
        assert layer.U.abs().max() == 0
        torch.testing.assert_close(layer.matrix, matrix)


def test_forces_and_corrects_at_their_intervals():
    layer = P4Inv(3, bounds_det=(5.0, 6.0))
    scheduler = MergeScheduler(
        layer, torch.optim.SGD(layer.parameters(), lr=1.0), every=2, force_every=3, correct_every=4
    )
    for _ in range(7):
        scheduler.step()
    counts = {name: count for name, count in scheduler.counters.items() if count}
    assert counts == {"forced": 1, "skipped": 2, "skipped_determinant": 2}
    layer.A_inv_double.mul_(1.001)
    scheduler.step()
    counts = {name: count for name, count in scheduler.counters.items() if count}
    assert counts == {"forced": 1, "skipped": 3, "skipped_determinant": 3, "corrections": 1}
    assert layer.residual() < 1e-6


def test_never_forces_and_never_corrects_if_told_so():
    layer = P4Inv(3, bounds_det=(5.0, 6.0))
    scheduler = MergeScheduler(layer, torch.optim.SGD(layer.parameters(), lr=1.0), 1, None, None)
    for _ in range(99):
        scheduler.step()
    with pytest.warns(UserWarning, match=r"100% of the last merges were skipped \(skipped_determinant 100\)"):
        scheduler.step()
    for _ in range(200):  # it is said once
        scheduler.step()
    counts = {name: count for name, count in scheduler.counters.items() if count}
    assert counts == {"skipped": 300, "skipped_determinant": 300}
    assert "skipped_determinant=300" in repr(scheduler)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("reset", ["momentum", "all", "v", "none"])
def test_resets_only_the_state_it_should(make, reset):
    model = Model()
    optimizer = make(list(model.parameters()))
    scheduler = MergeScheduler(model, optimizer, every=1, reset=reset)
    scheduler.step()  # before the optimizer's first step there is no state
    assert not optimizer.state
    for _ in range(3):
        step(model, optimizer)
    with torch.no_grad():
        model.first.U.zero_()
    model.first.bounds_det = (5.0, 6.0)  # its merge will be skipped
    scheduler = MergeScheduler(model, optimizer, every=1, reset=reset)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    old_V = model.wide.V.detach().clone()
    scheduler.step()
    assert scheduler.counters["skipped"] == 1
    assert scheduler.counters["merged"] == 2
    after = optimizer.state_dict()["state"]
    T = model.wide.carried(old_V[None], model.wide.V.detach()[None])[0]
    of_layer = {"momentum": "UV", "all": "UV", "v": "V", "none": ""}[reset]
    cleared = {id(getattr(layer, name)) for layer in model.p4[1:] for name in of_layer}
    entries = 0
    for i, parameter in enumerate(model.parameters()):
        for name, value in after.get(i, {}).items():
            if value is None:
                continue
            entries += 1
            first_moment = name in ("momentum_buffer", "exp_avg", "grad_avg")
            if parameter is model.wide.U and reset == "momentum" and first_moment:  # its V is not trained
                torch.testing.assert_close(value, before[i][name] @ T)
            elif id(parameter) in cleared and (first_moment or reset != "momentum"):
                assert torch.all(value == (1 if name == "mu_product" else 0)), name
            else:
                assert torch.equal(value, before[i][name]), name
                assert value.abs().sum() > 0
    assert entries or "SGD" in str(type(optimizer))
    step(model, optimizer)  # and it still runs
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("reset", ["momentum", "all", "v", "none"])
def test_a_broken_perturbation_takes_its_optimizer_state_with_it(reset):
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scheduler = MergeScheduler(model, optimizer, every=1, reset=reset)
    step(model, optimizer)
    optimizer.zero_grad()
    model.loss().backward()
    model.first.U.grad[0] = float("nan")
    optimizer.step()
    scheduler.step()
    assert scheduler.counters["resets"] == 1
    for _ in range(3):
        step(model, optimizer)
        scheduler.step()
    assert scheduler.counters["resets"] == 1
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_attached_is_the_same_as_stepping_by_hand():
    by_hand, attached = Model(), Model()
    attached.load_state_dict(by_hand.state_dict())
    for model, hook in ((by_hand, False), (attached, True)):
        torch.manual_seed(1)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        scheduler = MergeScheduler(model, optimizer, every=4)
        if hook:
            assert scheduler.attach().attach() is scheduler
        for _ in range(12):
            step(model, optimizer)
            if not hook:
                scheduler.step()
        assert scheduler.steps == 12
        assert scheduler.counters["merged"] == 9
        scheduler.detach()
        step(model, optimizer)
        assert scheduler.steps == 12
    for a, b in zip(by_hand.state_dict().values(), attached.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_step_that_a_gradient_scaler_skips_is_not_counted():
    for fused in (False, True):
        layer = P4Inv(3)
        optimizer = torch.optim.SGD(layer.parameters(), lr=1e-2, fused=fused)
        scheduler = MergeScheduler(layer, optimizer, every=1).attach()
        scaler = torch.amp.GradScaler("cpu")
        for scale in (float("inf"), 1.0):
            optimizer.zero_grad()
            scaler.scale(layer(torch.randn(2, 3))[0].sum() * scale).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scheduler.steps == 1, fused


def test_penalty_is_the_sum_and_has_gradients():
    model = Model()
    for layer in model.p4:
        layer.bounds_det = (-2.5, 15.5)
        layer.logabsdet_A.fill_(-4.0)
    scheduler = MergeScheduler(model, torch.optim.SGD(model.parameters(), lr=1.0))
    penalty = scheduler.penalty()
    assert penalty.item() == pytest.approx(3 * 0.1 * 4)
    penalty.backward()
    assert all(layer.U.grad.abs().max() > 0 for layer in model.p4)


def test_resumes_bit_for_bit():
    def build():
        model = Model()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        return model, optimizer, MergeScheduler(model, optimizer, every=3, force_every=2, correct_every=3)

    def run(steps, model, optimizer, scheduler):
        for i in steps:
            torch.manual_seed(i)
            step(model, optimizer)
            scheduler.step()

    whole, first = build(), build()
    first[0].load_state_dict(whole[0].state_dict())
    run(range(20), *whole)
    run(range(10), *first)
    second = build()
    for new, old in zip(second, first, strict=True):
        new.load_state_dict(copy.deepcopy(old.state_dict()))
    run(range(10, 20), *second)
    for a, b in zip(whole[0].state_dict().values(), second[0].state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert whole[2].state_dict() == second[2].state_dict()


def test_frozen_layers_are_left_alone():
    model = Model()
    model.first.requires_grad_(False)
    scheduler = MergeScheduler(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0), 1)
    assert len(scheduler.layers) == 2


def test_bad_input():
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for options, message in [
        ({"every": 0}, "every: expected an integer >= 1, got 0"),
        ({"force_every": -1}, "force_every"),
        ({"correct_every": 2.5}, "correct_every"),
        ({"reset": "u"}, "reset: expected"),
    ]:
        with pytest.raises(ValueError, match=message):
            MergeScheduler(model, optimizer, **options)
    with pytest.raises(ValueError, match=r"lacks that of 'first'; make the optimizer after the layers"):
        MergeScheduler(model, torch.optim.SGD(model.other.parameters(), lr=1.0))
    with pytest.raises(ValueError, match=r"lacks that of the model itself; "):
        MergeScheduler(model.first, torch.optim.SGD(model.other.parameters(), lr=1.0))
    with pytest.raises(ValueError, match=r"model: expected a torch.nn.Module"):
        MergeScheduler([model], optimizer)
    with pytest.raises(ValueError, match=r"optimizer: expected a torch.optim.Optimizer"):
        MergeScheduler(model, model.parameters())
    with pytest.raises(ValueError, match="state: expected"):
        MergeScheduler(model, optimizer).load_state_dict({})
    with pytest.warns(UserWarning, match="no trainable P4 layer"):
        MergeScheduler(model.other, torch.optim.SGD(model.other.parameters(), lr=1.0)).step()


def test_attaches_to_the_optimizer_that_takes_the_first_step_on_the_model():
    model, other = Model(), nn.Linear(2, 2)
    scheduler = attach_on_first_step(model, every=2)
    stranger = torch.optim.SGD(other.parameters(), lr=1e-2)
    other(torch.randn(3, 2)).sum().backward()
    stranger.step()
    assert scheduler() is None
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(5):
        step(model, optimizer)
    assert scheduler().steps == 5
    assert [int(layer.merges) for layer in model.p4] == [2, 2, 2]
    stranger.step()
    assert scheduler().steps == 5
    with pytest.raises(ValueError, match="model: expected one with a P4 layer"):
        attach_on_first_step(other)


@pytest.mark.parametrize(
    "disturb",
    [
        lambda model, optimizer: model.double().float(),
        lambda model, optimizer: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())),
        lambda model, optimizer: model.load_state_dict(copy.deepcopy(model.state_dict())),
        lambda model, optimizer: setattr(model.first, "A", model.first.A.clone()),
        lambda model, optimizer: setattr(model.first.U, "data", model.first.U.data.clone()),
    ],
    ids=["converted", "optimizer loaded", "loaded", "buffer replaced", "data replaced"],
)
def test_layers_that_are_merged_together_notice_what_moves(disturb, monkeypatch):
    """Merging many layers at once stays merging each, whatever happens to their tensors in between."""
    results = []
    for together in (True, False):
        torch.manual_seed(0)
        model = Model()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        scheduler = MergeScheduler(model, optimizer, every=2)
        if not together:  # each layer by itself
            monkeypatch.setattr(p4flows.tracking.group, "_STACKED_WIDTH", 0)
        for i in range(9):
            if i in (3, 6):
                disturb(model, optimizer)
            step(model, optimizer)
            scheduler.step()
        results.append([*model.state_dict().values(), torch.tensor(scheduler.counters["merged"])])
    assert results[0][-1] == 12
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_a_layer_that_was_merged_with_others_can_be_saved_and_copied_alone(tmp_path):
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    MergeScheduler(model, optimizer, every=1).step()
    step(model, optimizer)
    alone = copy.deepcopy(model.first)
    matrix = alone.matrix.detach().clone()
    torch.save(model.first.state_dict(), tmp_path / "first.pt")
    with torch.no_grad():
        model.first.U.zero_()
        model.first.A.zero_()
        model.deep[1]["a"].A.zero_()
    torch.testing.assert_close(alone.matrix, matrix)
    other = P4Inv(N, rank=1)
    other.load_state_dict(torch.load(tmp_path / "first.pt", weights_only=True))
    torch.testing.assert_close(other.matrix, matrix)


def repeat(function, times):
    for _ in range(times):
        function()


def test_a_kind_of_layer_that_never_merges_is_not_hidden_by_others():
    model = nn.ModuleList([P4Inv(3, bounds_det=(5.0, 6.0)), InvertibleLinear(3)])
    scheduler = MergeScheduler(model, None, force_every=None)
    with pytest.warns(UserWarning, match=r"100% of the last merges were skipped \(skipped_determinant \d+\)"):
        repeat(scheduler.step, 1000)


def test_a_weight_that_was_repaired_gives_no_warning_later(recwarn):
    layer = InvertibleLinear(3)
    scheduler = MergeScheduler(layer, None, force_every=None)
    with torch.no_grad():
        layer.weight[0, 0] = math.nan
    scheduler.step()
    assert [str(w.message) for w in recwarn if "not finite" in str(w.message)]
    layer.reset()
    state = scheduler.state_dict()
    recwarn.clear()
    resumed = MergeScheduler(layer, None, force_every=None)
    resumed.load_state_dict(state)
    repeat(resumed.step, 300)
    assert not [str(w.message) for w in recwarn if "not finite" in str(w.message)]
    layer.bounds_det = (5.0, 6.0)
    with pytest.warns(UserWarning, match="of the last merges were skipped"):
        repeat(resumed.step, 300)

"""Whoever makes the optimizer, whenever: an attached scheduler goes on merging, once for each step."""

import copy
import gc
import io
import itertools
import pickle
import threading
import warnings
import weakref

import pytest
import torch
from torch import nn

from p4flows import MergeScheduler, P4Inv, P4InvStack, attach_on_first_step

N = 4


def model(layers=2, **options):
    return nn.ModuleList([P4Inv(N, rank=1, seed=i, **options) for i in range(layers)])


def loss(layers):
    x = torch.randn(8, N)
    total = 0
    for layer in layers:
        x, logabsdet = layer(x)
        total = total + logabsdet
    return (x.square().sum(-1) / 2 - total).mean()


def train(layers, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        loss(layers).backward()
        optimizer.step()


def merges(layers):
    return [int(layer.merges.sum()) for layer in layers]


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation, as in github.com/davda54/sam: it has another optimizer inside."""

    def __init__(self, params, base_optimizer, rho=0.05, **options):
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base_optimizer(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self, zero_grad=False):
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        for p in parameters:
            self.state[p]["old_p"] = p.data.clone()
            p.add_(p.grad * self.param_groups[0]["rho"] / (norm + 1e-12))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad=False):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data = self.state[p]["old_p"]
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure=None):
        closure = torch.enable_grad()(closure)
        self.first_step(zero_grad=True)
        closure()
        self.second_step()


class AcceleratedOptimizer(torch.optim.Optimizer):
    """As accelerate's: it was never initialised as an optimizer, and has the real one inside."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    state = property(lambda self: self.optimizer.state)
    param_groups = property(lambda self: self.optimizer.param_groups)

    def zero_grad(self):
        self.optimizer.zero_grad()

    def step(self, closure=None):
        self.optimizer.step(closure)


# --- new optimizers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attach", [lambda m: attach_on_first_step(m, every=2), lambda m: by_hand(m)])
def test_every_new_optimizer_is_served(attach):
    layers = model(1)
    attach(layers)
    counts = [0]
    for _ in range(3):
        train(layers, torch.optim.Adam(layers.parameters(), lr=1e-3), 10)
        counts.append(*merges(layers))
    assert [b - a for a, b in itertools.pairwise(counts)] == [5, 5, 5]


def by_hand(layers):
    MergeScheduler(layers, torch.optim.Adam(layers.parameters()), every=2).attach()


def test_state_is_reset_in_the_optimizer_that_steps():
    layers = model()
    MergeScheduler(layers, torch.optim.Adam(layers.parameters()), every=5).attach()
    optimizer = torch.optim.Adam(layers.parameters(), lr=1e-3)
    train(layers, optimizer, 5)
    for layer in layers:
        assert optimizer.state[layer.U]["exp_avg"].abs().max() == 0
        assert optimizer.state[layer.bias]["exp_avg"].abs().max() > 0


def test_a_scheduler_that_is_stepped_by_hand_follows_a_new_optimizer_too():
    layers = model()
    scheduler = MergeScheduler(layers, torch.optim.Adam(layers.parameters()), every=1)
    optimizer = torch.optim.Adam(layers.parameters(), lr=1e-3)
    train(layers, optimizer, 1)
    scheduler.step()
    assert scheduler.optimizer is optimizer
    assert optimizer.state[layers[0].U]["exp_avg"].abs().max() == 0


def test_two_models_may_wait_at_once():
    first, second = model(), model()
    schedulers = [attach_on_first_step(each, every=1) for each in (first, second)]
    train(first, torch.optim.SGD(first.parameters(), lr=1e-3), 2)
    assert schedulers[1]() is None
    train(second, torch.optim.SGD(second.parameters(), lr=1e-3), 3)
    assert [scheduler().steps for scheduler in schedulers] == [2, 3]


def test_threads_train_models_of_their_own():
    results, errors = [], []

    def run():
        try:
            layers = model(1)
            attach_on_first_step(layers, every=2)
            train(layers, torch.optim.Adam(layers.parameters(), lr=1e-3), 60)
            results.extend(merges(layers))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert results == [30] * 4


def test_optimizers_of_different_layers_are_counted_apart():
    def build():
        layers = model(3)
        optimizers = [
            torch.optim.Adam(layers[:2].parameters(), lr=1e-3),
            torch.optim.SGD(layers[2:].parameters(), 1e-3),
        ]
        return layers, optimizers, MergeScheduler(layers, None, every=2).attach()

    layers, optimizers, scheduler = build()
    for _ in range(5):
        loss(layers).backward()
        for optimizer in optimizers:  # in turns: one count for both would merge the second one's layers only
            optimizer.step()
    assert merges(layers[2:]) == [2]
    assert merges(layers[:2])[0] == merges(layers[:2])[1] in (2, 3)  # whether the last was there at the first step
    train(layers[2:], optimizers[1], 4)
    assert scheduler.steps == 9
    saved = scheduler.state_dict()

    layers, optimizers, resumed = build()
    resumed.load_state_dict(copy.deepcopy(saved))
    assert resumed.steps == 9
    train(layers[2:], optimizers[1], 1)  # the tenth step on this layer, whichever comes first
    train(layers[:2], optimizers[0], 1)
    assert merges(layers) == [1, 1, 1]
    assert sorted(clock["steps"] for clock in resumed.state_dict()["clocks"]) == [6, 10]


def test_optimizers_that_take_turns_on_the_same_layers_are_counted_together():
    layers = model()
    optimizers = [torch.optim.Adam(layers.parameters(), lr=1e-3), torch.optim.SGD(layers.parameters(), 1e-3, 0.9)]
    scheduler = MergeScheduler(layers, optimizers[0], every=2).attach()
    for _ in range(3):
        for optimizer in optimizers:
            train(layers, optimizer, 1)
    assert scheduler.steps == 6
    assert merges(layers) == [3, 3]
    assert optimizers[0].state[layers[0].U]["exp_avg"].abs().max() == 0
    assert optimizers[1].state[layers[0].U]["momentum_buffer"].abs().max() == 0


# --- layers that come and go ------------------------------------------------------------------------------------


def test_layers_that_are_unfrozen_later_are_merged():
    layers = model().requires_grad_(False)
    head = nn.Linear(1, 1)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-3)
    scheduler = MergeScheduler(layers, optimizer, every=2).attach()
    assert scheduler.layers == []
    layers.requires_grad_(True)
    optimizer.add_param_group({"params": list(layers.parameters())})
    train(layers, optimizer, 28)
    assert merges(layers) == [14, 14]
    layers[0].requires_grad_(False)
    train(layers, optimizer, 2)
    assert merges(layers) == [14, 15]


def test_layers_that_are_added_or_replaced_later_are_merged():
    layers = model(1)
    optimizer = torch.optim.Adam(layers.parameters(), lr=1e-3)
    MergeScheduler(layers, optimizer, every=1).attach()
    train(layers, optimizer, 1)
    old = layers[0]
    layers.append(P4InvStack(N, 2, rank=1))
    layers[0] = P4Inv(N, rank=1)
    optimizer.add_param_group({"params": list(layers.parameters())})
    train(layers, optimizer, 3)
    assert merges([old, *layers]) == [1, 3, 6]


def test_parameters_that_are_replaced_or_moved_are_followed():
    layers = model()
    optimizer = torch.optim.Adam(layers.parameters(), lr=1e-3)
    scheduler = MergeScheduler(layers, optimizer, every=1).attach()
    train(layers[:1], optimizer, 1)
    layers[0].U = nn.Parameter(layers[0].U.detach().clone())
    optimizer.add_param_group({"params": [layers[0].U]})
    layers[1].double()
    assert len({layer.group_key for layer in scheduler.layers}) == 2
    x = torch.randn(8, N)
    optimizer.zero_grad()
    (layers[0](x)[0].sum() + layers[1](x.double())[0].sum()).backward()
    optimizer.step()
    assert merges(layers) == [2, 2]
    assert optimizer.state[layers[0].U]["exp_avg"].abs().max() == 0


# --- copies -----------------------------------------------------------------------------------------------------


def pickled(thing):
    return pickle.loads(pickle.dumps(thing))


def saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
@pytest.mark.parametrize("attached", [False, True])
def test_copies_of_model_optimizer_and_scheduler_belong_together(copied, attached):
    layers = model(1)
    optimizer = torch.optim.Adam(layers.parameters(), lr=1e-3)
    scheduler = MergeScheduler(layers, optimizer, every=2)
    if attached:
        scheduler.attach()
    new, new_optimizer, new_scheduler = copied((layers, optimizer, scheduler))
    assert new_scheduler.attached == attached
    assert new_scheduler.model is new
    assert new_scheduler.optimizer is new_optimizer
    new_scheduler.attach()
    train(new, new_optimizer, 8)
    assert merges(new) == [4]
    assert merges(layers) == [0]
    assert new_optimizer.state[new[0].U]["exp_avg"].abs().max() == 0
    assert scheduler.steps == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
def test_a_copy_of_the_model_alone_has_no_scheduler(copied):
    layers = model(1)
    optimizer = torch.optim.Adam(layers.parameters(), lr=1e-3)
    MergeScheduler(layers, optimizer, every=1).attach()
    train(layers, optimizer, 1)
    new = copied(layers)
    train(new, torch.optim.Adam(new.parameters(), lr=1e-3), 2)
    assert merges(new) == merges(layers) == [1]


# --- what is left behind ----------------------------------------------------------------------------------------


def alive(references):
    gc.collect()
    return [reference() is not None for reference in references]


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("steps", [0, 3])
def test_nothing_stays_in_memory(attached, steps):
    layers = model()
    optimizer = torch.optim.Adam(layers.parameters(), lr=1e-3)
    scheduler = MergeScheduler(layers, optimizer, every=1, add_penalty=True)
    if attached:
        scheduler.attach()
    train(layers, optimizer, steps)
    if not attached:
        scheduler.step()
    references = [weakref.ref(each) for each in (optimizer, layers, layers[0], layers[0].U, scheduler)]
    del scheduler
    assert alive(references) == [True, True, True, True, attached]
    del optimizer
    assert alive(references[:1]) == [False]  # the model does not keep the optimizer's state alive
    del layers
    assert alive(references) == [False] * 5


def test_models_that_wait_for_a_step_may_go():
    layers = model()
    current = attach_on_first_step(layers)
    reference = weakref.ref(layers)
    del layers
    assert alive([reference]) == [False]
    assert current() is None


def test_a_step_that_raises_leaves_nothing_behind():
    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            raise KeyboardInterrupt

    layers = model(1, bounds_det=(-2.5, 15.5))
    layers[0].logabsdet_A.fill_(-6.0)  # so that the penalty has a gradient
    failing = Failing(layers.parameters(), lr=1e-3)
    scheduler = MergeScheduler(layers, failing, every=1, add_penalty=True).attach()
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(layers, failing, 1)
    assert scheduler.steps == 0
    reference = weakref.ref(failing)
    del failing
    assert alive([reference]) == [False]
    optimizer = torch.optim.SGD(layers.parameters(), lr=1e-3)
    optimizer.zero_grad()
    optimizer.step()
    assert layers[0].U.grad.abs().max() > 0
    assert scheduler.steps == 1


# --- optimizers in optimizers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["outer", "inner", "none"])
@pytest.mark.parametrize("closure", [False, True])
def test_sharpness_aware_minimisation(given, closure):
    layers = model(1, bounds_det=(-2.5, 15.5))
    optimizer = SAM(layers.parameters(), torch.optim.SGD, lr=1e-2, momentum=0.9)
    chosen = {"outer": optimizer, "inner": optimizer.base_optimizer, "none": None}[given]
    scheduler = MergeScheduler(layers, chosen, every=2, force_every=1, add_penalty=True).attach()
    gradients = []
    optimizer.base_optimizer.register_step_pre_hook(lambda o, *_: gradients.append(layers[0].U.grad.clone()))
    layers[0].logabsdet_A.fill_(-6.0)
    for _ in range(4):
        optimizer.zero_grad()
        loss(layers).backward()
        if closure:
            optimizer.step(lambda: loss(layers).backward())
        else:
            optimizer.first_step(zero_grad=True)
            loss(layers).backward()
            optimizer.second_step()
    assert scheduler.steps == 4
    assert merges(layers) == [2]
    state = optimizer.base_optimizer.state[layers[0].U]
    assert state["momentum_buffer"].abs().max() == 0
    assert optimizer.base_optimizer.state[layers[0].bias]["momentum_buffer"].abs().max() > 0


@pytest.mark.parametrize("kind", ["plain", "closure", "keyword", "SAM", "wrapped"])
def test_the_penalty_is_added_once_to_the_gradients_that_are_used(kind):
    """By closures, wrappers and plain steps alike."""
    layer = P4Inv(N, rank=1, seed=0, bounds_det=(-2.5, 15.5))
    layer.logabsdet_A.fill_(-6.0)
    penalty = torch.autograd.grad(layer.penalty(), layer.U)[0]
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    if kind == "SAM":
        optimizer = SAM(layer.parameters(), torch.optim.SGD, rho=0.0, lr=1e-3)
    if kind == "wrapped":
        optimizer = AcceleratedOptimizer(optimizer)
    scheduler = MergeScheduler(layer, optimizer, every=100, add_penalty=True).attach()
    x = torch.randn(8, N)

    def closure():
        optimizer.zero_grad()
        value = layer(x)[0].square().sum()
        value.backward()
        return value

    closure()
    expected = layer.U.grad + penalty
    if kind == "plain":
        optimizer.step()
    elif kind == "keyword":
        optimizer.step(closure=closure)
    else:
        optimizer.step(closure)
    assert scheduler.steps == 1
    torch.testing.assert_close(layer.U.grad, expected)


def test_a_wrapper_that_is_no_optimizer_itself():
    layers = model(1)
    optimizer = torch.optim.Adam(layers.parameters(), lr=1e-3)
    wrapped = AcceleratedOptimizer(optimizer)
    scheduler = MergeScheduler(layers, wrapped, every=2).attach()
    train(layers, wrapped, 4)
    assert scheduler.steps == 4
    assert optimizer.state[layers[0].U]["exp_avg"].abs().max() == 0


def test_merges_come_after_the_outermost_step():
    """ZeRO sends the parameters of each process to the others after the step of the optimizer inside it."""

    class ZeroRedundancyOptimizer(torch.optim.Optimizer):
        def __init__(self, params, lr):
            super().__init__(params, {"lr": lr})
            self.optim = torch.optim.SGD(self.param_groups[0]["params"][:2], lr, momentum=0.9)

        def step(self, closure=None):
            self.optim.step()
            for p in self.param_groups[0]["params"]:
                p.data.add_(0.5)  # what comes from elsewhere

    layer = P4Inv(N, rank=1)
    before = layer.A.clone()
    optimizer = ZeroRedundancyOptimizer(layer.parameters(), 1e-3)
    MergeScheduler(layer, optimizer, every=1).attach()
    train([layer], optimizer, 1)
    assert layer.U.abs().max() == 0
    assert (layer.A - before).abs().max() > 0.1
    assert optimizer.optim.state[layer.U]["momentum_buffer"].abs().max() == 0


@pytest.mark.filterwarnings("ignore")  # torch's own
@pytest.mark.parametrize("whole", [False, True])
def test_a_compiled_step_is_seen_and_its_state_reset(whole):
    layers = model(1)
    optimizer = torch.optim.Adam(layers.parameters(), lr=1e-3)
    scheduler = MergeScheduler(layers, optimizer, every=2).attach()

    def step():
        optimizer.step()

    step = torch.compile(step if whole else optimizer.step, backend="eager")
    for _ in range(2):
        optimizer.zero_grad()
        loss(layers).backward()
        step()
    assert scheduler.steps == 2
    assert merges(layers) == [1]
    assert optimizer.state[layers[0].U]["exp_avg"].abs().max() == 0
    assert optimizer.state[layers[0].bias]["exp_avg"].abs().max() > 0


# --- used twice, half or wrongly --------------------------------------------------------------------------------


def test_a_cell_that_is_run_twice_adds_the_penalty_once():
    layer = P4Inv(N, rank=1, bounds_det=(-2.5, 15.5))
    layer.logabsdet_A.fill_(-6.0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    expected = torch.autograd.grad(layer.penalty(), layer.U)[0]
    schedulers = []
    for _ in range(2):
        schedulers.append(MergeScheduler(layer, optimizer, every=100, add_penalty=True))
        optimizer.zero_grad()
        optimizer.step()
        torch.testing.assert_close(layer.U.grad, expected)
    schedulers[-1].detach()
    optimizer.zero_grad()
    optimizer.step()
    assert layer.U.grad is None


def test_the_second_attached_scheduler_takes_the_place_of_the_first():
    layers = model(1)
    optimizer = torch.optim.SGD(layers.parameters(), lr=1e-3)
    first = MergeScheduler(layers, optimizer, every=1).attach()
    with pytest.warns(UserWarning, match=r"another MergeScheduler serves these layers; it is detached: .*steps=0"):
        second = MergeScheduler(layers, optimizer, every=2).attach()
    assert (first.attached, second.attached) == (False, True)
    train(layers, optimizer, 4)
    assert merges(layers) == [2]
    other = model(1)  # two models in one optimizer do not get in each other's way
    optimizer.add_param_group({"params": list(other.parameters())})
    MergeScheduler(other, optimizer, every=1).attach()
    train([*layers, *other], optimizer, 4)
    assert merges([*layers, *other]) == [4, 4]


def test_the_next_training_may_have_a_scheduler_of_its_own():
    layers = model(1)
    for _ in range(3):
        optimizer = torch.optim.Adam(layers.parameters(), lr=1e-3)
        scheduler = MergeScheduler(layers, optimizer, every=2).attach()
        train(layers, optimizer, 4)
        assert scheduler.steps == 4
    assert merges(layers) == [6]
    del optimizer
    for _ in range(2):  # the same cell twice
        attach_on_first_step(layers, every=1)
    train(layers, torch.optim.Adam(layers.parameters(), lr=1e-3), 2)
    assert merges(layers) == [8]


def test_an_attached_scheduler_is_not_stepped_twice():
    layers = model(1)
    optimizer = torch.optim.SGD(layers.parameters(), lr=1e-3)
    scheduler = MergeScheduler(layers, optimizer, every=2).attach()
    train(layers, optimizer, 1)
    with pytest.warns(UserWarning, match=r"the scheduler is attached: step\(\) need not be called"):
        scheduler.step()
    train(layers, optimizer, 1)
    scheduler.step()
    assert (scheduler.steps, *merges(layers)) == (2, 1)


def test_steps_are_counted_where_step_is_called_now_and_then():
    """bgflow's KLTrainer calls ``step()`` at the start of every so many steps."""
    for interval, every, expected in [(10, 10, 10), (10, 1, 10), (1, 10, 10), (4, 10, 9), (10, 20, 5)]:
        layers = model(1)
        optimizer = torch.optim.SGD(layers.parameters(), lr=1e-3)
        scheduler = MergeScheduler(layers, optimizer, every=every)
        for step in range(100):
            if step % interval == 0:
                scheduler.step()
            train(layers, optimizer, 1)
        assert abs(merges(layers)[0] - expected) <= 1, (interval, every)
        assert 91 <= scheduler.steps <= 100


def test_steps_that_nobody_tells_of_are_noticed():
    layers = model(1)
    optimizer = torch.optim.SGD(layers.parameters(), lr=1e-3)
    scheduler = MergeScheduler(layers, optimizer, every=1)
    train(layers, optimizer, 199)
    with pytest.warns(UserWarning, match=r"200 steps since MergeScheduler.step\(\) was called last"):
        train(layers, optimizer, 1)
    train(layers, optimizer, 300)  # it is said once
    assert scheduler.counters["merged"] == 0


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("inverse", [False, True])
def test_gradients_without_steps_are_noticed(attached, inverse):
    layers = model(1)
    scheduler = MergeScheduler(layers, torch.optim.SGD(layers.parameters(), lr=1e-3), every=1)
    if attached:
        scheduler.attach()

    def train_by_hand(steps):
        for _ in range(steps):
            x = torch.randn(2, N)
            (layers[0].inverse(x) if inverse else layers[0](x))[0].square().mean().backward()
            with torch.no_grad():
                for p in layers.parameters():
                    p -= 1e-3 * p.grad
            layers.zero_grad()

    train_by_hand(499)
    with pytest.warns(UserWarning, match=r"gradients 500 times since the last optimizer step .* call step\(\)"):
        train_by_hand(1)
    scheduler.step()  # and then it works
    assert merges(layers) == [1]


def test_a_scheduler_changes_nothing_for_copies_compilers_and_pickles():
    layers = model(1)
    optimizer = torch.optim.SGD(layers.parameters(), lr=1e-3)
    scheduler = MergeScheduler(layers, optimizer, every=1).attach()
    compiled = torch.compile(layers[0], backend="eager", fullgraph=True)
    compiled(torch.randn(2, N))[0].sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not copy.deepcopy(layers[0].U)._post_accumulate_grad_hooks
        pickle.dumps(layers)
    layers.share_memory()
    assert layers[0].U.is_shared()
    del scheduler


def test_the_repr_shows_the_state():
    layers = model()
    optimizer = torch.optim.SGD(layers.parameters(), lr=1e-3)
    scheduler = MergeScheduler(layers, optimizer)
    assert repr(scheduler) == "MergeScheduler(2 layers, every=each layer's own, not attached, steps=0, rounds=0)"
    scheduler = MergeScheduler(layers, optimizer, every=2).attach()
    train(layers, optimizer, 4)
    assert repr(scheduler) == "MergeScheduler(2 layers, every=2, attached, steps=4, rounds=2, merged=4)"


def test_each_kind_of_layer_has_its_own_interval():
    from p4flows import InvertibleLinear

    layers = nn.ModuleList([P4Inv(N, rank=1), InvertibleLinear(N)])
    optimizer = torch.optim.SGD(layers.parameters(), lr=1e-2)
    scheduler = MergeScheduler(layers, optimizer).attach()
    train(layers, optimizer, 20)
    assert layers[0].merges == 2
    assert layers[1].lag < 0.02
    assert scheduler.rounds == 20
    assert scheduler.counters["merged"] + scheduler.counters["forced"] == 22


def test_the_first_version_of_the_state_is_read():
    layers = model()
    scheduler = MergeScheduler(layers, torch.optim.SGD(layers.parameters(), lr=1e-3), every=3)
    counters = {"merged": 5, "forced": 1, "skipped": 2, "resets": 0, "corrections": 1, "inversions": 1}
    scheduler.load_state_dict({"version": 1, "steps": 13, "rounds": 4, "counters": counters})
    assert (scheduler.steps, scheduler.rounds) == (13, 4)
    assert {name: count for name, count in scheduler.counters.items() if name in counters} == counters
    for _ in range(2):
        scheduler.step()
    assert scheduler.rounds == 5


def test_a_step_does_not_walk_through_the_model(monkeypatch):
    """With a thousand modules a walk takes longer than all else that a scheduler does in a step without merges."""
    layers = nn.ModuleList([P4Inv(N, rank=1), *(nn.Linear(1, 1) for _ in range(20))])
    optimizer = torch.optim.SGD(layers.parameters(), lr=1e-3)
    scheduler = MergeScheduler(layers, optimizer, every=1).attach()
    train(layers[:1], optimizer, 1)
    walks = []
    named_modules = nn.Module.named_modules
    monkeypatch.setattr(nn.Module, "named_modules", lambda *a, **k: walks.append(a) or named_modules(*a, **k))
    train(layers[:1], optimizer, 5)
    assert scheduler.steps == 6
    assert not walks

"""What optimizers keep for a parameter means the same after a merge, or they are refused with advice."""

import copy

import pytest
import torch
from torch import nn

from p4flows import InvertibleLinear, MergeScheduler, P4Inv, P4Linear, report

N = 4
OPTIONS = {
    "Adadelta": {},
    "Adafactor": {},
    "Adagrad": {"initial_accumulator_value": 0.1},
    "Adam": {},
    "AdamW": {"amsgrad": True},
    "Adamax": {},
    "ASGD": {"t0": 1, "lambd": 1e-2},
    "Muon": {"momentum": 0.5},
    "NAdam": {},
    "RAdam": {},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "Rprop": {},
    "SGD": {"momentum": 0.9},
}
GRADIENTS = {"exp_avg", "momentum_buffer", "grad_avg", "prev"}
WEIGHTS = {"ax"}


def make(name, parameters, **more):
    if not hasattr(torch.optim, name):
        pytest.skip(f"this torch has no {name}")
    return getattr(torch.optim, name)(parameters, lr=1e-2, **OPTIONS[name], **more)


def gradients(layer, seed):
    torch.manual_seed(seed)
    for p in layer.parameters():
        p.grad = torch.randn_like(p) if p.requires_grad else None


def trained(layer, optimizer, steps=3):
    for i in range(steps):
        gradients(layer, i)
        optimizer.step()


def test_all_of_torch_are_here():
    known = {name for name, kind in vars(torch.optim).items() if isinstance(kind, type)}
    assert known - {"Optimizer", "LBFGS", "SparseAdam"} <= OPTIONS.keys()


@pytest.mark.parametrize("name", OPTIONS)
def test_state_that_starts_anew_is_that_of_a_new_optimizer(name):
    layer = P4Inv(N, rank=1, bias=False)
    optimizer = make(name, layer.parameters())
    scheduler = MergeScheduler(layer, optimizer, every=1, reset="all")
    trained(layer, optimizer)
    scheduler.merge()
    assert scheduler.counters["merged"] == 1
    other = copy.deepcopy(layer)
    new = make(name, other.parameters())
    for i in range(3):
        gradients(layer, 10 + i)
        gradients(other, 10 + i)
        optimizer.step()
        new.step()
        for p, q in zip(layer.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q)


@pytest.mark.parametrize("rank", [1, 2, N])
@pytest.mark.parametrize("name", OPTIONS)
def test_by_default_averages_of_gradients_change_and_nothing_else(name, rank):
    layer = P4Inv(N, rank=rank, bias=False)
    optimizer = make(name, [p for p in layer.parameters() if p.requires_grad])
    scheduler = MergeScheduler(layer, optimizer, every=1)
    trained(layer, optimizer)
    old, before = copy.deepcopy(layer), {p: copy.deepcopy(optimizer.state[p]) for p in layer.parameters()}
    scheduler.merge()
    T = None if rank == 1 else layer.carried(old.V.detach()[None], layer.V.detach()[None])[0]
    for p, q in zip(layer.parameters(), old.parameters(), strict=True):
        for entry, value in before[p].items():
            if entry in GRADIENTS:
                expected = torch.zeros_like(value) if T is None else value @ T
            elif entry in WEIGHTS:
                expected = p.detach() + (0 if T is None else (value - q.detach()) @ T)
            else:
                expected = value
            torch.testing.assert_close(optimizer.state[p][entry], expected, msg=entry)
    trained(layer, optimizer)


def test_a_moved_average_of_weights_evaluates_to_the_same():
    layer = P4Inv(N, dtype=torch.float64)
    optimizer = make("ASGD", [layer.U])
    scheduler = MergeScheduler(layer, optimizer, every=1)
    trained(layer, optimizer, 6)
    average = lambda: layer.A + optimizer.state[layer.U]["ax"] @ layer.V.mT  # noqa: E731
    before = average()
    assert (before - layer.matrix).abs().max() > 1e-3
    scheduler.merge()
    torch.testing.assert_close(average(), before)


# --- those that are not known -----------------------------------------------------------------------------------


class Plain(torch.optim.Optimizer):
    """Somebody's optimizer."""

    def __init__(self, params, lr=1e-2, **options):
        super().__init__(params, {"lr": lr, **options})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, self.state[p], group)
        return loss

    def update(self, p, state, group):
        state.setdefault("heat", torch.zeros_like(p)).lerp_(p.grad, 0.5)
        p.sub_(group["lr"] * state["heat"])


class Searching(Plain):
    """As Prodigy and D-Adaptation: they measure how far the weights have come."""

    def update(self, p, state, group):
        state.setdefault("p0", p.detach().flatten().clone())
        p.sub_(group["lr"] * p.grad)


class ScheduleFree(Plain):
    """As AdamWScheduleFree of facebookresearch/schedule_free, without second moments: p is y, or x after eval()."""

    def __init__(self, params, lr=1e-2, beta=0.9):
        super().__init__(params, lr, beta=beta, k=0, train=True)

    def update(self, p, state, group):
        z = state.setdefault("z", p.detach().clone())
        weight = 1 / (group["k"] + 1)
        p.lerp_(z, weight)
        p.add_(p.grad, alpha=group["lr"] * (group["beta"] * (1 - weight) - 1))
        z.sub_(group["lr"] * p.grad)

    def step(self, closure=None):
        loss = super().step(closure)
        self.param_groups[0]["k"] += 1
        return loss

    @torch.no_grad()
    def mode(self, train):
        for group in self.param_groups:
            for p in group["params"]:
                if "z" in self.state[p] and group["train"] != train:
                    p.lerp_(self.state[p]["z"], 1 - (group["beta"] if train else 1 / group["beta"]))
            group["train"] = train


class Lookahead(torch.optim.Optimizer):
    """As in github.com/alphadl/lookahead.pytorch."""

    def __init__(self, optimizer, k=5, alpha=0.5):
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.optimizer, self.k, self.alpha, self.counter = optimizer, k, alpha, 0
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["cached_params"] = p.detach().clone()

    @torch.no_grad()
    def step(self, closure=None):
        self.optimizer.step(closure)
        self.counter += 1
        if self.counter % self.k == 0:
            for group in self.param_groups:
                for p in group["params"]:
                    slow = self.state[p]["cached_params"]
                    slow.lerp_(p, self.alpha)
                    p.copy_(slow)


REFUSED = {
    "somebody's": (Plain, r"what Plain keeps for a parameter is not known.*InvertibleLinear works.*reset=.none."),
    "Prodigy": (Searching, r"what Searching keeps for a parameter is not known"),
    "LBFGS": (lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=1), r"LBFGS keeps a history of its steps"),
    "Lookahead": (
        lambda p: Lookahead(torch.optim.Adam(p)),
        r"Lookahead keeps a second copy of the weights.*Invertible",
    ),
    "schedule-free": (ScheduleFree, r"ScheduleFree keeps a second copy.*full rank.*InvertibleLinear works"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("layer", [lambda: P4Inv(N, rank=1), lambda: P4Inv(N, rank=2), lambda: P4Linear(3, 2)])
def test_unknown_optimizers_are_refused_at_construction(kind, layer):
    make, message = REFUSED[kind]
    layer = layer()
    optimizer = make(list(layer.parameters()))
    with pytest.raises(ValueError, match=message):
        MergeScheduler(layer, optimizer)
    if kind in ("LBFGS", "Lookahead", "schedule-free"):  # for these it would be wrong
        with pytest.raises(ValueError, match="keeps a"):
            MergeScheduler(layer, optimizer, reset="none")


@pytest.mark.parametrize("kind", REFUSED)
def test_a_dense_weight_goes_with_any_optimizer(kind):
    layer = InvertibleLinear(N)
    optimizer = REFUSED[kind][0](list(layer.parameters()))
    scheduler = MergeScheduler(layer, optimizer).attach()
    x = torch.randn(16, N)

    def closure():
        optimizer.zero_grad()
        y, logabsdet = layer(x)
        loss = (y.square().sum(-1) / 2 - logabsdet).mean()
        loss.backward()
        return loss

    first = closure().item()
    for _ in range(30):
        optimizer.zero_grad()
        closure()
        optimizer.step(closure)
    assert closure().item() < first
    assert layer.lag < 0.02
    assert scheduler.steps == 30


@pytest.mark.parametrize("layer", [P4Inv(N), InvertibleLinear(N)])
def test_many_evaluations_within_a_step_are_refused(layer):
    optimizer = torch.optim.LBFGS([p for p in layer.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match=r"LBFGS evaluates the loss many times in a step.*max_iter=1"):
        MergeScheduler(layer, optimizer)


def test_a_search_or_steps_elsewhere_are_refused_for_weights_that_are_followed():
    class SAM(torch.optim.SGD):
        """Evaluates the loss at shifted weights."""

    layer = InvertibleLinear(N)
    search = torch.optim.LBFGS(layer.parameters(), max_iter=1, line_search_fn="strong_wolfe")
    with pytest.raises(ValueError, match="no line search for InvertibleLinear"):
        MergeScheduler(layer, search)
    with pytest.raises(ValueError, match="SAM evaluates the loss where it moves the weights"):
        MergeScheduler(layer, SAM(layer.parameters(), lr=0.1))
    P4 = P4Inv(N)
    MergeScheduler(P4, SAM([P4.U, P4.bias], lr=0.1))
    MergeScheduler(layer, torch.optim.LBFGS(layer.parameters(), max_iter=1))


@pytest.mark.parametrize("kind", REFUSED)
def test_unknown_optimizers_are_refused_at_their_first_step_if_they_come_later(kind):
    layer = P4Inv(N, rank=1)
    scheduler = MergeScheduler(layer, None, every=1).attach()
    optimizer = REFUSED[kind][0](list(layer.parameters()))
    gradients(layer, 0)
    with pytest.raises(ValueError, match="optimizer: "):
        optimizer.step(lambda: torch.zeros(()))
    assert layer.U.abs().max() > 0
    assert scheduler.counters["merged"] == 0


def test_what_is_not_known_of_a_relative_is_refused_before_the_merge():
    class Warm(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            for p in self.param_groups[0]["params"]:
                self.state[p]["heat"] = torch.ones_like(p)

    layer = P4Inv(N, rank=1)
    optimizer = Warm(layer.parameters(), lr=1e-2, momentum=0.9)
    scheduler = MergeScheduler(layer, optimizer, every=1)
    trained(layer, optimizer)
    U = layer.U.detach().clone()
    with pytest.raises(ValueError, match=r"what Warm keeps as 'heat' is not known"):
        scheduler.step()
    assert torch.equal(layer.U, U)
    MergeScheduler(layer, optimizer, every=1, reset="none").step()
    assert layer.U.abs().max() == 0


def test_nothing_is_reset_where_that_was_asked_for_unless_copies_of_weights_would_be_wrong():
    layer = P4Inv(N, rank=1)
    optimizer = Plain(layer.parameters())
    scheduler = MergeScheduler(layer, optimizer, every=1, reset="none").attach()
    trained(layer, optimizer)
    assert optimizer.state[layer.U]["heat"].abs().max() > 0
    gradients(layer, 0)
    layer.U.grad[0] = torch.nan
    optimizer.step()
    assert scheduler.counters["resets"] == 1
    assert "heat" not in optimizer.state[layer.U]  # where the NaN was
    trained(layer, optimizer)
    assert layer.A.isfinite().all()
    scheduler.detach()

    optimizer = Searching(layer.parameters())
    scheduler = MergeScheduler(layer, optimizer, every=1, reset="none")
    trained(layer, optimizer)
    with pytest.raises(ValueError, match="Searching keeps a copy of the weights, 'p0'"):
        scheduler.step()


# --- copies of weights that are moved along ---------------------------------------------------------------------


@pytest.mark.parametrize("reset", ["momentum", "all", "none"])
def test_schedule_free_optimizers_evaluate_to_the_same_after_merges(reset):
    layers = nn.ModuleList([P4Inv(N, seed=i, dtype=torch.float64) for i in range(3)])
    optimizer = ScheduleFree([p for p in layers.parameters() if p.requires_grad], lr=0.05)
    scheduler = MergeScheduler(layers, optimizer, every=1, reset=reset)
    data = torch.randn(64, N, dtype=torch.float64) @ torch.randn(N, N, dtype=torch.float64)

    def nll():
        x, total = data, 0
        for layer in layers:
            x, logabsdet = layer(x)
            total = total + logabsdet
        return (x.square().sum(-1) / 2 - total).mean()

    def evaluated():
        optimizer.mode(train=False)
        with torch.no_grad():
            value = nll()
        optimizer.mode(train=True)
        return value

    first = evaluated()
    for step in range(60):
        optimizer.zero_grad()
        nll().backward()
        optimizer.step()
        if step % 5 == 4:
            before, here = evaluated(), nll()
            scheduler.merge()
            assert layers[0].U.abs().max() == 0
            torch.testing.assert_close(evaluated(), before)
            torch.testing.assert_close(nll(), here)
    assert scheduler.counters["merged"] == 36
    assert evaluated() < first - 0.5


# --- sharded parameters -----------------------------------------------------------------------------------------


@pytest.fixture
def process_group():
    """Two processes of which there is one; a real group of threads may abort or hang where a test drops its model."""
    if not torch.distributed.is_available():
        pytest.skip("torch was built without distributed")
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    torch.distributed.init_process_group("fake", store=fake.FakeStore(), rank=0, world_size=2)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("version", [1, 1.5, 2])
@pytest.mark.parametrize("layer", [lambda: P4Inv(N, rank=1), lambda: InvertibleLinear(N)])
def test_sharded_parameters_are_refused(process_group, version, layer):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    layers = nn.Sequential(layer())
    late = MergeScheduler(layers, None).attach()
    if version == 2:
        model = fully_shard(layers, mesh=init_device_mesh("cpu", (2,)))
    else:
        device = torch.device("cpu")
        model = FullyShardedDataParallel(layers, use_orig_params=version == 1.5, device_id=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with pytest.raises(ValueError, match=r"sharded over processes \(FSDP\).*DistributedDataParallel"):
        MergeScheduler(model, optimizer)
    with pytest.raises(ValueError, match=r"sharded over processes \(FSDP\)"):
        late.merge() if version != 1.5 else MergeScheduler(model, None)


@pytest.mark.filterwarnings("ignore")
def test_a_sharded_model_does_not_hinder_the_training_of_others(process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    layers = nn.Sequential(P4Inv(N))
    MergeScheduler(layers, None).attach()
    sharded = fully_shard(layers, mesh=init_device_mesh("cpu", (2,)))
    other = P4Inv(N)
    optimizer = torch.optim.SGD(other.parameters(), lr=1e-2)
    scheduler = MergeScheduler(other, optimizer, every=1).attach()
    other(torch.randn(4, N))[0].sum().backward()
    optimizer.step()
    assert scheduler.counters["merged"] == 1
    assert report(other).layers[""]["merges"] == 1
    mine = torch.optim.SGD(sharded.parameters(), lr=1e-2)
    for p in sharded.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.raises(ValueError, match=r"sharded over processes \(FSDP\)"):
        mine.step()

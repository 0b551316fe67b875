"""``report``: a look at every P4 layer of a model, through the contract alone."""

import copy
import json
import pickle

import pytest
import torch
from registry import LAYERS, N, matrix, perturb, train
from torch import nn

import p4flows
from p4flows import InvertibleLinear, MergeOutcome, MergeScheduler, P4Inv, P4InvStack, P4Layer, P4Linear, report

LINEAR = [name for name in LAYERS if "P4Inv" in name or "Invertible" in name]


class Scaling(P4Layer):
    """A kind of layer that the package does not know: a frozen factor, and a trained one."""

    def __init__(self):
        super().__init__()
        self.register_buffer("frozen", torch.ones(3))
        self.factor = nn.Parameter(torch.ones(3))

    perturbation = property(lambda self: (self.factor,))

    def merge(self, force=False):
        self.frozen.mul_(self.factor.detach())
        self.factor.data.fill_(1)
        return torch.tensor(int(MergeOutcome.MERGED))

    def reset(self):
        self.factor.data.fill_(1)

    def correct(self):
        return torch.tensor(0)

    def penalty(self):
        return torch.zeros(())

    def violation(self):
        return torch.zeros((), dtype=torch.float64)

    def diagnostics(self):
        return {"residual": torch.zeros(()), "roughness": self.factor.detach()}


@pytest.mark.parametrize("name", LINEAR)
def test_every_layer_of_the_registry(name):
    layer = perturb(LAYERS[name](N, dtype=torch.float64))
    before, state = copy.deepcopy(layer.state_dict()), torch.get_rng_state()
    row = next(iter(report(nn.ModuleDict({"layer": layer})).layers.values()))
    linear = next(module for module in layer.modules() if isinstance(module, P4Layer))
    M = linear.matrix.detach()
    signs, logabsdets = torch.linalg.slogdet(M)
    assert row["sign"] == signs.min()
    assert abs(row["logabsdet"]) == pytest.approx(logabsdets.abs().max().item(), rel=1e-9, abs=1e-12)
    exact = torch.linalg.matrix_norm(torch.eye(N) - linear.A @ linear.A_inv).max().item()
    assert exact / 10 <= row["residual"] <= 10 * exact + 1e-300
    assert row["residual"] < 1e-13
    assert row["condition"] == pytest.approx(torch.linalg.cond(linear.A).max().item(), rel=0.1)
    assert row["trained"]
    assert torch.equal(torch.get_rng_state(), state)
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_residual_is_that_of_the_rounded_pair(dtype):
    layer = P4Inv(64, init=matrix(64), dtype=dtype)
    exact = torch.linalg.matrix_norm(torch.eye(64) - layer.A.double() @ layer.A_inv.double()).item()
    assert torch.finfo(dtype).eps < exact
    assert report(layer).layers[""]["residual"] == pytest.approx(exact, rel=0.6)


def test_the_condition_is_estimated_closely_from_below():
    for n, spread in ((2, 1), (50, 3), (300, 6)):
        left, right = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q for _ in range(2))
        M = left @ torch.logspace(0, spread, n, dtype=torch.float64).diag() @ right
        estimate = report(P4Inv(n, init=M, dtype=torch.float64)).layers[""]["condition"]
        assert 0.7 * 10**spread < estimate < (1 + 1e-6) * 10**spread


def test_of_many_matrices_the_worst_is_told():
    stack = P4InvStack(3, depth=4, dtype=torch.float64)
    with torch.no_grad():
        stack.set_matrix(torch.stack([torch.diag(torch.tensor(d)).double() for d in MATRICES]))
        stack.A_inv[2, 0, 0] += 1e-3
    row = report(stack).layers[""]
    assert row["logabsdet"] == pytest.approx(torch.tensor(1e-3).log().item())
    assert row["sign"] == -1
    assert row["condition"] == pytest.approx(1e3)
    assert 1e-4 < row["residual"] < 1e-2


MATRICES = [[1.0, 1.0, 1.0], [1.0, 1.0, -2.0], [5.0, 1.0, 1.0], [1.0, 1.0, 1e-3]]


def test_a_residual_that_is_not_finite_is_seen():
    layer = P4Inv(4)
    with torch.no_grad():
        layer.A_inv[0, 0] = torch.nan
    assert report(layer).layers[""]["residual"] != report(layer).layers[""]["residual"]
    assert "nan" in str(report(layer))


# --- what became of merges ------------------------------------------------------------------------------------------


def training(model, steps, every=None, lr=1e-2, **options):
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    scheduler = MergeScheduler(model, optimizer, every, force_every=None, **options).attach()
    go_on(model, optimizer, steps)
    return optimizer, scheduler


def go_on(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        loss = 0
        for layer in model.values():
            y = layer(torch.randn(16, 3))
            y, logabsdet = y if isinstance(y, tuple) else (y, torch.zeros(()))
            loss = loss + (y.square().sum(-1) / 2 - logabsdet).mean()
        loss.backward()
        optimizer.step()


def model():
    layers = {"first": P4Inv(3, seed=1), "second": P4Inv(3, seed=2), "dense": InvertibleLinear(3)}
    layers |= {"stack": P4InvStack(3, depth=5), "plain": P4Linear(3, 3)}
    layers["stuck"] = P4Inv(3, seed=3, bounds_det=(50.0, None))
    return nn.ModuleDict(layers)


def test_merges_skips_and_lag():
    layers = model()
    _, scheduler = training(layers, 40)
    rows = report(layers).layers
    assert {name: (row["merges"], row["skips"]) for name, row in rows.items()} == {
        "first": (4, 0),
        "second": (4, 0),
        "dense": (40, 0),
        "stack": (20, 0),
        "plain": (4, 0),
        "stuck": (0, 4),
    }
    assert sum(row["merges"] for row in rows.values()) == scheduler.counters["merged"]
    assert sum(row["skips"] for row in rows.values()) == scheduler.counters["skipped"]
    assert rows["dense"]["lag"] == layers["dense"].lag
    assert [name for name, row in rows.items() if row["lag"] is None] == ["first", "second", "stack", "plain", "stuck"]
    assert rows["plain"]["residual"] is None


def test_without_a_scheduler_merges_are_not_known():
    layers = model()
    assert {row["merges"] for row in report(layers).layers.values()} == {None}
    assert "merges" not in str(report(layers))


def test_counts_by_layer_are_saved_copied_and_loaded():
    layers = model()
    optimizer, scheduler = training(layers, 20)
    saved = json.loads(json.dumps(scheduler.state_dict()))
    for scheduler_too in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        rows = report(scheduler_too.model).layers
        assert (rows["dense"]["merges"], rows["stuck"]["skips"]) == (20, 2)
        assert scheduler_too.state_dict() == scheduler.state_dict()
    del scheduler_too
    other = model()
    another, resumed = training(other, 0)
    resumed.load_state_dict(saved)
    assert resumed.state_dict() == scheduler.state_dict()
    assert resumed.counters == scheduler.counters
    go_on(other, another, 20)
    go_on(layers, optimizer, 20)
    assert resumed.state_dict() == scheduler.state_dict()
    assert report(other).layers["stack"]["merges"] == 20


def test_a_state_without_counts_by_layer_loads():
    layers = model()
    _, scheduler = training(layers, 20)
    state = scheduler.state_dict()
    del state["counters_by_layer"]
    other = model()
    another, resumed = training(other, 0)
    resumed.load_state_dict(state)
    assert resumed.counters == scheduler.counters
    assert report(other).layers["first"]["merges"] == 0
    go_on(other, another, 10)
    assert report(other).layers["first"]["merges"] == 1
    assert resumed.counters["merged"] == scheduler.counters["merged"] + 4 + 10 + 4


def test_layers_that_are_unfrozen_later_keep_their_counts():
    layers = model()
    layers["second"].requires_grad_(False)
    optimizer, _ = training(layers, 20)
    assert "P4Inv, frozen" in str(report(layers))
    assert (report(layers).layers["first"]["merges"], report(layers).layers["second"]["merges"]) == (2, 0)
    layers["second"].requires_grad_(True)
    go_on(layers, optimizer, 20)
    assert (report(layers).layers["first"]["merges"], report(layers).layers["second"]["merges"]) == (4, 2)


def test_the_share_is_the_part_of_the_time_between_steps(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("p4flows.training.share.time.perf_counter", lambda: clock[0])
    layers = nn.ModuleDict({"first": P4Inv(3), "second": P4Inv(3, seed=1), "dense": InvertibleLinear(3)})
    for kind, seconds in ((P4Inv, 1.0), (InvertibleLinear, 0.25)):
        monkeypatch.setattr(kind, "merge_all", classmethod(_slow(kind.merge_all.__func__, clock, seconds)))
    optimizer, _ = training(layers, 1, every=1)
    assert {row["share"] for row in report(layers).layers.values()} == {None}  # there is no time between steps yet
    for _ in range(4):
        clock[0] += 3.75  # what else a step takes
        go_on(layers, optimizer, 1)
    shares = {name: row["share"] for name, row in report(layers).layers.items()}
    assert shares == pytest.approx({"first": 0.1, "second": 0.1, "dense": 0.05})  # of 5 seconds
    assert "10.0%" in str(report(layers))


def _slow(merge_all, clock, seconds):
    def slower(cls, layers, force=False):
        clock[0] += seconds
        return merge_all(cls, layers, force)

    return slower


# --- ways to read it ------------------------------------------------------------------------------------------------


def test_a_layer_of_another_kind():
    model = nn.ModuleDict({"scaling": Scaling(), "linear": P4Inv(3)})
    found = report(model)
    assert found.layers["scaling"]["roughness"] == 1
    assert found.layers["linear"]["roughness"] is None
    lines = str(found).splitlines()
    assert [line.split()[:2] for line in lines] == [["layer", "kind"], ["scaling", "Scaling"], ["linear", "P4Inv"]]
    assert "roughness" in lines[0]


def test_the_table_has_a_column_for_what_there_is():
    layers = model()
    training(layers, 20)
    lines = str(report(layers)).splitlines()
    assert lines[0].split() == ["layer", "kind", *QUANTITIES]
    assert len({len(line) for line in lines}) == 1
    assert lines[-1].split()[0:2] == ["stuck", "P4Inv"]
    assert str(report(P4Linear(2, 2))).split() == ["layer", "kind", "(model)", "P4Linear"]


QUANTITIES = ["residual", "logabsdet", "sign", "condition", "lag", "merges", "skips", "share"]


class Writer:
    def __init__(self):
        self.written = []

    def add_scalar(self, tag, value, step):
        self.written.append((tag, value, step))


def test_scalars_for_a_writer():
    layers = model()
    training(layers, 20)
    found, writer = report(layers), Writer()
    found.write(writer, 20)
    assert {tag: value for tag, value, _ in writer.written} == found.scalars()
    assert {step for *_, step in writer.written} == {20}
    assert found.scalars()["p4flows/dense/merges"] == 20
    assert "p4flows/first/lag" not in found.scalars()
    assert set(report(layers["first"]).scalars("flow")) == {f"flow/{name}" for name in QUANTITIES if name != "lag"}
    json.dumps(found.layers)
    with pytest.raises(ValueError, match="writer: expected an object with add_scalar, got list"):
        found.write([], 0)


def test_scalars_for_tensorboard(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    layers = model()
    training(layers, 20)
    with tensorboard.SummaryWriter(tmp_path) as writer:
        report(layers).write(writer, 20)
    read = events.EventAccumulator(str(tmp_path))
    read.Reload()
    (event,) = read.Scalars("p4flows/dense/merges")
    assert (event.step, event.value) == (20, 20)


def test_layers_in_a_trained_flow_are_found_by_their_names():
    stack = train(LAYERS["P4InvStack"](N, dtype=torch.float64))
    assert list(report(nn.Sequential(nn.Linear(2, 2), stack)).layers) == ["1"]


@pytest.mark.parametrize(("model", "message"), [(3, "got int"), (nn.Linear(2, 2), "one with a P4 layer")])
def test_wrong_models(model, message):
    with pytest.raises(ValueError, match=message):
        report(model)
    assert p4flows.Report is type(report(P4Inv(2)))

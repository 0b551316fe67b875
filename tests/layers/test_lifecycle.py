"""What happens to layers outside of training: checkpoints, copies, averages, conversions, export."""

import copy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from registry import matrix, train
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim import swa_utils

from p4flows import AveragedModel, MergeScheduler, P4Inv, P4InvStack, P4Linear

DATA = Path(__file__).parent.parent / "data"


def assert_equal(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        for left, right in zip(a, b, strict=True):
            assert_equal(left, right)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


# --- checkpoints --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    subprocess.run(
        [sys.executable, "tests/training/resumable_training.py", folder], check=True, stdout=subprocess.DEVNULL
    )
    return torch.load(folder / "last.pt", weights_only=True)


@pytest.mark.parametrize("kills", [[1, 150, 295], [42, 43, 200, 399]])
def test_a_training_that_was_killed_goes_on_bit_for_bit(tmp_path, uninterrupted, kills):
    command = [sys.executable, "tests/training/resumable_training.py", tmp_path]
    for kill in kills:
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                if int(line) >= kill:
                    process.send_signal(signal.SIGKILL)
                    break
        assert process.returncode == -signal.SIGKILL
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert uninterrupted["scheduler"]["counters"]["corrections"] > 0
    assert_equal(torch.load(tmp_path / "last.pt", weights_only=True), uninterrupted)


def test_state_written_by_version_1_loads():
    state = torch.load(DATA / "version_1.pt", weights_only=True)
    model = nn.ModuleDict({"layer": P4Inv(4, rank=2), "stack": P4InvStack(2, 3)})
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scheduler = MergeScheduler(model, optimizer, every=3)
    for name, part in (("model", model), ("optimizer", optimizer), ("scheduler", scheduler)):
        part.load_state_dict(state[name])
    x = state["x"]
    outputs = {"layer": model["layer"](x), "inverse": model["layer"].inverse(x), "stack": model["stack"](x[:, :2])}
    torch.testing.assert_close(outputs, state["outputs"], rtol=1e-5, atol=1e-6)
    assert scheduler.counters.items() >= state["scheduler"]["counters"].items()
    assert scheduler.steps == 40
    for _ in range(6):
        optimizer.zero_grad()
        sum(out.square().sum() for out in (*model["layer"](x), *model["stack"](x[:, :2]))).backward()
        optimizer.step()
        scheduler.step()
    assert scheduler.counters["merged"] > state["scheduler"]["counters"]["merged"]
    assert model["layer"].residual() < 1e-6


def test_state_written_by_version_2_loads():
    state = torch.load(DATA / "version_2.pt", weights_only=True)
    layers = {"layer": P4Inv(4, rank=2), "stack": P4InvStack(2, 3), "default": P4Inv(9), "linear": P4Linear(4, 3)}
    model = nn.ModuleDict(layers)  # the default rank was 1 then
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scheduler = MergeScheduler(model, optimizer, every=3)
    for name, part in (("model", model), ("optimizer", optimizer), ("scheduler", scheduler)):
        part.load_state_dict(state[name])
    x = state["x"]
    outputs = {name: layer(x[:, :n]) for (name, layer), n in zip(layers.items(), (4, 2, 9, 4), strict=True)}
    outputs["inverse"] = model["layer"].inverse(x[:, :4])
    torch.testing.assert_close(outputs, {name: state["outputs"][name] for name in outputs}, rtol=1e-5, atol=1e-6)
    assert scheduler.counters.items() >= state["scheduler"]["counters"].items()
    assert torch.equal(model["default"].A_double, state["model"]["default.A_double"])
    x = torch.randn(8, 9)
    for _ in range(3):
        optimizer.zero_grad()
        sum(layer(x[:, :n])[0].square().sum() for layer, n in zip(layers.values(), (4, 2, 9), strict=False)).backward()
        optimizer.step()
        scheduler.step()
    assert scheduler.counters["merged"] > state["scheduler"]["counters"]["merged"]


@pytest.mark.parametrize("stored", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("loaded", [torch.float32, torch.float64])
def test_state_loads_into_a_layer_of_another_dtype(stored, loaded):
    layer = train(P4Inv(6, dtype=torch.float32), 30).to(stored)
    other = P4Inv(6, dtype=loaded)
    other.load_state_dict(layer.state_dict())
    exact = layer.A if stored == torch.float64 else layer.A_double
    assert torch.equal(other.A if loaded == torch.float64 else other.A_double, exact)
    assert other.A.dtype == other.U.dtype == loaded
    assert torch.equal(other.logabsdet_A, layer.logabsdet_A)


def test_a_state_dict_that_lacks_a_matrix_is_refused():
    state = P4Inv(3).state_dict()
    del state["tracked.A"], state["tracked.A_double"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"tracked.A", "tracked.A_double"'):
        P4Inv(3).load_state_dict(state)


# --- conversions --------------------------------------------------------------------------------------------


def test_conversions_keep_what_the_matrices_are_rounded_from():
    layer = train(P4Inv(6, dtype=torch.float32), 30)
    A, A_inv = layer.A_double.clone(), layer.A_inv_double.clone()
    for convert in ("float", "half", "bfloat16", "float", "double"):
        getattr(layer, convert)()
        assert layer.A.dtype == layer.U.dtype
        if convert != "double":
            assert layer.A_double.dtype == torch.float64
            assert torch.equal(layer.A, A.to(layer.A.dtype))
    assert layer.A_double is None
    assert torch.equal(layer.A, A)
    assert torch.equal(layer.A_inv, A_inv)
    layer.float()
    assert torch.equal(layer.A_double, A)
    assert layer.merge() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("assign", [False, True])
def test_through_the_meta_device(dtype, assign):
    layer = train(P4Inv(6, rank=2, dtype=dtype), 30)
    other = copy.deepcopy(layer).to("meta")
    if not assign:
        other.to_empty(device="cpu")
    other.load_state_dict(copy.deepcopy(layer.state_dict()), assign=assign)
    assert_equal(dict(other.state_dict()), dict(layer.state_dict()))
    for each in (layer, other):
        torch.manual_seed(1)
        train(each, 20)
    assert_equal(dict(other.state_dict()), dict(layer.state_dict()))


def test_parameters_as_one_vector():
    layers = nn.ModuleList(P4Inv(4, seed=i) for i in range(3))
    reference = copy.deepcopy(layers)
    groups = [P4Inv.group(each) for each in (layers, reference)]
    P4Inv.merge_all(groups[0])
    P4Inv.merge_all(groups[1])
    vector = parameters_to_vector(layers.parameters()) + 0.1
    vector_to_parameters(vector, layers.parameters())  # the parameters now live in `vector`
    with torch.no_grad():
        for p in reference.parameters():
            p += 0.1
    for group in groups:
        assert P4Inv.merge_all(group).tolist() == [1, 1, 1]
    assert_equal(dict(layers.state_dict()), dict(reference.state_dict()))


def test_a_shallow_copy_shares_its_tensors():
    layer = train(P4Inv(6), 30)
    other = copy.copy(layer)
    x = torch.randn(3, 6)
    layer.merge()
    assert_equal(layer(x), other(x))


def test_functional_call_with_other_matrices():
    layer = P4Inv(4, dtype=torch.float64)
    M = matrix(4)
    sign, logabsdet = torch.linalg.slogdet(M)
    state = {"A": M, "A_inv": torch.linalg.inv(M), "logabsdet_A": logabsdet, "sign_A": sign}
    x = torch.randn(3, 4, dtype=torch.float64)
    y, total = torch.func.functional_call(layer, state, (x,))
    torch.testing.assert_close(y, x @ M.T)
    torch.testing.assert_close(total, logabsdet.expand(3))
    assert torch.equal(layer.A, torch.eye(4, dtype=torch.float64))


# --- training aids ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [lambda: P4Inv(6, rank=2, seed=1), lambda: P4Inv(6, rank=1), lambda: P4InvStack(6, 3, seed=1)],
    ids=["P4Inv", "P4Inv-rank1", "P4InvStack"],
)
def test_training_under_autocast_keeps_perturbations_and_determinants_in_full_precision(make):
    torch.manual_seed(0)
    layer = make()
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    scheduler = MergeScheduler(layer, optimizer, every=3)
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, logabsdet = layer(torch.randn(16, 6))
            x, inverse_logabsdet = layer.inverse(torch.randn(16, 6))
        assert logabsdet.dtype == inverse_logabsdet.dtype == torch.float32
        torch.testing.assert_close(logabsdet[0], -inverse_logabsdet[0] if isinstance(layer, P4Inv) else logabsdet[0])
        (
            y.float().square().sum(-1) / 2 - logabsdet + x.float().square().sum(-1) / 2 - inverse_logabsdet
        ).mean().backward()
        optimizer.step()
        scheduler.step()
    assert {layer.U.dtype, layer.V.dtype, layer.A.dtype, layer.U.grad.dtype} == {torch.float32}
    assert scheduler.counters["merged"] > 0
    assert layer.residual().max() < 1e-5
    torch.testing.assert_close(layer.logabsdet_A, torch.linalg.slogdet(layer.A.double())[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 2, None])
def test_weight_decay_pulls_towards_the_frozen_matrix(rank):
    layer = train(P4Inv(6, rank, bias=False), 30)
    A = layer.A.clone()
    distance = (layer.matrix - A).norm()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(20):
        for p in layer.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        optimizer.step()
    trained = 2 if rank == 1 else 1  # U and V, or U alone
    torch.testing.assert_close((layer.matrix - A).norm(), distance * (1 - 0.05) ** (20 * trained))
    torch.testing.assert_close(layer.A, A, rtol=0, atol=0)


def test_gradient_clipping():
    layer = P4Inv(6)
    y, _ = layer(100 * torch.randn(8, 6))
    y.square().sum().backward()
    assert nn.utils.clip_grad_norm_(layer.parameters(), 1.0) > 1
    norms = [p.grad.norm() for p in layer.parameters() if p.grad is not None]
    torch.testing.assert_close(torch.stack(norms).norm(), torch.tensor(1.0))


# --- averages -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.8)}, {"avg_fn": swa_utils.get_ema_avg_fn(0.8)}],
    ids=["swa", "ema", "ema-avg_fn"],
)
@pytest.mark.parametrize("make", [lambda: P4Inv(6, rank=2, seed=1), lambda: P4InvStack(6, 3, seed=1)])
def test_averages_are_those_of_the_effective_matrices(make, options, use_buffers):
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": make(), "other": nn.Linear(2, 2)})
    layer = model["layer"]
    if use_buffers and not options:
        pytest.skip("torch cannot take the mean of integer buffers")
    averaged = AveragedModel(model, use_buffers=use_buffers, **options)
    mean, bias = None, None
    for i in range(12):
        train(layer, 9)
        model["other"].weight.data.normal_()
        averaged.update_parameters(model)
        weight = 1 / (i + 1) if not options else 0.2
        current = layer.matrix.detach().double()
        mean = current if mean is None else mean + weight * (current - mean)
        bias = layer.bias.detach().clone() if bias is None else bias + weight * (layer.bias.detach() - bias)
    result = averaged.module["layer"]
    torch.testing.assert_close(result.matrix.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result.bias, bias)
    sign, logabsdet = torch.linalg.slogdet(mean)
    assert torch.equal(result.sign, sign)
    torch.testing.assert_close(result.logabsdet, logabsdet, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.inverse_matrix.double(), torch.linalg.inv(mean), rtol=1e-4, atol=1e-4)
    assert not torch.equal(averaged.module["other"].weight, model["other"].weight)


def test_a_plain_average_is_refused():
    model = nn.Sequential(P4Inv(4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="use p4flows"):
        swa_utils.AveragedModel(model)
    swa_utils.AveragedModel(model.requires_grad_(False))  # constant: its average is itself
    swa_utils.AveragedModel(nn.Linear(2, 2))


@pytest.mark.parametrize(
    "M",
    [
        torch.zeros(3, 3),
        torch.full((3, 3), torch.nan),
        torch.eye(2),
        torch.eye(3) * 1j,
        1e39 * torch.eye(3).double(),
        3.0,
    ],
)
def test_set_matrix_refuses_what_cannot_be_inverted(M):
    layer = P4Inv(3, rank=2)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match="M: expected"):
        layer.set_matrix(M)
    assert_equal(dict(layer.state_dict()), dict(before))


# --- export -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("inverse", [False, True])
def test_export_to_a_plain_linear_layer(bias, inverse):
    layer = train(P4Inv(6, rank=2, bias=bias), 30)
    linear = layer.to_linear(inverse)
    assert type(linear) is nn.Linear
    assert not any(p.requires_grad for p in linear.parameters())
    x = torch.randn(5, 6)
    torch.testing.assert_close(linear(x), (layer.inverse if inverse else layer)(x)[0], rtol=1e-5, atol=1e-5)
    layer.merge()
    assert torch.equal(layer.to_linear(inverse).weight, layer.to_linear(inverse).weight)

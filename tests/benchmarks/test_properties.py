"""benchmarks/properties, on small settings."""

import math

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("mlxtend")

from running import call

from benchmarks.properties import lipschitz, orthogonal, properties, ranks
from benchmarks.properties.following import Following
from benchmarks.properties.reflections import Reflections
from p4flows import P4Conv2d, P4Linear
from p4flows.testing import check_perturbation


def test_properties(monkeypatch, tmp_path):
    arguments = f"properties --quick --parts {tmp_path / 'parts'}"
    results = call(monkeypatch, tmp_path, arguments)
    installed = [name for name in orthogonal.METHODS if not any(name in line for line in results["left_out"])]
    assert len(installed) >= 7
    for problem in ("rotation", "ica"):
        assert [row["method"] for row in results[problem]] == installed
        assert all(row["defect"] < 1e-5 for row in results[problem])
    assert all(row["error"][-1] < row["error"][0] for row in results["rotation"])
    assert max(max(row["defect"]) for row in results["drift"]) < 1e-6
    assert {row["method"] for row in results["lipschitz"]} == set(lipschitz.METHODS)
    assert max(max(row["frozen"]) for row in results["lipschitz"] if row["method"].startswith("P4")) <= 1
    assert {row["method"] for row in results["ranks"]} == set(ranks.METHODS)
    assert {tuple(claim) for claim in results["claims"]} == {("claim", "paper", "rule", "ours", "holds")}
    for name in properties.FILES:
        assert (tmp_path / name).exists()

    def only_missing(method, **_):
        assert method not in installed, "trained again"
        raise ModuleNotFoundError(method)

    monkeypatch.setattr(orthogonal, "train_rotation", only_missing)
    again = call(monkeypatch, tmp_path, arguments)
    assert again["rotation"] == results["rotation"]
    timed = call(monkeypatch, tmp_path, f"properties --timing --parts {tmp_path / 'none'}")
    assert timed["ranks"] == results["ranks"]
    assert timed["timing"] != again["timing"]
    assert not list((tmp_path / "none").iterdir())


def test_times_need_results(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="--timing: expected results of an earlier run in"):
        call(monkeypatch, tmp_path, f"properties --timing --parts {tmp_path / 'parts'}")


@pytest.mark.parametrize("name", orthogonal.METHODS)
def test_all_orthogonal_layers_start_as_the_identity(name):
    pytest.importorskip("geotorch") if name == "geotorch" else None
    layer, x = orthogonal.METHODS[name](8), torch.randn(3, 8)
    torch.testing.assert_close(orthogonal.forward(layer, x), x)


@pytest.mark.parametrize("rank", [1, 3])
def test_the_layers_that_are_compared_keep_the_contract(rank):
    check_perturbation(lambda: Reflections(6, rank, seed=1), steps=100, skip=["half_precision"])
    check_perturbation(lambda: Following(torch.nn.Linear(6, 4), rank), steps=100, skip=["half_precision"])


def test_reflections_start_to_move_as_rotations_do():
    G = torch.randn(8, 8)
    gradients = []
    for layer in (orthogonal.P4Orthogonal(8, 3, bias=False, seed=1), Reflections(8, 3, seed=1)):
        gradients.append(torch.autograd.grad((layer.matrix * G).sum(), layer.U)[0])
    torch.testing.assert_close(*gradients)


def test_amari_s_distance():
    mixing = torch.randn(5, 5, dtype=torch.float64)
    W = torch.linalg.inv(mixing)
    P = torch.diag(torch.tensor([2.0, -1, 3, 1, 1], dtype=torch.float64))[torch.tensor([2, 0, 1, 4, 3])]
    assert orthogonal.amari(P @ W, mixing) < 1e-12
    assert 0.1 < orthogonal.amari(torch.randn(5, 5, dtype=torch.float64), mixing) <= 1


def test_sources_can_be_unmixed():
    z, mixing = orthogonal.ica(4)
    torch.testing.assert_close(z.T @ z / len(z), torch.eye(4, dtype=torch.float64))
    assert orthogonal.amari(torch.linalg.inv(mixing), mixing) < 1e-12
    assert orthogonal.fast_ica(4) < 0.03
    s = orthogonal.sources(2, 100_000, torch.Generator().manual_seed(0))
    assert s.var(0).tolist() == pytest.approx([1, 1], abs=0.02)


@pytest.mark.parametrize("method", lipschitz.METHODS)
def test_the_density_of_a_residual_network_is_that_of_its_jacobian(method):
    flow = lipschitz.ResidualFlow(lipschitz.METHODS[method][0], blocks=2, hidden=8).eval()
    x = torch.randn(5, 2)

    def image(x):
        for block in flow.blocks:
            x = block(x[None])[0][0]
        return x

    for row, found in zip(x, flow.log_prob(x), strict=True):
        logabsdet = torch.linalg.slogdet(torch.autograd.functional.jacobian(image, row))[1]
        expected = logabsdet - image(row).square().sum() / 2 - math.log(2 * math.pi)
        torch.testing.assert_close(found, expected)
    if method != "no bound":
        assert flow.norms() <= 1 + 1e-3
        with torch.no_grad():
            assert flow.round_trip(x) < 1e-5


def test_networks_of_all_ranks_start_alike():
    networks = {name: make(replica=1).eval() for name, make in ranks.METHODS.items()}
    x = torch.randn(2, 1, 28, 28)
    for model in networks.values():
        torch.testing.assert_close(model(x), networks["standard"](x))
    kinds = [type(module) for module in networks["rank 16, convolutions too"]]
    assert (kinds.count(P4Conv2d), kinds.count(P4Linear)) == (2, 2)
    assert [module.rank for module in networks["rank 64"] if isinstance(module, P4Linear)] == [64, 10]

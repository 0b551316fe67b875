"""benchmarks/mixing, on small settings: that mixes are what they say, and that trainings can be repeated."""

import pytest
import torch

pytest.importorskip("nflows")
pytest.importorskip("openmm")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from running import call

from benchmarks.mixing import perturbation, swaps
from benchmarks.mixing.mixes import MIXES, PERMUTATIONS, put_between
from benchmarks.paper.realnvp import real_nvp


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

"""benchmarks/mixing, on small settings: that mixes are what they say, and that trainings can be repeated."""

import pytest
import torch

pytest.importorskip("nflows")
pytest.importorskip("openmm")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from nflows.transforms import LULinear
from running import call

from benchmarks.mixing import perturbation, swaps, training
from benchmarks.mixing.data import load
from benchmarks.mixing.masked_lu import MaskedLU
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
    assert all(p.grad is not None for p in flow.parameters() if p.requires_grad)


@pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated")
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_masked_lu_is_the_lu_of_nflows(direction):
    n = 5
    theirs, ours = LULinear(n, identity_init=False), MaskedLU(n)
    with torch.no_grad():
        theirs.bias.normal_()
        ours.triangles[theirs.lower_indices] = theirs.lower_entries
        ours.triangles[theirs.upper_indices] = theirs.upper_entries
        ours.diagonal.copy_(theirs.unconstrained_upper_diag)
        ours.bias.copy_(theirs.bias)
    x, weights = torch.randn(7, n), torch.randn(7, n)
    for layer in (theirs, ours):
        y, logabsdet = getattr(layer, direction)(x)
        ((weights * y).sum() + 3 * logabsdet.sum()).backward()
    torch.testing.assert_close(getattr(ours, direction)(x), getattr(theirs, direction)(x), rtol=1e-4, atol=1e-5)
    gradient = ours.triangles.grad
    close = {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(gradient[theirs.lower_indices], theirs.lower_entries.grad, **close)
    torch.testing.assert_close(gradient[theirs.upper_indices], theirs.upper_entries.grad, **close)
    torch.testing.assert_close(ours.diagonal.grad, theirs.unconstrained_upper_diag.grad, **close)
    assert not gradient.diagonal().any()


def test_without_couplings_the_flow_is_one_mix():
    flow, optimizer, scheduler = training.build(6, 0, "P4Inv", seed=0, hidden=8, net_rate=1e-3, mix_rate=1e-2, rank=2)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2]
    x = torch.randn(8, 6)
    assert flow.transform_to_noise(x).equal(x.flip(-1))
    (-flow.log_prob(x).mean()).backward()
    optimizer.step()
    assert scheduler.steps == 1
    assert not flow.transform_to_noise(x).equal(x.flip(-1))


def test_swaps(monkeypatch, tmp_path):
    parts = f"--jobs 1 --parts {tmp_path / 'parts'}"
    results = call(monkeypatch, tmp_path, f"swaps --quick --data breast-cancer {parts}")
    fixed, learned = ("reversed", "random"), ("LU", "dense", "P4Inv, rank 1", "P4Inv", "InvertibleLinear")
    rows = {row["mix"]: row for row in results["rows"]}
    assert set(rows) == {*fixed, *learned}
    for mix, row in rows.items():
        assert row["validation"] <= row["last_validation"] + 1e-9
        assert row["step"] <= row["steps"] == 20
        # The grid is bracketed: so short a training takes all the learning rate that it can get.
        assert set(row["tried"]) == ({"net_rate"} if mix in fixed else {"net_rate", "mix_rate"})
        for option, found in row["tried"].items():
            # Neither rate can be changed by itself to any good.
            assert found[f"{row[option]:g}"] == min(found.values()) == row["validation"]
        assert len(row["tried"]["net_rate" if mix in fixed else "mix_rate"]) == 5
        assert ("equal_time" in row) == (mix in learned)
        assert row.get("equal_time", row)["steps"] <= row["steps"]
    # After 20 steps matrices are far ahead of permutations, and a perturbation of full rank of one of rank 1.
    test = {mix: row["test"] for mix, row in rows.items()}
    assert max(test[mix] for mix in ("LU", "dense", "P4Inv", "InvertibleLinear")) < test["P4Inv, rank 1"]
    assert test["P4Inv, rank 1"] < test["reversed"]
    assert [row["holds"] for row in results["claims"]] == [True] * 5
    assert swaps.table(results).splitlines()[-1].count("**") == 2  # one is the best


def test_splines(monkeypatch, tmp_path):
    mixes = ("reversed", "LU", "P4Inv", "InvertibleLinear")
    monkeypatch.setattr(swaps, "MIXES", {mix: swaps.MIXES[mix] for mix in mixes})
    monkeypatch.setattr(swaps, "_FIXED", mixes[:1])
    monkeypatch.setattr(swaps, "_LEARNED", mixes[1:])
    monkeypatch.setattr(swaps, "_RATES", (8e-3,))
    parts = f"--jobs 1 --parts {tmp_path / 'parts'}"
    results = call(monkeypatch, tmp_path, f"splines --quick --data breast-cancer {parts}")
    assert [(row["mix"], row["splines"], row["couplings"]) for row in results["rows"]] == [
        (mix, True, 2) for mix in mixes
    ]
    test = {row["mix"]: row["test"] for row in results["rows"]}
    assert max(test[mix] for mix in mixes[1:]) < test["reversed"]
    (claim,) = results["claims"]
    assert claim["holds"] == (min(test["P4Inv"], test["InvertibleLinear"]) <= test["LU"])


def test_swaps_of_equal_settings_are_equal():
    setting = {"data": "breast-cancer", "couplings": 2, "mix": "P4Inv", "rank": 8, "seed": 3, "steps": 12}
    setting |= {"batch": 32, "hidden": 8, "net_rate": 1e-3, "frames": 0}
    same, again = (training.train(**setting)["test"] for _ in range(2))
    assert same == again
    assert training.train(**setting, reset="all", every=4)["test"] != same
    assert training.train(**setting, mix_rate=1e-5)["test"] > same


def test_data_have_three_parts():
    parts = load("digits", 1)
    assert [len(part) for part in parts] == [1079, 359, 359]
    torch.testing.assert_close(parts[0].mean(0), torch.zeros(64), atol=1e-5, rtol=0)
    rows = {tuple(row) for part in parts for row in part.tolist()}
    assert len(rows) == 1797  # no row is in two of them
    assert load("image-patches-16")[0].shape == (12_000, 256)


def test_perturbation(monkeypatch, tmp_path):
    parts = f"--jobs 1 --parts {tmp_path / 'parts'}"
    results = call(monkeypatch, tmp_path, f"perturbation --quick {parts}")
    assert perturbation.ranks(64) == [1, 8, 16, 32, 64]
    assert perturbation.ranks(1024) == [1, 8, 16, 64, 256, 512]
    assert len(results["rows"]) == 2 + 2 * 8 + 4 * (6 + 5)
    lines = perturbation.table(results).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    # One learning rate serves all ranks: so few steps want a high one, and a higher rank learns more at each.
    by = {(row["n"], row.get("rank"), row.get("mix_rate")): row["validation"] for row in results["rows"]}
    for rate in (1e-3, 8e-3):
        assert by[64, 64, rate] < by[64, 16, rate] < by[64, 1, rate]

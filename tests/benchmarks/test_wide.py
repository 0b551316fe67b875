"""benchmarks/speed/wide, on small settings: its data, its clock, its learning rates, and what it makes of them."""

import math
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("nflows")
pytest.importorskip("openmm")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from running import call
from scipy.fft import dctn

from benchmarks.speed import wide, wide_data, wide_training
from benchmarks.speed.wide_claims import claims
from benchmarks.speed.wide_curves import best_of_ours, earlier, end, kept
from benchmarks.speed.wide_data import Gaussian, Patches
from benchmarks.speed.wide_rates import GRID, climb

CPU = torch.device("cpu")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- data ---------------------------------------------------------------------------------------------------


def test_patches_of_the_parts_come_from_different_blocks(monkeypatch):
    blocks = np.arange(20.0).reshape(4, 5).repeat(106, 0).repeat(128, 1)[..., None] * np.ones(3)
    images = [10 * np.pad(blocks + first, [(0, 3), (0, 0), (0, 0)]) for first in (0, 20)]
    monkeypatch.setattr(wide_data, "load_sample_images", lambda: Namespace(images=images))
    source = Patches(64 * 64, CPU)
    found = {}
    for part in ("training", "validation", "test"):
        x = source.draw(300, generator(), part)
        assert x.shape == (300, source.features) == (300, 4096)
        blocks = (x * source._deviation + source._mean).div(10, rounding_mode="floor")
        assert blocks.eq(blocks[:, :1]).all()  # no patch reaches beyond its block
        found[part] = set(blocks[:, 0].tolist())
    assert {part: len(blocks) for part, blocks in found.items()} == {"training": 24, "validation": 8, "test": 8}
    assert set.union(*found.values()) == set(range(40))


def test_patches_are_standardised_and_their_energy_is_that_of_cosines():
    source = Patches(64, CPU)
    x = source.draw(4_000, generator(1))
    assert abs(x.mean()) < 0.1
    assert abs(x.std() - 1) < 0.1
    assert not x.equal(source.draw(4_000, generator(2)))
    coefficients = dctn(x.view(-1, 8, 8).double().numpy(), axes=(1, 2), norm="ortho")
    variances = source._variances.double().numpy()
    np.testing.assert_allclose(np.maximum((coefficients**2).mean(0), 0.05), variances, rtol=0.15)
    energy = (coefficients**2 / variances + np.log(2 * math.pi * variances)).sum((1, 2)) / 2
    np.testing.assert_allclose(source.energy(x), energy, rtol=1e-4, atol=1e-3)
    assert not source.known


@pytest.mark.parametrize("n", [50, 107**2])
def test_patches_are_squares_that_fit_into_a_block(n):
    with pytest.raises(ValueError, match=rf"^n: expected the square of a number up to 106, got {n}$"):
        Patches(n, CPU)


def test_the_energy_of_the_gaussian_is_its_own():
    source = Gaussian(6, CPU)
    x = source.draw(200_000, generator())
    covariance = x.T.double().cov()
    assert abs(covariance.diagonal().mean() - 1) < 0.01
    assert torch.linalg.eigvalsh(covariance).log().diff() == pytest.approx([math.log(100) / 5] * 5, rel=0.03)
    assert (covariance - covariance.diagonal().diag()).abs().max() > 0.1
    exact = torch.distributions.MultivariateNormal(torch.zeros(6).double(), covariance)
    torch.testing.assert_close(source.energy(x).double(), -exact.log_prob(x.double()), rtol=0.02, atol=0.1)
    assert source.known


# --- training for so many seconds ---------------------------------------------------------------------------

SETTING = {"device": "cpu", "batch": 16, "hidden": 4, "seed": 0, "net_rate": 1e-3, "mix_rate": 1e-2}


@pytest.mark.parametrize("directions", ["forward", "both"])
def test_only_steps_count_into_the_budget(monkeypatch, directions):
    seconds = [0.0]

    def process_time():
        seconds[0] += 0.5
        return seconds[0]

    def nll(flow, rows, measure=wide_training._nll):
        seconds[0] += 100
        return measure(flow, rows)

    monkeypatch.setattr(wide_training, "time", Namespace(process_time=process_time))
    monkeypatch.setattr(wide_training, "_nll", nll)
    gaussian = {**SETTING, "problem": "gaussian", "couplings": 0, "mix": "dense", "directions": directions}
    result = wide_training.train(n=16, budget=20, **gaussian)
    assert result["seconds"] == [step / 2 for step in result["steps"]]
    assert result["steps"][:3] == [0, 1, 2]
    assert result["steps"][-1] == 40
    assert sorted(set(result["steps"])) == result["steps"]
    # No flow is better than the density itself, and this one comes nearer to it.
    gap = np.array(result["test"]) - result["optimum"]
    assert 0 < gap[-1] < gap[0] / 2
    assert len(wide_training.train(n=16, budget=20, looks=1, **gaussian)["steps"]) == 2


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_row_for_training_is_held_out(monkeypatch, seed):
    drawn = {"training": [], "validation": [], "test": []}

    def draw(source, count, generator, part="training", draw=Gaussian.draw):
        x = draw(source, count, generator, part)
        drawn[part].append(x)
        return x

    monkeypatch.setattr(Gaussian, "draw", draw)
    gaussian = {"problem": "gaussian", "couplings": 0, "mix": "dense", "directions": "forward"}
    wide_training.train(n=12, budget=0.01, **{**SETTING, **gaussian, "seed": seed})
    found = {part: {tuple(x) for rows in drawn[part] for x in rows.tolist() if len(x) == 12} for part in drawn}
    assert len(found["validation"]) == len(found["test"]) == 400
    assert len(set.union(*found.values())) == sum(map(len, found.values()))


def test_a_training_that_diverges_ends_early():
    patches = {**SETTING, "problem": "patches", "couplings": 2, "mix": "reversed", "directions": "forward"}
    result = wide_training.train(n=16, budget=20, **patches | {"net_rate": 1e12})
    assert len({len(result[key]) for key in ("seconds", "steps", "validation", "test")}) == 1
    assert result["seconds"][-1] < 20
    assert all(map(math.isfinite, result["validation"] + result["test"]))
    assert "optimum" not in result


# --- learning rates -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("best", "start", "count"), [(1e-3, 1e-3, 3), (1e-2, 1e-3, 5), (GRID[0], 1e-4, 4), (GRID[-1], 1e-1, 2)]
)
def test_the_best_rate_has_worse_ones_on_either_side(best, start, count):
    found, tried = climb(lambda rate: abs(math.log(rate / best)), start)
    assert found == best
    assert len(tried) == count
    i = GRID.index(best)
    assert set(GRID[max(0, i - 1) : i + 2]) <= set(tried)


def test_a_rate_that_diverges_is_the_worst():
    found, tried = climb(lambda rate: math.nan if rate > 1e-4 else -rate, 1e-3)
    assert found == 1e-3  # neither neighbour is known to be better
    assert set(tried.values()) == {math.inf}
    assert climb(lambda rate: math.nan if rate > 3e-4 else -rate, 1e-3)[0] == 3e-4


# --- curves, claims and table -------------------------------------------------------------------------------


def row(method, test, validation=None, **more):
    case = {
        "problem": "patches",
        "directions": "forward",
        "couplings": 2,
        "n": 2304,
        "budget": 8.0,
        "seed": 0,
        "device": "cpu",
    }
    seconds = [0.0, 1.0, 2.0, 4.0, 8.0]
    return {**case, "method": method, "seconds": seconds, "steps": [0, 1, 2, 4, 8], "test": test} | {
        "validation": validation or test,
        **more,
    }


def test_what_is_kept_is_chosen_by_the_validation_rows():
    found = row("LU", [5, 4, 3, 2, 1], validation=[3, 2, 4, 1, 2])
    assert kept(found).tolist() == [5, 4, 4, 2, 2]
    assert kept({**found, "optimum": 1.5}).tolist() == [3.5, 2.5, 2.5, 0.5, 0.5]
    assert end([found, row("LU", [5, 4, 3, 2, 1])]) == 1.5


def test_how_much_earlier():
    lu = row("LU", [5, 4.5, 4, 3.5, 3])
    assert earlier([row("ours", [5, 2, 2, 2, 2])], [lu]) == 8
    assert earlier([row("ours", [5, 4, 2.9, 2, 2])], [lu]) == 4
    assert earlier([row("ours", [5, 2, 3.1, 2, 2], validation=[5, 4, 3, 2, 1])], [lu]) == 2  # it has to stay below
    assert earlier([row("ours", [5, 4, 4, 4, 3])], [lu]) is None
    assert earlier([row("ours", [5, 2, 2, 2, 2]), row("ours", [5, 4, 4, 2, 2])], [lu]) == 8 / 2.5
    # Who has it at two seconds and is no better later needed two seconds; who only got worse had all of them.
    assert earlier([row("ours", [5, 2, 2, 2, 2])], [row("LU", [5, 4, 3, 3.5, 4])]) == 2
    assert earlier([row("ours", [5, 2, 2, 2, 2])], [row("dense", [5, 6, 7, 8, 9])]) == 8


def test_claims_are_judged_by_their_rules():
    ours = row("P4Inv, rank 8", [5, 3.5, 2, 2, 1])
    others = [row("reversed", [5, 5, 5, 4, 4]), row("LU", [5, 4.5, 4, 3.5, 3]), row("dense", [5, 6, 7, 8, 4])]
    worse = row("InvertibleLinear", [5, 0, 0, 0, 0], validation=[5, 4, 4, 4, 4])
    assert best_of_ours({found["method"]: [found] for found in (*others, ours, worse)}) == "P4Inv, rank 8"
    found = claims({"rows": [*others, ours, worse]})
    assert [(claim["ours"], claim["holds"]) for claim in found] == [
        ("4.0, P4Inv, rank 8", True),
        ("8.0, P4Inv, rank 8", True),
        ("1 of 1", True),
    ]
    slow = row("P4Inv, rank 8", [5, 5, 5, 5, 4.5])
    assert [(claim["ours"].split(",")[0], claim["holds"]) for claim in claims({"rows": [*others, slow]})] == [
        ("not", False),
        ("not", False),
        ("0 of 1", False),
    ]
    elsewhere = [{**found, "device": "cuda"} for found in (*others, {**ours, "n": 1024})]
    assert claims({"rows": elsewhere}) == []  # nothing that could be compared


# --- the command --------------------------------------------------------------------------------------------

SMALL = "wide --quick --budget 0.03 --methods reversed LU P4Inv-8 --parts {}"


def test_wide_goes_on_from_its_parts(monkeypatch, tmp_path, capsys):
    small = SMALL.format(tmp_path / "parts")
    results = call(monkeypatch, tmp_path, small)
    rows = results["rows"]
    linear = [("gaussian", way, 0, method) for way in ("forward", "both") for method in ("LU", "P4Inv, rank 8")]
    patches = [("patches", "forward", 2, method) for method in ("reversed", "LU", "P4Inv, rank 8")]
    assert [(r["problem"], r["directions"], r["couplings"], r["method"]) for r in rows] == patches + linear
    for found in rows:
        assert found["n"] == 64
        assert found["seconds"][0] == 0
        assert found["seconds"][-1] >= found["budget"] == 0.03
        assert ("optimum" in found) == (found["problem"] == "gaussian")
        options = {"mix_rate"} if found["method"] != "reversed" else set()
        assert set(found["tried"]) == options | ({"net_rate"} if found["couplings"] else set())
        for option, tried in found["tried"].items():
            assert tried[f"{found[option]:g}"] == min(value for value in tried.values() if value is not None)
            assert len(tried) >= 3
    assert {path.name for path in Path(tmp_path).glob("wide*")} == {"wide.json", "wide.png", "wide_all.png"}
    assert "| patches | forward | 2 | 64 | 0.03 |" in capsys.readouterr().out

    # More seeds and a method more measure these only; the same again measures nothing.
    calls = []
    monkeypatch.setattr(wide, "train", lambda **setting: calls.append(setting) or wide_training.train(**setting))
    more = call(monkeypatch, tmp_path, f"{small.replace('reversed', 'reversed random')} --seeds 2")["rows"]
    assert [r for r in more if r["seed"] == 0 and r["method"] != "random"] == rows
    assert {(c["mix"], c["seed"]) for c in calls} == {
        *(("random", seed) for seed in (0, 1)),
        *((r["mix"], 1) for r in rows),
    }
    monkeypatch.setattr(wide, "train", lambda **setting: pytest.fail("measured again"))
    assert call(monkeypatch, tmp_path, small)["rows"] == rows


@pytest.mark.parametrize("option", ["--budget 0", "--seeds -1", "--couplings x"])
def test_numbers_are_above_zero(option, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        call(monkeypatch, tmp_path, f"wide {option}")
    assert f"expected a number above 0, got '{option.split()[1]}'" in capsys.readouterr().err

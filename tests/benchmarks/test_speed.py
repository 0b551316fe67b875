"""benchmarks/speed, on small settings."""

import re

import pytest

pytest.importorskip("nflows")
pytest.importorskip("matplotlib")

from running import call

from benchmarks.speed import layer
from benchmarks.speed.layer_steps import MERGING, METHODS, PLAIN, begin


@pytest.mark.filterwarnings("ignore")
def test_cost_merge_and_step(monkeypatch, tmp_path, capsys):
    rows = call(monkeypatch, tmp_path, "cost --widths 4 64 --batches 8 --seconds 0.1")["rows"]
    methods = {row["method"] for row in rows}
    assert {"P4Inv rank 1", "P4Inv rank 8", "limit", "nn.Linear", "dense inv", "nflows LULinear"} <= methods
    for row in rows:
        assert row["ms"] > 0
        assert row["to_p4inv"] == pytest.approx(1) or row["method"] != "P4Inv rank 1"
        assert row["peak_mib"] is None or row["peak_mib"] > 0
    assert (tmp_path / "cost.png").stat().st_size > 10_000
    assert "P4Inv rank 8" in capsys.readouterr().out

    rows = call(monkeypatch, tmp_path, "merge --layers 5 1 --widths 3 200 --rounds 3")["rows"]
    assert [(row["layers"], row["n"]) for row in rows] == [(5, 3), (1, 200)]
    assert rows[0]["ms"]["stack"] > 0
    assert all(row["ms"]["p4flows"] > row["ms"]["updates"] > 0 for row in rows)

    rows = call(monkeypatch, tmp_path, "step --depth 4 --couplings 2 --models 3 --rounds 2")["rows"]
    names = {row["method"] for row in rows}
    assert {"P4InvStack", "separate P4Inv", "P4InvStack, 3 models", "RealNVP", "RealNVP + P4Inv"} <= names
    assert all(row["ms"] > 0 for row in rows)


@pytest.mark.filterwarnings("ignore")
def test_layer(monkeypatch, tmp_path, capsys):
    results = call(monkeypatch, tmp_path, "layer --widths 16 32 --turns 2 --couplings 2")
    assert [(row["n"], row["both_directions"]) for row in results["rows"]] == [
        (n, both) for n in (16, 32) for both in (False, True)
    ]
    there = set(METHODS) - set(results["left_out"])
    assert set(results["left_out"]) <= {"bgflow InvertiblePPPP", "normflows LULinearPermute"}
    for row in results["rows"]:
        expected = there - {"relative gradient"} if row["both_directions"] else there
        assert set(row["ms"]) == set(row["peak_mib"]) == set(row["kept_mib"]) == expected
        assert min(row["ms"].values()) > 0
        assert all(row["peak_mib"][name] > row["kept_mib"][name] > 0 for name in expected)
        # Weight and bias, their gradients and two moments each, and a step count for each of the two.
        assert row["kept_mib"]["nn.Linear"] * 2**20 == 4 * (4 * (row["n"] ** 2 + row["n"]) + 2)
    assert 0 < results["following"]["share"] < 1
    printed = capsys.readouterr().out
    assert len(re.findall(r"^\| relative gradient \| [\d.]+ / – \| [\d.]+ / – \|$", printed, re.MULTILINE)) == 2


@pytest.mark.parametrize("name", METHODS)
def test_a_step_trains_the_layer_and_merges(name, monkeypatch):
    made = []

    def make(n, device):
        made.append(original(n, device))
        return made[-1]

    original = METHODS[name]
    monkeypatch.setitem(METHODS, name, make)
    for both in (False, True):
        try:
            step = begin(name, 16, both)
        except ImportError as error:
            pytest.skip(str(error))
        module, _, inverse = made.pop()
        assert (step is None) == (both and inverse is None and name != PLAIN)
        if step is None:
            continue
        parameters = {key: p.detach().clone() for key, p in module.named_parameters() if p.requires_grad}
        A = module.A.clone() if hasattr(module, "A") else None
        for _ in range(9):
            step()
        now = dict(module.named_parameters())
        assert all(now[key].isfinite().all() and not now[key].equal(p) for key, p in parameters.items())
        if A is not None:
            assert module.A.equal(A) == (name in MERGING)  # InvertibleLinear follows at every step
            step()
            assert not module.A.equal(A)


def _row(n, both, threads=2, **figures):
    return {"n": n, "both_directions": both, "threads": threads, **figures}


def test_claims_and_tables_of_layers():
    fast = dict.fromkeys(METHODS, 10.0) | {"InvertibleLinear": 20.0, "dense": 300.0, "nflows LULinear": 90.0}
    rows = [_row(n, both, ms=fast) for n in (1024, 4096) for both in (False, True)]
    slow = [_row(4096, both, 1, ms=dict.fromkeys(METHODS, 10.0)) for both in (False, True)]
    following = {"couplings": 50, "share": 0.3}
    results = {"rows": rows, "following": following}
    assert [row["holds"] for row in layer.claims(results)] == [True, True, True, True, True, False]
    assert layer.claims({"rows": rows + slow, "following": following}) == layer.claims(results)
    assert layer.table(results) == layer.summary(results)
    kept = {"P4Inv, rank 1": 4096**2 * 24 / 2**20}
    results = {"rows": [row | {"kept_mib": kept, "peak_mib": fast} for row in rows], "following": following}
    goal = layer.claims(results)[-2]
    assert (goal["ours"], goal["holds"]) == ("24.0", False)
    assert layer.table(results).count("\n| dense | 30.0 / 30.0 | 30.0 / 30.0 |") == 2


def test_a_table_of_layers_shows_what_a_result_has():
    ms = {"nn.Linear": 2.0, "P4Inv": 3.0, "relative gradient": 0.01}
    results = {"rows": [_row(64, False, ms=ms), _row(64, True, ms={"nn.Linear": 2.0, "P4Inv": 5.0})]}
    assert layer.table(results).splitlines() == [
        "| | n = 64 |",
        "|---|---:|",
        "| nn.Linear | 2 ms |",
        "| P4Inv | 1.5 / 2.5 |",
        "| relative gradient | 0.005 / – |",
    ]
    results["rows"] += [_row(64, both, 1, ms=ms) for both in (False, True)]
    assert layer.table(results).splitlines()[0] == "| | n = 64, 2 threads | n = 64, 1 thread |"

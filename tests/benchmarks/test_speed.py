"""benchmarks/speed, on small settings."""

import pytest

pytest.importorskip("nflows")
pytest.importorskip("matplotlib")

from running import call

from benchmarks.speed import layer


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
def test_layer(monkeypatch, tmp_path):
    results = call(monkeypatch, tmp_path, "layer --widths 16 32 --turns 2 --couplings 2")
    assert [(row["n"], row["both_directions"]) for row in results["rows"]] == [
        (n, both) for n in (16, 32) for both in (False, True)
    ]
    assert all(set(row["ms"]) == set(layer.METHODS) and min(row["ms"].values()) > 0 for row in results["rows"])
    assert 0 < results["following"]["share"] < 1
    fast = dict.fromkeys(layer.METHODS, 10.0) | {"InvertibleLinear": 20.0, "dense": 300.0, "nflows LULinear": 90.0}
    rows = [{"n": n, "both_directions": both, "ms": fast} for n in (1024, 4096) for both in (False, True)]
    held = [row["holds"] for row in layer.claims({"rows": rows, "following": {"couplings": 50, "share": 0.3}})]
    assert held == [True, True, True, True, True, False]

"""benchmarks/numerics, on small settings."""

import pytest

pytest.importorskip("matplotlib")

from running import call


@pytest.mark.filterwarnings("ignore:.*bgflow.*", "ignore:.*Tight layout.*")
def test_drift(monkeypatch, tmp_path):
    results = call(
        monkeypatch, tmp_path, f"drift --widths 3 20 --merges 60 --points 5 --steps 20 --parts {tmp_path / 'parts'}"
    )
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
    trained = [row for row in results["rows"] if row["perturbations"] == "trained"]
    assert {(row["n"], row["method"]) for row in trained} == {
        (n, name) for n in (64, 512) for name in ("P4Inv, default rank", "InvertibleLinear")
    }
    assert all(row["counters"]["merged"] >= 2 for row in trained)
    assert all(row["holds"] for row in results["claims"])
    # The adversarial merges are as bad as they are meant to be.
    assert max(e["condition"] for row in ours if row["perturbations"] == "adversarial" for e in row["errors"]) > 1e3


def test_drift_goes_on_where_it_was_interrupted(monkeypatch, tmp_path):
    from benchmarks.numerics import drift

    small = f"drift --widths 3 --merges 20 --points 3 --steps 5 --parts {tmp_path / 'parts'}"
    first = call(monkeypatch, tmp_path, small)
    for function in ("_follow", "follow_training"):
        monkeypatch.setattr(drift, function, lambda *arguments: pytest.fail("measured again"))
    assert call(monkeypatch, tmp_path, small)["rows"] == first["rows"]

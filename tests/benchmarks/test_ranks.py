"""benchmarks/speed/ranks, on small settings: two processes with gloo."""

import json

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("nflows")
pytest.importorskip("sklearn")

from running import call

from benchmarks.speed import ranks
from benchmarks.speed.ranks_table import ring_seconds, table
from benchmarks.speed.ranks_worker import differences
from p4flows import MergeScheduler, P4Inv

needs_gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")


@needs_gloo
def test_ranks(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(ranks, "MIXES", {name: ranks.MIXES[name] for name in ("P4Inv, rank 1", "InvertibleLinear")})
    arguments = f"ranks --quick --flows deep --parts {tmp_path / 'parts'}"
    first, second = call(monkeypatch, tmp_path, arguments)["rows"]
    n, couplings = first["features"], first["couplings"]
    assert (first["numbers_of_a_mix"], second["numbers_of_a_mix"]) == (2 * n + n, n * n + n)
    assert first["numbers"] - couplings * 3 * n == second["numbers"] - couplings * (n * n + n) > 0
    for row in (first, second):
        assert not any(row["different_bytes"].values())
        assert set(row["different_bytes"]) == set(row["seconds"]) - {"alone"}
        assert ("Lightning" in row["seconds"]) == ("left_out" not in row)
        assert all(len(found) == 1 and found[0] > 0 for found in row["seconds"].values())
    assert capsys.readouterr().out.count("| yes |") == 2
    monkeypatch.setattr(ranks, "_torchrun", lambda settings: pytest.fail("trained again"))
    assert call(monkeypatch, tmp_path, arguments)["rows"] == [first, second]


@needs_gloo
def test_what_goes_wrong_in_a_process_is_told():
    case = {"flow": "deep", "method": "none", "features": 4, "couplings": 1, "hidden": 2, "batch": 3, "mix": "none"}
    with pytest.raises(RuntimeError, match=r"(?s)^expected two processes that train, got.*ValueError: mix: expected"):
        ranks._torchrun({"cases": [case], "turns": 1})


def _differ(rank, store, folder):
    """What `differences` finds: layers that are equal, with another bit, with NaN, with another moment of Adam."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    layer = P4Inv(3, rank=1)
    optimizer = torch.optim.Adam(layer.parameters())
    MergeScheduler(layer, optimizer, every=2).attach()
    for _ in range(3):
        layer(torch.ones(2, 3))[0].square().sum().backward()
        optimizer.step()
    found = [differences(layer, optimizer)]
    with torch.no_grad():
        if rank:
            layer.bias[0] = torch.nextafter(layer.bias[0], torch.tensor(9.0))
        found.append(differences(layer, optimizer))
        layer.bias[:] = layer.bias.new_tensor([torch.nan, 0, 0])
        found.append(differences(layer, optimizer))
        layer.bias.zero_()
        if rank:
            optimizer.state[layer.U]["exp_avg"] += 1
        found.append(differences(layer, optimizer))
    dist.destroy_process_group()
    (folder / f"{rank}.json").write_text(json.dumps(found))


@needs_gloo
def test_ranks_that_differ_are_found(tmp_path):
    torch.multiprocessing.spawn(_differ, (tmp_path / "store", tmp_path), nprocs=2)
    found, theirs = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert found == theirs
    equal, bit, nan, moment = found
    assert equal == 0
    assert 1 <= bit <= 4
    assert nan == 2 * 3 * 4  # all of the bias, on both
    assert 1 <= moment <= 3 * 4


def test_the_estimate_is_that_of_a_ring():
    assert ring_seconds(8e6, 8, 1e9, 0) == pytest.approx(2 * 7 / 8 * 8e6 / 1e9)
    assert ring_seconds(4.0, 64, 1e9, 1e-5) == pytest.approx(2 * 63 * 1e-5, rel=1e-3)
    one, three = (ring_seconds(size * 2**20, 8, 1e30, 1e-5) for size in (25, 51))
    assert three == pytest.approx(3 * one)


def test_the_table_says_what_is_missing_and_what_differs():
    row = {"flow": "wide", "method": "dense", "features": 1024, "couplings": 2, "batch": 128, "left_out": "Lightning"}
    row |= {"numbers": 2_000_000, "numbers_of_a_mix": 1_049_600, "different_bytes": {"torchrun": 1200}}
    row |= {"seconds": {"alone": [0.1, 0.2, 0.3], "torchrun": [0.25]}}
    *_, line = table({"bandwidth_gbit": 8.0, "latency_us": 0.0, "rows": [row]}).splitlines()
    assert line == (
        "| wide: n = 1024, 2 couplings, batch 128 | dense | 1,049,600 | 8 | 5 | 4 (80 %) | – "
        "| **no**, 1,200 bytes | 4.67 (93 %) | 4.63 (93 %) |"
    )

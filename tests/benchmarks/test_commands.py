"""The commands of benchmarks/, on small settings, and the README's agreement with the committed results."""

import json

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

pytest.importorskip("nflows")
pytest.importorskip("openmm")
pytest.importorskip("matplotlib")

from benchmarks import __main__ as command
from benchmarks.harness.readme import README, render
from benchmarks.paper.boltzmann import Samples, jensen_shannon
from benchmarks.paper.realnvp import real_nvp
from p4flows import MergeScheduler
from p4flows.nflows import replace_permutations


def test_readme_agrees_with_the_results():
    assert render(README.read_text()) == README.read_text()


def test_the_paper_s_architecture_has_the_paper_s_parameters():
    flow = real_nvp(60, 50)
    assert sum(p.numel() for p in flow.parameters()) == 735_050
    assert replace_permutations(flow) == 50
    assert sum(p.numel() for p in flow.parameters()) == 744_050


def test_the_flow_compiles_to_one_graph_in_both_directions_and_merges_do_not_recompile_it():
    torch._dynamo.reset()
    flow = real_nvp(6, 4)
    replace_permutations(flow)
    transform = flow._transform
    for direction in (transform.forward, transform.inverse):
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(direction, fullgraph=True, backend=counter)
        optimizer = torch.optim.Adam(transform.parameters(), lr=1e-2)
        scheduler = MergeScheduler(transform, optimizer, every=1, correct_every=2)
        graphs = []
        for _ in range(4):
            x = torch.randn(5, 6)
            for eager, traced in zip(direction(x), compiled(x), strict=True):
                torch.testing.assert_close(traced, eager, atol=1e-5, rtol=1e-4)
            y, logabsdet = compiled(x)
            optimizer.zero_grad()
            (y.square().sum(-1) / 2 - logabsdet).mean().backward()
            optimizer.step()
            scheduler.step()
            graphs.append(counter.frame_count)
        assert scheduler.counters["merged"] == 16
        assert len(set(graphs)) == 1
        assert graphs[0] > 0


@pytest.mark.filterwarnings("ignore:.*Tight layout.*")
def test_demo(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("P4FLOWS_CACHE", str(tmp_path))
    arguments = "demo --frames 500 --steps 30 --couplings 2 --samples 100"
    monkeypatch.setattr("sys.argv", ["benchmarks", *arguments.split(), "--out", str(tmp_path)])
    command.main()
    results = json.loads((tmp_path / "demo.json").read_text())
    rows = results["rows"]
    assert rows["RealNVP + P4Inv"]["parameters"] == rows["RealNVP"]["parameters"] + 2 * 180
    assert rows["RealNVP + P4Inv"]["counters"]["merged"] == 6
    assert rows["RealNVP + P4Inv"]["round_trip"] < 1e-3
    assert rows["MD"]["low_energy_fraction"] == 1
    assert rows["MD + 0.004 nm"]["energy_median"] > rows["MD"]["energy_median"] + 15
    assert results["environment"]["versions"]["torch"]
    assert (tmp_path / "demo.png").stat().st_size > 10_000
    assert "held-out NLL" in capsys.readouterr().out


def test_jensen_shannon_divergence():
    def at(phi):
        return Samples(torch.zeros(4), torch.full((4,), phi), torch.zeros(4))

    assert jensen_shannon(at(0.1), at(0.1)) == 0
    assert jensen_shannon(at(0.1), at(2.0)) == pytest.approx(0.6931, abs=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_cost_merge_and_step(tmp_path, monkeypatch, capsys):
    arguments = "cost --widths 4 64 --batches 8 --seconds 0.1"
    monkeypatch.setattr("sys.argv", ["benchmarks", *arguments.split(), "--out", str(tmp_path)])
    command.main()
    rows = json.loads((tmp_path / "cost.json").read_text())["rows"]
    methods = {row["method"] for row in rows}
    assert {"P4Inv rank 1", "P4Inv rank 8", "limit", "nn.Linear", "dense inv", "nflows LULinear"} <= methods
    for row in rows:
        assert row["ms"] > 0
        assert row["to_p4inv"] == pytest.approx(1) or row["method"] != "P4Inv rank 1"
        assert row["peak_mib"] is None or row["peak_mib"] > 0
    assert (tmp_path / "cost.png").stat().st_size > 10_000
    assert "P4Inv rank 8" in capsys.readouterr().out

    arguments = "merge --layers 5 1 --widths 3 200 --rounds 3"
    monkeypatch.setattr("sys.argv", ["benchmarks", *arguments.split(), "--out", str(tmp_path)])
    command.main()
    rows = json.loads((tmp_path / "merge.json").read_text())["rows"]
    assert [(row["layers"], row["n"]) for row in rows] == [(5, 3), (1, 200)]
    assert rows[0]["ms"]["stack"] > 0
    assert all(row["ms"]["p4flows"] > row["ms"]["updates"] > 0 for row in rows)

    arguments = "step --depth 4 --couplings 2 --models 3 --rounds 2"
    monkeypatch.setattr("sys.argv", ["benchmarks", *arguments.split(), "--out", str(tmp_path)])
    command.main()
    rows = json.loads((tmp_path / "step.json").read_text())["rows"]
    names = {row["method"] for row in rows}
    assert {"P4InvStack", "separate P4Inv", "P4InvStack, 3 models", "RealNVP", "RealNVP + P4Inv"} <= names
    assert all(row["ms"] > 0 for row in rows)

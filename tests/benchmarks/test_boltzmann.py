"""Boltzmann generators of alanine dipeptide in benchmarks/paper: that they run, resume and are right."""

import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

pytest.importorskip("nflows")
pytest.importorskip("openmm")
pytest.importorskip("matplotlib")

from running import call, interrupt

from benchmarks.harness.readme import README
from benchmarks.paper import alanine_dipeptide, boltzmann_training
from benchmarks.paper.boltzmann import Samples, divergence, histograms, jensen_shannon, load_data
from benchmarks.paper.realnvp import real_nvp
from p4flows import MergeScheduler
from p4flows.nflows import replace_permutations


def test_the_paper_s_architecture_has_the_paper_s_parameters():
    flow = real_nvp(60, 50)
    assert sum(p.numel() for p in flow.parameters()) == 735_050
    assert replace_permutations(flow, rank=1) == 50
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
def test_demo(monkeypatch, tmp_path, capsys):
    results = call(
        monkeypatch,
        tmp_path,
        f"demo --frames 500 --steps 30 --couplings 2 --samples 100 --checkpoints {tmp_path / 'kept'}",
    )
    rows = results["rows"]
    assert rows["splines + P4Inv"]["parameters"] == rows["splines"]["parameters"] + 2 * (60 * 60 + 60)
    assert rows["splines + P4Inv"]["counters"]["merged"] == 6
    assert rows["splines + P4Inv"]["round_trip"] < 1e-3
    assert rows["MD"]["low_energy_fraction"] == 1
    assert rows["MD + 0.004 nm"]["energy_median"] > rows["MD"]["energy_median"] + 15
    assert results["environment"]["versions"]["torch"]
    assert (tmp_path / "demo.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "held-out NLL" in printed
    lines = [line.strip() for line in printed.splitlines() if line.startswith("    ")]
    assert len(lines) == 3
    check = "assert x.shape == (1000, 66) and x.isfinite().all(), x; print(list(saved))"
    loaded = subprocess.run(
        [sys.executable, "-c", "\n".join([*lines, check])], cwd=README.parent, capture_output=True, text=True
    )
    assert loaded.stdout.strip() == "['coordinates', 'splines', 'splines + P4Inv']", loaded.stderr
    assert not list((tmp_path / "kept").iterdir())


@pytest.mark.filterwarnings("ignore:.*Tight layout.*")
def test_the_demo_goes_on_where_it_was_interrupted(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(boltzmann_training, "_WINDOW", 5)
    command = "demo --frames 400 --steps 20 --couplings 2 --samples 100 --checkpoints"
    expected = call(monkeypatch, tmp_path, f"{command} {tmp_path / 'a'}")["rows"]
    # Three and two in the stages of the first flow, whose last ones do not ask whether they are due; two in the second.
    steps = interrupt(monkeypatch, 7)
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, tmp_path, f"{command} {tmp_path / 'b'}")
    assert ended.value.code == 130
    assert capsys.readouterr().err.endswith("\ninterrupted: the same command goes on from here\n")
    # With other settings nothing of this is used.
    other = call(monkeypatch, tmp_path, f"{command.replace('20', '15')} {tmp_path / 'b'}")
    assert len(other["rows"]["splines"]["curve"]) == 3
    steps.clear()
    resumed = call(monkeypatch, tmp_path, f"{command} {tmp_path / 'b'}")["rows"]
    assert steps == [15, 5, 10]
    for rows in (expected, resumed):
        for row in rows.values():
            row.pop("ms_per_step", None)
    assert resumed == expected


def test_alanine_dipeptide_has_the_paper_s_architecture():
    full = alanine_dipeptide.FULL
    assert (full.couplings, full.likelihood.steps, full.energy.steps) == (50, 40_000, 2_000)
    counts = {}
    for mix in ("reversed", "P4Inv"):
        flow = alanine_dipeptide.build(alanine_dipeptide.replace(full, mix=mix))
        counts[mix] = sum(p.numel() for p in flow.parameters())
    assert counts == {"reversed": 735_050, "P4Inv": 744_050}


@pytest.mark.filterwarnings("ignore:.*Tight layout.*")
def test_alanine_dipeptide(monkeypatch, tmp_path):
    quick = alanine_dipeptide.replace(alanine_dipeptide.QUICK, frames=400, samples=100)
    monkeypatch.setattr(alanine_dipeptide, "QUICK", quick)
    results = call(monkeypatch, tmp_path, f"alanine_dipeptide --quick --checkpoints {tmp_path / 'checkpoints'}")
    rows = results["rows"]
    flows = ("RealNVP", "RealNVP + P4Inv", "RealNVP + random", "RealNVP + InvertibleLinear")
    assert set(rows) == {"MD", "MD + 0.004 nm", *flows}
    for name in flows:
        for stage in ("likelihood", "energy"):
            measured = rows[name][stage]
            assert 0 < measured["ess"] <= 1
            assert measured["round_trip"] < 1e-3
            assert 0 <= measured["ramachandran_js"] <= 0.7
            assert measured["unusable_batches"] == 0
    assert rows["RealNVP + P4Inv"]["likelihood"]["residual"] < 1e-5
    assert rows["RealNVP + P4Inv"]["likelihood"]["counters"]["merged"] == 6 * 4
    assert rows["RealNVP + P4Inv"]["energy"]["counters"]["merged"] == 3 * 4
    # A dense weight is followed after every step, whatever the paper's interval is.
    assert rows["RealNVP + InvertibleLinear"]["likelihood"]["counters"]["merged"] == 60 * 4
    assert rows["RealNVP + random"]["likelihood"]["counters"] is None
    # Finished stages are read from their checkpoints.
    again = call(monkeypatch, tmp_path, f"alanine_dipeptide --quick --checkpoints {tmp_path / 'checkpoints'}")
    assert again["rows"] == rows


@pytest.mark.parametrize("energy_weight", [0.0, 0.05])
def test_training_goes_on_after_an_interruption(monkeypatch, tmp_path, energy_weight):
    monkeypatch.setenv("P4FLOWS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(boltzmann_training, "_WINDOW", 4)
    data = load_data(100)
    options = {"energy_weight": energy_weight, "every": 3, "schedule": "cosine"}
    stage = boltzmann_training.Stage(20, batch=16, **options)
    flows = [alanine_dipeptide.build(alanine_dipeptide.replace(alanine_dipeptide.QUICK, mix="P4Inv")) for _ in range(3)]
    expected = boltzmann_training.train(flows[0], data, stage)
    counts = interrupt(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        boltzmann_training.train(flows[1], data, stage, checkpoint=tmp_path / "flow.pt")
    result = boltzmann_training.train(flows[2], data, stage, checkpoint=tmp_path / "flow.pt")
    assert counts[:3] == [4, 8, 12]
    for name, tensor in flows[0].state_dict().items():
        assert torch.equal(tensor, flows[2].state_dict()[name]), name
    assert result["curve"] == expected["curve"]
    assert result["counters"] == expected["counters"]
    with pytest.raises(ValueError, match="expected a checkpoint of"):
        boltzmann_training.train(flows[2], data, alanine_dipeptide.replace(stage, steps=21), "", tmp_path / "flow.pt")


def test_jensen_shannon_divergence():
    def at(phi):
        return Samples(torch.zeros(4), torch.full((4,), phi), torch.zeros(4))

    assert jensen_shannon(at(0.1), at(0.1)) == 0
    assert jensen_shannon(at(0.1), at(2.0)) == pytest.approx(0.6931, abs=1e-4)


def test_histograms():
    a = torch.linspace(0, 1, 1000)
    p, q = histograms(a, a + 0.5)
    assert p.sum() == q.sum() == pytest.approx(1)
    assert divergence(p, p) == 0
    assert divergence(p, q) > 0.1

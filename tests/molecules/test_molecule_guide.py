"""The code of docs/molecule.md runs, from the first block to the last, on less data."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from pages import ROOT, blocks, path_of

pytest.importorskip("openmm")
pytest.importorskip("tqdm")
pytest.importorskip("nflows")

from p4flows import molecules

SMALLER = {
    "FRAMES = 40_000": "FRAMES = 160",
    "exchange=200 * femtosecond": "exchange=200 * femtosecond, equilibration=500",
    "COUPLINGS, STEPS, BATCH = 6, 2_000, 512": "COUPLINGS, STEPS, BATCH = 2, 30, 64",
    "SAMPLES = 20_000": "SAMPLES = 500",
}


def programs():
    return [code for code, _ in blocks(path_of("molecule").read_text())]


@pytest.mark.filterwarnings("ignore:.*structures have the other handedness")
def test_every_block_runs(tmp_path, monkeypatch, capsys):
    assert len(programs()) == 9
    code = "\n".join(programs())
    for usual, small in SMALLER.items():
        assert code.count(usual) == 1
        code = code.replace(usual, small)
    shutil.copy(ROOT / "tests" / "data" / "molecules" / "proline_dipeptide.pdb", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("P4FLOWS_CACHE", str(tmp_path / "cache"))
    simulate = molecules.simulate
    with ThreadPoolExecutor(2) as executor:
        # Threads for processes: they give the same frames, and need no time to start.
        monkeypatch.setattr(molecules, "simulate", lambda *a, **k: simulate(*a, **{"executor": executor, **k}))
        names = {}
        exec(compile(code, "docs/molecule.md", "exec"), names)
    out = capsys.readouterr().out
    assert "26 atoms" in out
    assert "72 coordinates, of which 21 are dihedrals" in out
    assert "72 coordinates without, 58 with constraints" in out
    assert "True" in out
    assert np.isfinite(names["weights"].effective_sample_size)
    assert names["same"].n_atoms == 26
    assert torch.isfinite(names["loss"])
    assert out.count("±") == 2 * 24


def test_the_errors_of_a_profile_are_those_of_independent_samples():
    """That of -ln p is ((1 - p) / N p)^½ for N samples of equal weights; for others (E[w²] / E[w]²)^½ times that."""
    (code,) = (block for block in programs() if "def profile" in block)
    names = {"np": np}
    exec(code[code.index("def profile") : code.index("edges =")], names)
    rng = np.random.default_rng(0)
    edges, n = np.array([0.0, 0.1, 0.4, 1.0]), 40_000
    angles, weights, p = rng.random(n), rng.exponential(size=n), np.diff(edges)
    for given, square in ((np.ones(n), 1), (weights, 2)):
        F, error = names["profile"](angles, given, edges, blocks=1000)
        expected = np.sqrt(square * (1 - p) / (n * p))
        np.testing.assert_allclose(error, expected, rtol=0.1)
        assert (abs(F + np.log(p)) < 4 * expected).all()
    F, error = names["profile"](angles / 10, np.ones(n), edges)  # all in the first bin
    assert F.tolist() == [0, np.inf, np.inf]
    assert error[0] == 0

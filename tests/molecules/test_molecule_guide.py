"""The code of docs/molecule.md runs, from the first block to the last, on less data."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("openmm")
pytest.importorskip("tqdm")
pytest.importorskip("nflows")

from p4flows import molecules

ROOT = Path(__file__).parents[2]
SMALLER = {
    "FRAMES = 40_000": "FRAMES = 160",
    "exchange=200 * femtosecond": "exchange=200 * femtosecond, equilibration=500",
    "COUPLINGS, STEPS, BATCH = 6, 2_000, 512": "COUPLINGS, STEPS, BATCH = 2, 30, 64",
    "SAMPLES = 20_000": "SAMPLES = 500",
}


@pytest.mark.filterwarnings("ignore:.*structures have the other handedness")
def test_every_block_runs(tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs" / "molecule.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 9
    code = "\n".join(blocks)
    for usual, small in SMALLER.items():
        assert code.count(usual) == 1
        code = code.replace(usual, small)
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("P4FLOWS_CACHE", str(tmp_path))
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

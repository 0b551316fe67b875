"""Every notebook runs, in its fast mode, and is committed with its outputs."""

import asyncio
import importlib.util
import json
import warnings
from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_committed_with_its_outputs(path):
    text = path.read_text()
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs
    assert not any(output["output_type"] == "error" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, monkeypatch, tmp_path):
    if "bgflow" in path.stem and importlib.util.find_spec("bgflow") is None:
        pytest.skip("bgflow is neither installed nor checked out where P4FLOWS_BGFLOW says (see CONTRIBUTING.md)")
    monkeypatch.setenv("P4FLOWS_FAST", "1")
    monkeypatch.setenv("P4FLOWS_CACHE", str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        client = nbclient.NotebookClient(
            nbformat.read(path, as_version=4),
            timeout=300,
            kernel_name="python3",
            resources={"metadata": {"path": path.parent}},  # where those who open it are
        )
        asyncio.run(client.async_execute())

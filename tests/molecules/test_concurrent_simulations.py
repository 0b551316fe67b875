"""Equal simulations that are asked for at once: one simulates, the others wait for its frames."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

pytest.importorskip("openmm")
pytest.importorskip("tqdm")

from p4flows.molecules import cache, sampling, simulate

SCRIPT = """
    import sys
    from p4flows.molecules import alanine_dipeptide, simulate

    if __name__ == "__main__":
        x = simulate(
            alanine_dipeptide(), 300, int(sys.argv[2]), 2, workers=1, equilibration=0, progress=False, cache=sys.argv[1]
        )
        print(x.shape[0], x.sum())
"""


def start(tmp_path, frames):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, "-W", "ignore", str(script), str(tmp_path / "cache"), str(frames)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # from where this one imports
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def md(molecule, folder, frames=300, executor=None):
    options = {"workers": 1, "equilibration": 0, "progress": False, "executor": executor}
    return simulate(molecule, 300, frames, 2, cache=folder, **options)


def test_processes(tmp_path):
    processes = [start(tmp_path, 300) for _ in range(2)]
    outputs = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert len({stdout for stdout, _ in outputs}) == 1
    (folder,) = (tmp_path / "cache" / "md").iterdir()
    assert {path.name for path in folder.iterdir()} == {"about.json", "frames.npy", "lock"}


@pytest.mark.parametrize("locks", [True, False])
def test_threads(molecule, tmp_path, monkeypatch, in_threads, locks):
    expected = md(molecule, tmp_path / "alone", executor=in_threads)
    if not locks:
        monkeypatch.setattr(cache, "fcntl", None)  # as on Windows: each computes for itself
    runs, simulation = [], sampling._simulate

    def count(*arguments):
        runs.append(1)
        return simulation(*arguments)

    monkeypatch.setattr(sampling, "_simulate", count)
    results = [None] * 3

    def call(i):
        results[i] = md(molecule, tmp_path / "together", executor=in_threads)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        assert np.array_equal(result, expected)
    assert len(runs) == (1 if locks else 3)
    (folder,) = (tmp_path / "together" / "md").iterdir()
    assert {path.name for path in folder.iterdir()} == {"about.json", "frames.npy", "lock"}


def test_a_killed_simulation_leaves_no_lock(molecule, tmp_path, in_threads):
    process = start(tmp_path, 600)
    while not [*tmp_path.rglob("chain-0-0.npy")]:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    expected = md(molecule, tmp_path / "other", 600, in_threads)
    assert np.array_equal(md(molecule, tmp_path / "cache", 600), expected)


def test_temporary_names_are_unique_and_vanish(tmp_path, monkeypatch):
    names = []
    monkeypatch.setattr(cache.np, "save", lambda file, array: names.append(file.name))
    for _ in range(2):
        cache.save(tmp_path / "x.npy", np.zeros(2))
    assert len(set(names)) == 2

    def fail(file, array):
        raise OSError("disk full")

    monkeypatch.setattr(cache.np, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        cache.save(tmp_path / "y.npy", np.zeros(2))
    assert [path.name for path in tmp_path.iterdir()] == ["x.npy"]

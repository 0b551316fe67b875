"""An energy that several threads use, or a forked process: never a wrong number, never a wait without end."""

import multiprocessing
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch

pytest.importorskip("openmm")
pytest.importorskip("tqdm")

import openmm

from p4flows.molecules import OpenMMEnergy

ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(sys.path),
}  # new interpreters import from where this one does


@pytest.mark.parametrize("workers", [0, 2])
def test_threads_get_the_energies_of_their_own_frames(molecule, energy, frames, workers):
    x = frames.repeat(2, 1, 1)
    expected = energy(x)
    results, barrier = [None] * 4, threading.Barrier(4)
    with OpenMMEnergy(molecule.system, 600, workers=workers) as shared:

        def evaluate(i):
            barrier.wait()
            results[i] = shared(x[300 * i : 300 * (i + 1)])

        threads = [threading.Thread(target=evaluate, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    torch.testing.assert_close(torch.cat(results), expected, rtol=0, atol=0)


FORK = """
    import os, sys, threading, time, torch
    from p4flows.molecules import OpenMMEnergy, alanine_dipeptide

    torch.set_num_threads(1)
    workers, platform = int(sys.argv[1]), sys.argv[2]

    def wait_for(child):
        for _ in range(1200):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.1)
        os.kill(child, 9)
        sys.exit(f"child {child} hangs")

    if __name__ == "__main__":
        molecule = alanine_dipeptide()
        x = torch.tensor(molecule.positions) + 0.005 * torch.randn(400, 22, 3, dtype=torch.float64)
        expected = OpenMMEnergy(molecule.system, 300)(x)
        energy = OpenMMEnergy(molecule.system, 300, platform, workers, timeout=120)
        energy(x[:4])
        idle = os.fork()
        if not idle:
            sys.exit(0)  # as a program ends: destructors, and the hooks of multiprocessing
        assert wait_for(idle) == 0
        many, found = x.repeat(20, 1, 1), []
        other = threading.Thread(target=lambda: found.append(energy(many)))  # has the lock when the process forks
        other.start()
        time.sleep(0.1)
        busy = os.fork()
        order = slice(None) if busy else torch.arange(400).flip(0)  # both at once, each its own batch
        torch.testing.assert_close(energy(x[order]), expected[order], rtol=1e-5, atol=1e-2)
        if not busy:
            energy.close()
            sys.exit(0)
        other.join()
        torch.testing.assert_close(found, [expected.repeat(20)], rtol=1e-5, atol=1e-2)
        assert wait_for(busy) == 0
        torch.testing.assert_close(energy(x), expected, rtol=1e-5, atol=1e-2)
        energy.close()
        print("right")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize(("workers", "platform"), [(0, "Reference"), (0, "CPU"), (2, "Reference")])
def test_a_forked_process_makes_its_own(tmp_path, workers, platform):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(FORK))
    command = [sys.executable, "-W", "ignore", str(script), str(workers), platform]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=ENVIRONMENT)
    assert result.stdout == "right\n", result.stderr


def test_a_thread_waits_for_another_no_longer_than_the_timeout(molecule, frames):
    energy = OpenMMEnergy(molecule.system, 600, timeout=0.2)
    energy(frames[:1])
    batch = frames[:1].expand(30_000, -1, -1).contiguous()  # a second or more
    busy = threading.Thread(target=energy, args=(batch,))
    busy.start()
    while not energy._owner._lock.locked():
        time.sleep(0.01)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"another thread did not finish with OpenMM within 0\.2 s"):
        energy(frames[:1])
    with pytest.raises(RuntimeError, match="another thread did not finish"):
        energy.close()
    assert busy.is_alive()
    assert time.monotonic() - start < 1
    busy.join()
    assert energy(frames[:1]).isfinite()


def test_the_start_of_a_worker_counts_towards_the_timeout():
    """The system is larger than the 64 kB that a pipe holds until the worker reads them."""
    system = openmm.System()
    for i in range(20_000):
        system.addParticle(1.0 + i / 7)
    energy = OpenMMEnergy(system, 300, workers=1, timeout=0.1)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"did not answer within 0\.1 s"):
        energy(torch.zeros(1, 20_000, 3))
    assert time.monotonic() - start < 0.6
    with OpenMMEnergy(system, 300, workers=1) as patient:
        assert patient(torch.zeros(1, 20_000, 3)) == 0


def test_copies_of_a_used_energy_work(molecule, energy, frames):
    with OpenMMEnergy(molecule.system, 600, workers=1) as used:
        expected = used(frames[:3])
        with pickle.loads(pickle.dumps(used)) as copy:
            torch.testing.assert_close(copy(frames[:3]), expected, rtol=0, atol=0)
    torch.testing.assert_close(pickle.loads(pickle.dumps(energy))(frames[:3]), expected, rtol=0, atol=0)


def test_workers_end_with_their_energy(molecule, frames):
    energy = OpenMMEnergy(molecule.system, 600, workers=1)
    energy(frames[:1])
    process = energy._pool._workers[0].process
    del energy
    process.join(60)
    assert process.exitcode == 0


@pytest.mark.parametrize(
    "call", ["simulate(molecule, 300, 2, workers=1, progress=False)", "energy(torch.zeros(1, 22, 3))"]
)
def test_a_script_without_a_guard_is_told(tmp_path, call):
    script = tmp_path / "script.py"
    script.write_text(
        "import torch\n"
        "from p4flows.molecules import OpenMMEnergy, alanine_dipeptide, simulate\n"
        "molecule = alanine_dipeptide()\n"
        f"energy = OpenMMEnergy(molecule.system, 300, workers=1)\n{call}\n"
    )
    result = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**ENVIRONMENT, "P4FLOWS_CACHE": str(tmp_path / "cache")},
    )
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert "worker died while it started, with exit code 1" in last
    assert "needs `if __name__ == '__main__':`" in last


def test_a_script_without_a_guard_is_told_for_large_molecules(tmp_path):
    """Whose system is more than a pipe holds, so that it is still being sent when the new process ends."""
    script = tmp_path / "script.py"
    script.write_text(
        "from openmm import System, HarmonicBondForce\n"
        "from p4flows.molecules import simulate\n"
        "system, bonds = System(), HarmonicBondForce()\n"
        "for i in range(20_000):\n    system.addParticle(1.0 + i / 7)\n"
        "simulate(system, 300, 2, positions=[[0, 0, i] for i in range(20_000)], workers=1, progress=False)\n"
    )
    result = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**ENVIRONMENT, "P4FLOWS_CACHE": str(tmp_path / "cache")},
    )
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert "worker died while it started" in last
    assert "needs `if __name__ == '__main__':`" in last


def _in_a_daemon(connection, system, workers, frames):
    torch.set_num_threads(1)
    try:
        connection.send(OpenMMEnergy(system, 600, workers=workers)(frames).numpy())
    except RuntimeError as error:
        connection.send(str(error))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_daemons_evaluate_and_are_told_that_they_have_no_workers(molecule, energy, frames):
    expected = energy(frames[:3])
    context = multiprocessing.get_context("fork")
    answers = []
    for workers in (0, 1):
        ours, theirs = context.Pipe()
        arguments = theirs, molecule.system, workers, frames[:3]
        process = context.Process(target=_in_a_daemon, args=arguments, daemon=True)
        process.start()
        assert ours.poll(120)
        answers.append(ours.recv())
        process.join()
    torch.testing.assert_close(torch.from_numpy(answers[0]), expected, rtol=0, atol=0)
    assert "is a daemonic process, which may not start others; use workers=0 in it" in answers[1]

"""Energies and simulations by any executor: the same numbers, and a lost process is an error or is repeated."""

import concurrent.futures
import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import time

import numpy as np
import pytest
import torch

pytest.importorskip("openmm")
pytest.importorskip("tqdm")

import openmm

from p4flows.molecules import OpenMMEnergy, simulate, submission, tasks


def processes(workers=2):
    return concurrent.futures.ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))


def threads(workers=2):
    return concurrent.futures.ThreadPoolExecutor(workers)


@pytest.fixture(scope="module", params=["threads", "processes", "dask"])
def executor(request):
    if request.param != "dask":
        with {"threads": threads, "processes": processes}[request.param]() as executor:
            yield executor
        return
    yield request.getfixturevalue("cluster").get_executor()


@pytest.fixture(scope="module")
def cluster():
    """A client of two workers of dask, which starts a new one for one that is lost."""
    with dask_client() as client:
        yield client


@contextlib.contextmanager
def dask_client(**options):
    distributed = pytest.importorskip("distributed", reason="dask.distributed is not installed: '.[cluster]' brings it")
    settings = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": ":0", **options}
    with distributed.LocalCluster(**settings) as cluster, distributed.Client(cluster) as client:
        yield client


@pytest.mark.parametrize("cut", [0, 1, 7])
def test_energies_and_forces_are_the_same(molecule, energy, frames, executor, cut):
    x = frames.clone().requires_grad_()
    (expected,) = torch.autograd.grad(energy(x).sum(), x)
    shared = OpenMMEnergy(molecule, 600, workers=cut, executor=executor)
    torch.testing.assert_close(shared(x), energy(x), rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(shared(x).sum(), x)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0)
    assert shared(frames[:0]).shape == (0,)
    shared.close()  # the executor is not ours to shut down
    torch.testing.assert_close(shared(frames[:1]), energy(frames[:1]), rtol=0, atol=0)


def test_structures_that_are_not_finite_cost_infinity(molecule, frames, executor):
    shared = OpenMMEnergy(molecule, 600, executor=executor)
    x = frames[:3].clone()
    x[1, 0, 0] = float("nan")
    x[2, 0] = x[2, 21]
    assert shared(x).isfinite().tolist() == [True, False, False]
    assert shared.invalid == 2


OPTIONS = {"stride": 2, "equilibration": 10, "workers": 3, "progress": False}


@pytest.fixture(scope="module")
def here(molecule, tmp_path_factory):
    """Frames of processes of this machine."""
    return simulate(molecule, 600, 52, cache=tmp_path_factory.mktemp("here"), **OPTIONS)


def test_simulations_are_the_same(molecule, executor, here, tmp_path):
    there = simulate(molecule, 600, 52, cache=tmp_path / "there", executor=executor, **OPTIONS)
    assert np.array_equal(here, there)
    (folder,) = (tmp_path / "there" / "md").iterdir()
    assert {path.name for path in folder.iterdir()} == {"about.json", "frames.npy", "lock"}


def test_tasks_say_what_went_wrong(molecule, frames, executor, tmp_path):
    system = openmm.System()
    for _ in range(22):
        system.addParticle(1.0)
    force = openmm.CustomExternalForce("x / nowhere")
    force.addParticle(0, [])
    system.addForce(force)
    with pytest.raises(RuntimeError, match=r"a task of the executor failed: OpenMMException: .*nowhere"):
        OpenMMEnergy(system, 600, executor=executor)(frames[:2])
    options = {"positions": molecule.positions, "executor": executor, "cache": tmp_path, "progress": False}
    with pytest.raises(RuntimeError, match=r"molecular dynamics failed: OpenMMException: .*nowhere"):
        simulate(system, 600, 2, **options)


def test_threads_share_an_executor_but_no_context(molecule, energy, frames):
    x = frames.repeat(4, 1, 1)
    tasks._idle.clear()
    with threads(3) as executor:
        shared = OpenMMEnergy(molecule, 600, workers=12, executor=executor)
        torch.testing.assert_close(shared(x), energy(x), rtol=0, atol=0)
    assert 1 <= len(tasks._idle) <= 3  # as many contexts as threads, which are kept for the next batch


def kill_workers(pids, after):
    def kill():
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    timer = threading.Timer(after, kill)
    timer.start()
    return timer


def test_a_killed_process_is_an_error_in_seconds(molecule, frames, tmp_path):
    batch = frames[:1].expand(60_000, -1, -1).contiguous()  # some seconds of work
    with processes() as executor:
        shared = OpenMMEnergy(molecule, 600, executor=executor)
        shared(frames)
        kill_workers([next(iter(executor._processes))], 0.5)
        start = time.monotonic()
        with pytest.raises(RuntimeError, match="a task of the executor failed: BrokenProcessPool"):
            shared(batch)
        assert time.monotonic() - start < 10
        with pytest.raises(RuntimeError, match="a task of the executor failed: BrokenProcessPool"):
            shared(frames[:4])
        with pytest.raises(RuntimeError, match="molecular dynamics failed: BrokenProcessPool"):
            simulate(molecule, 300, 4, executor=executor, cache=tmp_path, progress=False)


def test_an_interrupted_simulation_keeps_the_trajectories_that_were_done(molecule, tmp_path, monkeypatch):
    with threads() as executor:
        whole = simulate(molecule, 600, 9, cache=tmp_path / "whole", executor=executor, **OPTIONS)
    calls, trajectory = [], submission.trajectory

    def fails_once(settings, chain, count):
        calls.append(chain)
        if calls == [0, 1]:
            raise OSError("no space left")
        return trajectory(settings, chain, count)

    monkeypatch.setattr(submission, "trajectory", fails_once)
    failed = pytest.raises(RuntimeError, match="molecular dynamics failed: OSError: no space left")
    with threads(1) as executor, failed:
        simulate(molecule, 600, 9, cache=tmp_path / "part", executor=executor, **OPTIONS)
    with threads(1) as executor:
        again = simulate(molecule, 600, 9, cache=tmp_path / "part", executor=executor, **OPTIONS)
    assert np.array_equal(again, whole)
    assert calls.count(0) == 1


def test_dask_repeats_the_tasks_of_a_lost_worker(molecule, energy, frames, cluster):
    shared = OpenMMEnergy(molecule, 600, executor=cluster.get_executor())
    shared(frames)
    pids = list(cluster.run(os.getpid).values())
    timer = kill_workers(pids[:1], 0.5)
    repeats = 40  # some seconds of work
    torch.testing.assert_close(shared(frames.repeat(repeats, 1, 1)), energy(frames).repeat(repeats), rtol=0, atol=0)
    timer.join()
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def test_dask_repeats_the_trajectories_of_a_lost_worker(molecule, cluster, in_threads, tmp_path):
    options = {"stride": 500, "equilibration": 0, "workers": 4, "progress": False}  # half a second each, or more
    cluster.wait_for_workers(2)
    pids = list(cluster.run(os.getpid).values())
    timer = kill_workers(pids[:1], 0.3)
    found = simulate(molecule, 600, 80, cache=tmp_path / "dask", executor=cluster.get_executor(), **options)
    timer.join()
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)
    assert np.array_equal(found, simulate(molecule, 600, 80, cache=tmp_path / "here", executor=in_threads, **options))


def test_a_cluster_without_workers_is_an_error_after_the_timeout(molecule, frames):
    with dask_client(n_workers=0) as client:
        shared = OpenMMEnergy(molecule, 600, executor=client.get_executor(), timeout=1.0)
        start = time.monotonic()
        with pytest.raises(RuntimeError, match=r"the executor did not answer within 1\.0 s"):
            shared(frames[:2])
        assert time.monotonic() - start < 10


def test_a_slow_executor_is_an_error_after_the_timeout(molecule, frames):
    with threads(1) as executor:
        executor.submit(time.sleep, 1.5)
        with pytest.raises(RuntimeError, match=r"the executor did not answer within 0\.3 s"):
            OpenMMEnergy(molecule, 600, executor=executor, timeout=0.3)(frames[:2])


def test_a_time_out_within_a_task_is_told_as_such(molecule, frames, monkeypatch):
    def late(*arguments):
        raise TimeoutError("the disk did not answer")

    monkeypatch.setattr(tasks, "evaluate", late)
    for timeout in (None, 60.0):
        with (
            threads(1) as executor,
            pytest.raises(RuntimeError, match=r"task of the executor failed: .*the disk did no"),
        ):
            OpenMMEnergy(molecule, 600, executor=executor, timeout=timeout)(frames[:2])


def test_machines_with_another_openmm_are_refused(molecule, tmp_path, monkeypatch):
    """Their frames would be in the cache as those of the version that is here."""

    def elsewhere(settings, chain, count):
        return trajectory({**settings, "openmm": "7.7"}, chain, count)

    trajectory = submission.trajectory
    monkeypatch.setattr(submission, "trajectory", elsewhere)
    with threads(1) as executor, pytest.raises(RuntimeError, match=r"expected OpenMM 7.7, as its caller has, got \d"):
        simulate(molecule, 300, 2, executor=executor, cache=tmp_path, progress=False)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_forked_process_has_no_executor(molecule, frames):
    with threads(1) as executor:
        shared = OpenMMEnergy(molecule, 600, executor=executor)
        shared(frames[:1])
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            torch.set_num_threads(1)
            try:
                shared(frames[:1])
                answer = "an energy"
            except RuntimeError as error:
                answer = str(error)
            alone = OpenMMEnergy(molecule, 600)(frames[:1]).isfinite().all()
            os.write(writer, f"{answer}; {alone}".encode())
            os._exit(0)
        os.waitpid(child, 0)
        assert "an executor cannot be used in a forked process" in os.read(reader, 1000).decode()
    with pytest.raises(TypeError, match="with an executor cannot be copied"):
        pickle.dumps(shared)


@pytest.mark.parametrize("executor", ["dask", object()])
def test_wrong_executors(molecule, executor):
    with pytest.raises(ValueError, match=r"executor: expected a concurrent.futures.Executor, got"):
        OpenMMEnergy(molecule, 300, executor=executor)
    with pytest.raises(ValueError, match=r"executor: expected a concurrent.futures.Executor, got"):
        simulate(molecule, 300, 1, executor=executor)

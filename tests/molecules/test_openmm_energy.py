"""Energies and gradients of the OpenMM bridge, in this process and in workers."""

import math
import os
import signal
import threading
import time

import pytest
import torch

pytest.importorskip("openmm")
pytest.importorskip("tqdm")

import openmm

from p4flows.molecules import OpenMMEnergy, evaluation, regularize_energy


def test_energy_and_gradient_agree_with_openmm_and_finite_differences(molecule, energy, frames):
    x = frames[::100].double().requires_grad_()
    u = energy(x)
    (gradient,) = torch.autograd.grad(u.sum(), x)
    context = openmm.Context(
        molecule.system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
    )
    kT = openmm.unit.MOLAR_GAS_CONSTANT_R * 600 * openmm.unit.kelvin
    for frame, value in zip(x.detach().numpy(), u, strict=True):
        context.setPositions(frame)
        assert value.item() == pytest.approx(context.getState(getEnergy=True).getPotentialEnergy() / kT, rel=1e-12)
    h = 1e-6
    for atom, axis in ((0, 0), (8, 1), (21, 2)):
        step = torch.zeros(22, 3, dtype=torch.float64)
        step[atom, axis] = h
        difference = (energy(x.detach() + step) - energy(x.detach() - step)) / (2 * h)
        torch.testing.assert_close(gradient[:, atom, axis], difference, rtol=1e-5, atol=1e-3)


def test_shapes_dtypes_and_weights(energy, frames):
    flat = frames[:6].flatten(1)
    u = energy(flat)
    assert u.dtype == torch.float32
    assert u.shape == (6,)
    assert torch.equal(energy(frames[:6]), u)
    assert torch.equal(energy(flat.reshape(2, 3, 66)), u.reshape(2, 3))
    assert energy(flat[0]).shape == ()
    assert energy(flat[:0]).shape == (0,)
    x = flat.clone().requires_grad_()
    weights = torch.randn(6)
    (energy(x) * weights).sum().backward()
    y = flat.clone().requires_grad_()
    energy(y).sum().backward()
    torch.testing.assert_close(x.grad, weights[:, None] * y.grad)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_positions_that_are_not_finite_cost_infinity_and_pull_nowhere(molecule, frames, value):
    energy = OpenMMEnergy(molecule.system, 600)
    x = frames[:3].clone()
    x[1, 5, 2] = value
    x.requires_grad_()
    u = energy(x)
    assert u[1] == math.inf
    assert u[[0, 2]].isfinite().all()
    assert energy.invalid == 1
    u.sum().backward()
    assert x.grad[1].abs().max() == 0
    assert x.grad[[0, 2]].isfinite().all()
    assert x.grad[0].abs().max() > 0


def test_overlapping_atoms_cost_infinity(molecule, frames):
    energy = OpenMMEnergy(molecule.system, 600)
    x = frames[:1].clone()
    x[0, 0] = x[0, 21]
    assert energy(x) == math.inf
    assert energy.invalid == 1


def test_regularisation(molecule, frames):
    u = torch.tensor([-5.0, 99.0, 100.0, 101.0, 1e4, 1e6, math.inf], dtype=torch.float64, requires_grad=True)
    v = regularize_energy(u, 100.0, 1e4)
    cap = 100 + math.log1p(9900)
    expected = torch.tensor([-5, 99, 100, 100 + math.log(2), cap, cap, cap], dtype=torch.float64)
    torch.testing.assert_close(v, expected)
    (gradient,) = torch.autograd.grad(v.sum(), u)
    assert gradient[:2].tolist() == [1, 1]
    assert gradient[3] == 0.5
    assert gradient[5:].tolist() == [0, 0]
    energy = OpenMMEnergy(molecule.system, 600, e_high=100.0, e_max=1e4)
    x = frames[:2].clone()
    x[0, 0] = math.nan
    x.requires_grad_()
    energy(x).sum().backward()
    assert energy(x)[0].item() == pytest.approx(cap)
    assert x.grad[0].abs().max() == 0
    assert x.grad[1].abs().max() > 0


@pytest.mark.parametrize("in_memory", [7, 1_000])  # of fewer frames than a worker's share, a batch goes in turns
def test_workers_agree_with_this_process_and_end(molecule, energy, frames, monkeypatch, in_memory):
    monkeypatch.setattr(evaluation, "_SHARED_BYTES", in_memory * 8 * (6 * 22 + 1))
    x = frames[:101].clone().requires_grad_()
    (expected,) = torch.autograd.grad(energy(x).sum(), x)
    with OpenMMEnergy(molecule.system, 600, workers=2) as shared:
        for batch in (101, 1, 0):
            torch.testing.assert_close(shared(x[:batch]), energy(x[:batch]), rtol=0, atol=0)
        (gradient,) = torch.autograd.grad(shared(x).sum(), x)
        assert [worker.frames for worker in shared._pool._workers] == [in_memory] * 2
        pids = [worker.process.pid for worker in shared._pool._workers]
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_killed_worker_is_an_error_at_once_and_the_next_call_works(molecule, energy, frames):
    with OpenMMEnergy(molecule.system, 600, workers=2) as shared:
        shared(frames[:4])
        pids = [worker.process.pid for worker in shared._pool._workers]
        os.kill(pids[1], signal.SIGKILL)
        start = time.monotonic()
        with pytest.raises(RuntimeError, match="an OpenMM worker died"):
            shared(frames)
        assert time.monotonic() - start < 10
        with pytest.raises(ProcessLookupError):
            os.kill(pids[0], 0)
        torch.testing.assert_close(shared(frames[:4]), energy(frames[:4]))


def test_a_worker_killed_in_mid_batch_is_an_error_at_once_and_leaves_nothing_behind(molecule, frames):
    batch = frames[:1].expand(100_000, -1, -1).contiguous()  # some seconds of work
    with OpenMMEnergy(molecule.system, 600, workers=2) as shared:
        shared(frames[:4])
        pids = [worker.process.pid for worker in shared._pool._workers]
        killed = []

        def kill():
            killed.append(time.monotonic())
            os.kill(pids[0], signal.SIGKILL)

        timer = threading.Timer(0.5, kill)
        timer.start()
        with pytest.raises(RuntimeError, match="an OpenMM worker died"):
            shared(batch)
        assert time.monotonic() - killed[0] < 5
        for pid in pids:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)


def test_a_worker_that_does_not_answer_is_an_error(molecule, frames):
    with (
        OpenMMEnergy(molecule.system, 600, workers=1, timeout=1e-3) as shared,
        pytest.raises(RuntimeError, match=r"did not answer within 0.001 s"),
    ):
        shared(frames)


def test_an_error_in_a_worker_is_raised_in_the_caller(frames):
    system = openmm.System()
    for _ in range(22):
        system.addParticle(1.0)
    force = openmm.CustomExternalForce("x / nowhere")
    force.addParticle(0, [])
    system.addForce(force)
    with (
        OpenMMEnergy(system, 600, workers=1) as shared,
        pytest.raises(RuntimeError, match=r"worker failed: OpenMMException: .*nowhere"),
    ):
        shared(frames[:2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"system": "alanine"}, r"system: expected an openmm.System"),
        ({"temperature": -1}, "temperature: expected a finite number > 0, got -1"),
        ({"temperature": math.inf}, "temperature"),
        ({"platform": "Abacus"}, "platform: expected one of .*Reference"),
        ({"workers": -1}, "workers: expected an integer >= 0"),
        ({"timeout": 0}, "timeout: expected a finite number > 0"),
        ({"e_high": 1.0}, "e_high and e_max"),
        ({"e_high": 2.0, "e_max": 1.0}, "e_high and e_max: expected e_high < e_max"),
    ],
)
def test_wrong_arguments(molecule, arguments, message):
    with pytest.raises(ValueError, match=message):
        OpenMMEnergy(**{"system": molecule.system, "temperature": 300, **arguments})


@pytest.mark.parametrize("x", [torch.zeros(2, 21, 3), torch.zeros(65), torch.zeros(2, 66, dtype=torch.int64), [0.0]])
def test_wrong_positions(energy, x):
    with pytest.raises(ValueError, match="positions: expected"):
        energy(x)

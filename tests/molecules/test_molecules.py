import math
import os
import signal
import threading
import time

import numpy as np
import pytest
import torch

pytest.importorskip("openmm")
pytest.importorskip("tqdm")

import openmm

from p4flows.molecules import MixedCoordinates, OpenMMEnergy, alanine_dipeptide, evaluation, regularize_energy, simulate
from p4flows.molecules.coordinates import _widest_gap, _wrap
from p4flows.molecules.geometry import angle, dihedral, distance, place, superpose


@pytest.fixture(scope="module")
def molecule():
    return alanine_dipeptide()


@pytest.fixture(scope="module")
def frames(molecule, tmp_path_factory):
    """600 real frames at 600 K."""
    cache = tmp_path_factory.mktemp("md")
    return torch.from_numpy(
        simulate(
            molecule.system, 600, 600, 50, positions=molecule.positions, equilibration=500, cache=cache, progress=False
        )
    )


@pytest.fixture(scope="module")
def energy(molecule):
    return OpenMMEnergy(molecule.system, 600)


# --- the molecule -------------------------------------------------------------------------------------------


def test_alanine_dipeptide_is_what_the_paper_has(molecule, energy):
    assert molecule.topology.getNumAtoms() == molecule.system.getNumParticles() == 22
    assert molecule.topology.getNumBonds() == 21
    assert molecule.system.getNumConstraints() == 0
    assert {type(force).__name__ for force in molecule.system.getForces()} >= {"GBSAOBCForce", "NonbondedForce"}
    names = [atom.name for atom in molecule.topology.atoms()]
    assert [names[i] for i in molecule.phi] == ["C", "N", "CA", "C"]
    assert [names[i] for i in molecule.psi] == ["N", "CA", "C", "N"]
    assert [names[i] for i in molecule.rigid_block] == ["N", "CA", "HA", "CB", "C"]
    x = torch.from_numpy(molecule.positions)
    n, h, cb, c = (x[i] - x[8] for i in (6, 9, 10, 14))
    # CORN: seen from the hydrogen, CO, R and N follow one another clockwise in an L-amino acid.
    assert torch.linalg.cross(c, cb) @ h < 0
    assert torch.linalg.cross(cb, n) @ h < 0
    y = x.clone().requires_grad_()
    energy(y).backward()
    assert y.grad.abs().max() < 10  # a minimum, up to the digits given; thousands at 600 K


# --- the energy ---------------------------------------------------------------------------------------------


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


def test_a_worker_killed_in_mid_batch_is_an_error_at_once_and_leaves_nothing_behind(molecule, energy, frames):
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
        torch.testing.assert_close(shared(frames[:4]), energy(frames[:4]))


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


# --- molecular dynamics -------------------------------------------------------------------------------------


def md(molecule, cache, **options):
    settings = {"stride": 2, "equilibration": 10, "progress": False, "positions": molecule.positions, **options}
    return simulate(molecule.system, 600, 520, cache=cache, **settings)


def test_simulation_is_cached_by_its_arguments(molecule, tmp_path):
    x = md(molecule, tmp_path)
    assert x.shape == (520, 22, 3)
    assert x.dtype == np.float32
    start = time.monotonic()
    assert np.array_equal(md(molecule, tmp_path), x)
    assert time.monotonic() - start < 1
    assert not np.array_equal(md(molecule, tmp_path, seed=1)[:100], x[:100])
    assert len([*(tmp_path / "md").iterdir()]) == 2
    assert not np.array_equal(x[:260], x[260:])  # two trajectories


def test_a_molecule_brings_its_positions(molecule, tmp_path):
    options = {"stride": 1, "equilibration": 0, "workers": 1, "cache": tmp_path, "progress": False}
    x = simulate(molecule, 300, 5, **options)
    assert np.array_equal(x, simulate(molecule.system, 300, 5, positions=molecule.positions, **options))


def test_an_interrupted_simulation_goes_on_to_the_same_frames(molecule, tmp_path, monkeypatch):
    from p4flows.molecules import sampling

    whole = md(molecule, tmp_path / "whole", workers=1)

    def interrupted(jobs, bar):
        while not [*(tmp_path / "part").rglob("chain-0-0.npy")]:
            time.sleep(0.01)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sampling, "_follow", interrupted)
        with pytest.raises(KeyboardInterrupt):
            md(molecule, tmp_path / "part", workers=1)
    assert not [*(tmp_path / "part").rglob("frames.npy")]
    assert np.array_equal(md(molecule, tmp_path / "part", workers=1), whole)


def test_kinetic_and_potential_energies_are_those_of_the_temperature(energy, frames):
    u = energy(frames).double()
    # Equipartition: about half a kT for each of the 60 internal degrees of freedom above the minimum.
    minimum = energy(torch.from_numpy(alanine_dipeptide().positions))
    assert 25 < u.mean() - minimum < 37


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frames": 0}, "frames: expected an integer >= 1"),
        ({"stride": 1.5}, "stride"),
        ({"workers": 0}, "workers"),
        ({"temperature": 0}, "temperature"),
        ({"positions": np.zeros((21, 3))}, r"positions: expected finite \(22, 3\)"),
        ({"positions": np.full((22, 3), np.nan)}, "positions: expected finite"),
        ({"system": None}, r"system: expected an openmm.System or a Molecule"),
        ({"positions": None}, "positions: expected .*since a System has none"),
    ],
)
def test_wrong_simulation_arguments(molecule, tmp_path, arguments, message):
    given = {
        "system": molecule.system,
        "temperature": 300,
        "frames": 1,
        "positions": molecule.positions,
        "cache": tmp_path,
        **arguments,
    }
    with pytest.raises(ValueError, match=message):
        simulate(**given)


def test_an_exploding_simulation_is_an_error(molecule, tmp_path):
    system = openmm.System()
    for _ in range(22):
        system.addParticle(1.0)
    force = openmm.CustomExternalForce("sqrt(-1 - x^2)")
    force.addParticle(0, [])
    system.addForce(force)
    with pytest.raises(RuntimeError, match="molecular dynamics failed: "):
        simulate(system, 300, 300, positions=molecule.positions, workers=1, cache=tmp_path, progress=False)


# --- coordinates --------------------------------------------------------------------------------------------


def test_placing_an_atom_inverts_distance_angle_and_dihedral():
    b, c, d = torch.randn(3, 50, 3, dtype=torch.float64)
    bond, theta = torch.rand(2, 50, dtype=torch.float64) + 0.1
    phi = (torch.rand(50, dtype=torch.float64) - 0.5) * 6.2
    a = place(b, c, d, bond, theta, phi)
    torch.testing.assert_close(distance(a, b), bond)
    torch.testing.assert_close(angle(a, b, c), theta)
    torch.testing.assert_close(dihedral(a, b, c, d), phi)


def test_dihedrals_have_the_sign_of_openmm(molecule):
    x = molecule.positions
    force = openmm.CustomTorsionForce("theta")
    force.addTorsion(*(int(i) for i in molecule.phi), [])
    system = openmm.System()
    for _ in range(22):
        system.addParticle(1.0)
    system.addForce(force)
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(x)
    theta = context.getState(getEnergy=True).getPotentialEnergy()._value
    assert dihedral(*torch.from_numpy(x[molecule.phi])).item() == pytest.approx(theta)


def test_superposition_undoes_a_rigid_motion():
    reference = torch.randn(5, 3, dtype=torch.float64)
    reference -= reference.mean(0)
    R = torch.linalg.qr(torch.randn(20, 3, 3, dtype=torch.float64)).Q
    R = R * torch.linalg.det(R)[:, None, None]
    aligned, _ = superpose(reference @ R + torch.randn(20, 1, 3, dtype=torch.float64), reference)
    torch.testing.assert_close(aligned, reference.expand(20, 5, 3))
    _, S = superpose(torch.randn(20, 5, 3, dtype=torch.float64), reference)
    torch.testing.assert_close(torch.linalg.det(S), torch.ones(20, dtype=torch.float64))


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=["float32", "float64"])
def coordinates(request, molecule, frames):
    return MixedCoordinates(molecule.z_matrix, molecule.rigid_block, frames.to(request.param))


def test_mixed_coordinates_round_trip(coordinates, energy, frames):
    x = frames.to(coordinates.mean.dtype)
    z, logabsdet = coordinates(x)
    assert z.shape == (600, 60)
    assert coordinates.n_coordinates == 60
    torch.testing.assert_close(z.mean(0), torch.zeros(60, dtype=z.dtype), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.std(0), torch.ones(60, dtype=z.dtype), atol=1e-4, rtol=0)
    y, inverse_logabsdet = coordinates.inverse(z)
    assert y.shape == (600, 66)
    single = z.dtype == torch.float32
    torch.testing.assert_close(inverse_logabsdet, -logabsdet, atol=1e-3 if single else 1e-9, rtol=0)
    torch.testing.assert_close(coordinates(y)[0], z, atol=1e-3 if single else 1e-9, rtol=0)
    torch.testing.assert_close(energy(y), energy(x), atol=1e-2 if single else 1e-8, rtol=0)
    torch.testing.assert_close(superpose(y.unflatten(-1, (22, 3)), x[0] - x[0].mean(0))[0].shape, x.shape)


def test_a_new_flow_makes_finite_molecules_in_float32(molecule, frames):
    coordinates = MixedCoordinates(molecule.z_matrix, molecule.rigid_block, frames)
    x, logabsdet = coordinates.inverse(5 * torch.randn(1000, 60))
    assert x.isfinite().all()
    assert logabsdet.isfinite().all()


def rotation(w):
    """exp of the cross-product matrix of w."""
    zero = torch.zeros((), dtype=w.dtype)
    K = torch.stack([zero, -w[2], w[1], w[2], zero, -w[0], -w[1], w[0], zero]).reshape(3, 3)
    return torch.linalg.matrix_exp(K)


def test_log_determinant_is_that_of_all_66_dimensions(molecule, frames):
    coordinates = MixedCoordinates(molecule.z_matrix, molecule.rigid_block, frames.double())
    z, logabsdet = coordinates(frames[::150].double())

    def cartesian(parameters):
        z, shift, axis = parameters.split([60, 3, 3])
        x = coordinates.inverse(z)[0].reshape(22, 3)
        return (x @ rotation(axis).T + shift).flatten()

    for point, value in zip(z, logabsdet, strict=True):
        J = torch.autograd.functional.jacobian(cartesian, torch.cat([point, torch.zeros(6, dtype=torch.float64)]))
        assert torch.linalg.slogdet(J).logabsdet.item() == pytest.approx(-value.item(), abs=1e-8)


def test_log_determinant_and_coordinates_do_not_depend_on_pose(molecule, frames):
    coordinates = MixedCoordinates(molecule.z_matrix, molecule.rigid_block, frames.double())
    x = frames[:20].double()
    moved = x @ rotation(torch.tensor([0.3, -2.0, 1.0], dtype=torch.float64)).T + 5.0
    for a, b in zip(coordinates(moved), coordinates(x), strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=0)


def test_dihedrals_are_cut_where_the_data_are_not():
    phi = torch.remainder(torch.tensor([[3.0], [0.5]]) + 0.3 * torch.randn(2, 5000) + math.pi, 2 * math.pi) - math.pi
    cut = _widest_gap(phi.T.double())
    wrapped = _wrap(phi.T.double(), cut)
    assert (wrapped.std(0) < 0.35).all()
    torch.testing.assert_close(torch.remainder(wrapped - phi.T, 2 * math.pi).cos(), torch.ones_like(wrapped))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"z_matrix": np.zeros((17, 3), dtype=int)}, r"z_matrix: expected shape \(rows, 4\)"),
        ({"rigid_block": np.array([6, 8])}, "rigid_block: expected at least 3"),
        ({"rigid_block": np.array([6, 8, 9, 10, 15])}, "each atom 0 ... 21 once"),
        ({"data": torch.zeros(100, 21, 3)}, r"data: expected floating-point \(..., 22, 3\)"),
        ({"data": torch.zeros(100, 66, dtype=torch.int64)}, "data: expected floating-point"),
        ({"data": torch.randn(10, 66)}, "data: expected at least 66 frames"),
        ({"data": torch.randn(66).expand(100, 66)}, "expected every coordinate to vary"),
    ],
)
def test_wrong_coordinates(molecule, frames, arguments, message):
    given = {"z_matrix": molecule.z_matrix, "rigid_block": molecule.rigid_block, "data": frames, **arguments}
    with pytest.raises(ValueError, match=message):
        MixedCoordinates(**given)


def test_a_circular_z_matrix_is_an_error(molecule, frames):
    z_matrix = molecule.z_matrix.copy()
    z_matrix[1] = (1, 0, 6, 8)
    with pytest.raises(ValueError, match="cannot be placed"):
        MixedCoordinates(z_matrix, molecule.rigid_block, frames)


def test_wrong_z(molecule, frames):
    coordinates = MixedCoordinates(molecule.z_matrix, molecule.rigid_block, frames)
    for z in (torch.zeros(3, 66), torch.zeros(3, 60, dtype=torch.int64), None):
        with pytest.raises(ValueError, match=r"z: expected floating-point \(..., 60\)"):
            coordinates.inverse(z)

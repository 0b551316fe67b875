"""Internal coordinates, and the mixed coordinates made of them."""

import math

import numpy as np
import pytest
import torch

pytest.importorskip("openmm")
pytest.importorskip("tqdm")

import openmm

from p4flows.molecules import MixedCoordinates
from p4flows.molecules.coordinates import _widest_gap, _wrap
from p4flows.molecules.geometry import angle, dihedral, distance, place, superpose


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
        ({"data": torch.randn(100, 66).bfloat16()}, "data: expected float32 or float64, got torch.bfloat16"),
        ({"data": torch.full((100, 66), math.nan)}, "data: expected finite positions, got 6600 that are not"),
        ({"rigid_block": np.array([6, 8, 9, 10, 99])}, "without a row: 14; unknown: 99"),
        ({"rigid_block": np.array([6, 8, 9, 10, 15])}, "without a row: 14; twice: 15"),
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


@pytest.mark.parametrize("row", [0, 3, 16])
@pytest.mark.parametrize("flat", [True, False])
def test_a_z_matrix_that_lacks_a_row_is_told_which(molecule, frames, row, flat):
    z_matrix = np.delete(molecule.z_matrix, row, 0)
    atom = molecule.z_matrix[row, 0]
    message = f"expected each atom 0 ... 21 once of data, which have 22 atoms, got without a row: {atom}$"
    with pytest.raises(ValueError, match=f"z_matrix and rigid_block: {message}"):
        MixedCoordinates(z_matrix, molecule.rigid_block, frames.flatten(1) if flat else frames)


def test_another_type_is_refused_in_words(molecule, frames):
    coordinates = MixedCoordinates(molecule.z_matrix, molecule.rigid_block, frames)
    z, _ = coordinates(frames[:2])
    with pytest.raises(ValueError, match=r"positions: expected torch.float32 on cpu.*, got torch.float64 on cpu"):
        coordinates(frames[:2].double())
    for call in (coordinates.inverse, coordinates.in_range):
        with pytest.raises(ValueError, match=r"z: expected torch.float32 on cpu.*, got torch.float64 on cpu"):
            call(z.double())
    with pytest.raises(ValueError, match="on meta"):
        coordinates.inverse(z.to("meta"))
    coordinates.double()
    torch.testing.assert_close(coordinates(frames[:2].double())[0].float(), z, rtol=1e-3, atol=1e-3)


def test_data_may_require_gradients(molecule, frames):
    coordinates = MixedCoordinates(molecule.z_matrix, molecule.rigid_block, frames.clone().requires_grad_())
    assert not any(buffer.requires_grad for buffer in coordinates.buffers())

"""Coordinates with constrained bonds: what they leave out, and the density that they give to the others."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("openmm")
pytest.importorskip("tqdm")

import openmm
from openmm import app

from p4flows.molecules import MixedCoordinates, Molecule, OpenMMEnergy, simulate
from p4flows.molecules.geometry import angle, distance

DATA = Path(__file__).parents[1] / "data" / "molecules"
FAST = ("amber99sbildn.xml", "amber99_obc.xml")  # on the Reference platform 30 times as fast as the default
KINDS = {  # constrained bonds and free coordinates
    "alanine, HBonds": (12, 48),
    "alanine, AllBonds": (21, 39),
    "proline, HBonds": (14, 58),
    "proline, none": (0, 72),
    "aniline, HBonds": (11, 43),
}


def make(kind, alanine):
    name, constraints = kind.split(", ")
    constraints = {"HBonds": app.HBonds, "AllBonds": app.AllBonds, "none": None}[constraints]
    if name == "alanine":
        field = app.ForceField("amber99sbildn.xml", "amber96_obc.xml")
        system = field.createSystem(alanine.topology, constraints=constraints, removeCMMotion=False)
        return Molecule.from_openmm(alanine.topology, system, alanine.positions)
    if name == "proline":
        return Molecule.from_pdb(DATA / "proline_dipeptide.pdb", FAST, constraints=constraints)
    return Molecule.from_pdb(DATA / "dimethylaniline.pdb", ("charmm36.xml",), constraints=constraints)


@pytest.fixture(scope="module", params=KINDS)
def case(request, molecule, tmp_path_factory, in_threads):
    """The molecule, frames at 600 K in double precision, and its coordinates."""
    molecule = make(request.param, molecule)
    options = {"equilibration": 500, "cache": tmp_path_factory.mktemp("md"), "executor": in_threads, "progress": False}
    x = torch.from_numpy(simulate(molecule, 600, 300, 20, **options)).double()
    return request.param, molecule, x, MixedCoordinates(molecule, x)


def test_constrained_bonds_are_left_out_and_kept(case):
    kind, molecule, x, coordinates = case
    pairs, lengths = molecule.constraints
    assert (len(pairs), coordinates.n_coordinates) == KINDS[kind]
    assert coordinates.n_coordinates == 3 * molecule.n_atoms - 6 - len(pairs)
    z, _ = coordinates(x)
    assert z.shape == (300, coordinates.n_coordinates)
    torch.testing.assert_close(z.std(0), torch.ones_like(z[0]), atol=1e-6, rtol=0)
    y, _ = coordinates.inverse(torch.randn(100, coordinates.n_coordinates, dtype=torch.float64))
    y = y.unflatten(-1, (-1, 3))
    found = distance(y[:, pairs[:, 0]], y[:, pairs[:, 1]])
    torch.testing.assert_close(found, torch.from_numpy(lengths).expand_as(found), rtol=1e-12, atol=0)


def test_round_trip(case):
    _, molecule, x, coordinates = case
    z, logabsdet = coordinates(x)
    assert coordinates.in_range(z).all()
    y, inverse_logabsdet = coordinates.inverse(z)
    # The constraints of the dynamics hold to a relative 1e-5, those of the coordinates exactly.
    torch.testing.assert_close(coordinates(y)[0], z, atol=1e-8, rtol=0)
    torch.testing.assert_close(inverse_logabsdet, -logabsdet, atol=1e-3, rtol=0)
    torch.testing.assert_close(coordinates(y)[1], -inverse_logabsdet, atol=1e-9, rtol=0)
    energy = OpenMMEnergy(molecule, 600)
    torch.testing.assert_close(energy(y), energy(x), atol=0.05, rtol=0)


def rotation(w):
    zero = torch.zeros((), dtype=w.dtype)
    K = torch.stack([zero, -w[2], w[1], w[2], zero, -w[0], -w[1], w[0], zero]).reshape(3, 3)
    return torch.linalg.matrix_exp(K)


def test_log_determinant_is_the_volume_in_the_metric_of_masses(case):
    """½ ln det(Jᵀ M J) of the map from z, translation and rotation to positions, by autograd, constants included."""
    _, molecule, x, coordinates = case
    n = coordinates.n_coordinates
    masses = torch.from_numpy(molecule.masses)
    pairs, _ = molecule.constraints
    constant = 1.5 * masses.log().sum() + 0.5 * (1 / masses[pairs[:, 0]] + 1 / masses[pairs[:, 1]]).log().sum()

    def cartesian(parameters):
        z, shift, axis = parameters.split([n, 3, 3])
        return (coordinates.inverse(z)[0].reshape(-1, 3) @ rotation(axis).T + shift).flatten()

    for z in coordinates(x[::100])[0]:
        J = torch.autograd.functional.jacobian(cartesian, torch.cat([z, torch.zeros(6, dtype=z.dtype)]))
        volume = torch.linalg.slogdet(J.T * masses.repeat_interleave(3) @ J).logabsdet / 2
        assert coordinates.inverse(z)[1].item() == pytest.approx((volume - constant).item(), abs=1e-7)


def test_energies_have_the_gradients_of_finite_differences(case):
    _, molecule, x, coordinates = case
    energy = OpenMMEnergy(molecule, 600)
    z = coordinates(x[150])[0].requires_grad_()

    def reduced(z):
        y, logabsdet = coordinates.inverse(z)
        return energy(y) - logabsdet

    (gradient,) = torch.autograd.grad(reduced(z), z)
    with torch.no_grad():
        steps = 1e-5 * torch.eye(len(z), dtype=z.dtype)
        differences = (reduced(z + steps) - reduced(z - steps)) / 2e-5
    torch.testing.assert_close(gradient, differences, rtol=1e-4, atol=1e-4)


def triatomic(constrained):
    """A heavy-light-heavy molecule, the angle of which feels the constraints of its two bonds."""
    topology, system = app.Topology(), openmm.System()
    residue = topology.addResidue("UNK", topology.addChain())
    atoms = [topology.addAtom(name, app.element.carbon, residue) for name in ("A", "B", "C")]
    bonds, bend = openmm.HarmonicBondForce(), openmm.CustomAngleForce("6 * (theta - 2)^2")  # kJ/mol
    for mass in (16.0, 4.0, 16.0):
        system.addParticle(mass)
    for i, j in ((0, 1), (1, 2)):
        topology.addBond(atoms[i], atoms[j])
        if constrained:
            system.addConstraint(i, j, 0.15)
        else:
            bonds.addBond(i, j, 0.15, 20_000.0)
    bend.addAngle(0, 1, 2, [])
    system.addForce(bonds)
    system.addForce(bend)
    x = 0.15 * np.array([[1.0, 0, 0], [0, 0, 0], [math.cos(2), math.sin(2), 0]])
    return Molecule.from_openmm(topology, system, x)


@pytest.mark.parametrize("constrained", [False, True])
def test_the_density_is_that_of_the_dynamics(constrained, tmp_path, in_threads):
    """The mean of cos θ of 300 K dynamics, and that of the density e^-u |∂x/∂z| on a grid."""
    molecule = triatomic(constrained)
    options = {"equilibration": 1_000, "cache": tmp_path, "executor": in_threads, "progress": False}
    x = torch.from_numpy(simulate(molecule, 300, 8_000, 500, **options)).double()
    coordinates = MixedCoordinates(molecule, x)
    assert coordinates.n_coordinates == (1 if constrained else 3)
    assert len(coordinates.torsions.indices) == 0
    cosines = angle(x[:, 0], x[:, 1], x[:, 2]).cos()
    blocks = cosines.reshape(40, 200).mean(1)
    error = (blocks.std() / math.sqrt(40)).item()
    grid = torch.linspace(-6, 6, 4_001, dtype=torch.float64)[:, None]
    if not constrained:  # the bonds are stiff: θ and the lengths are independent up to their own volume
        theta = torch.linspace(0.02, math.pi - 0.02, 4_001, dtype=torch.float64)
        u = 6.0 * (theta - 2.0) ** 2 / (8.31446261815324e-3 * 300)
        log_density = -u + theta.sin().log()
    else:
        y, logabsdet = coordinates.inverse(grid)
        y = y.unflatten(-1, (3, 3))
        log_density = (-OpenMMEnergy(molecule, 300)(y) + logabsdet).where(coordinates.in_range(grid), -math.inf)
        theta = angle(y[:, 0], y[:, 1], y[:, 2])
        # Without the metric of masses, the mean would be another one, by many errors.
        stiff = (log_density - coordinates.constraints.log_metric(y)).softmax(0)
        assert abs((stiff * theta.cos()).sum() - cosines.mean()) > 4 * error
    expected = (log_density.softmax(0) * theta.cos()).sum().item()
    assert error < 0.01
    assert cosines.mean().item() == pytest.approx(expected, abs=4 * error)


def test_other_lengths_are_refused(molecule, frames):
    constrained = make("alanine, HBonds", molecule)
    with pytest.raises(ValueError, match=r"data: expected the constrained bond \d+-\d+ to be 0.\d+ nm long, got"):
        MixedCoordinates(constrained, frames)
    with pytest.raises(ValueError, match="rigid_block: expected none beside a Molecule"):
        MixedCoordinates(constrained, constrained.rigid_block, frames)


def test_a_constrained_bond_in_a_cartesian_block_is_refused(molecule):
    system = make("alanine, HBonds", molecule).system
    with pytest.raises(ValueError, match="rigid_block: expected 3 atoms where a bond within it is constrained"):
        Molecule.from_openmm(
            molecule.topology,
            system,
            molecule.positions,
            z_matrix=molecule.z_matrix,
            rigid_block=molecule.rigid_block,
        )

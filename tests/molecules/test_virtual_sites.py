"""Particles that are placed by others, and bonds that cannot vary: energies, gradients, coordinates."""

import numpy as np
import pytest
import torch

pytest.importorskip("openmm")
pytest.importorskip("tqdm")

import openmm
from openmm import Vec3, app, unit

from p4flows.molecules import MixedCoordinates, OpenMMEnergy, simulate


@pytest.fixture(scope="module")
def dimer():
    """Two molecules of flexible TIP4P-Ew water, each with one virtual site: the system, and positions in nm."""
    field = app.ForceField("amber14/tip4pew.xml")
    topology, positions = app.Topology(), []
    chain = topology.addChain()
    for shift in (0.0, 0.29):
        residue = topology.addResidue("HOH", chain)
        atoms = [topology.addAtom(n, app.Element.getBySymbol(n[0]), residue) for n in ("O", "H1", "H2")]
        for hydrogen in atoms[1:]:
            topology.addBond(atoms[0], hydrogen)
        positions += [Vec3(shift, 0, 0), Vec3(shift + 0.09, 0.03, 0.01), Vec3(shift - 0.03, 0.09, 0)]
    modeller = app.Modeller(topology, positions * unit.nanometer)
    modeller.addExtraParticles(field)
    system = field.createSystem(modeller.topology, nonbondedMethod=app.NoCutoff, constraints=None, rigidWater=False)
    return system, torch.tensor(np.array(modeller.positions.value_in_unit(unit.nanometer)))


def all_kinds():
    """A site of every kind, each in a field that pulls at it, and random positions."""
    system = openmm.System()
    for mass in (12.0, 14.0, 16.0, 0.0, 0.0, 0.0, 0.0):
        system.addParticle(mass)
    system.setVirtualSite(3, openmm.TwoParticleAverageSite(0, 1, 0.3, 0.7))
    system.setVirtualSite(4, openmm.ThreeParticleAverageSite(0, 1, 2, 0.2, 0.3, 0.5))
    system.setVirtualSite(5, openmm.OutOfPlaneSite(0, 1, 2, 0.2, 0.3, 4.0))
    local = openmm.LocalCoordinatesSite([0, 1, 2], [1, 0, 0], [-1, 0.5, 0.5], [0, -1, 1], Vec3(0.02, 0.03, 0.04))
    system.setVirtualSite(6, local)
    field = openmm.CustomExternalForce("200 * sin(9 * x + i) + 300 * y^2 * z + 50 * z")
    field.addPerParticleParameter("i")
    for i in range(7):
        field.addParticle(i, [float(i)])
    system.addForce(field)
    return system, 0.1 * torch.randn(7, 3, dtype=torch.float64)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ["dimer", "all kinds"])
def test_gradients_are_those_of_finite_differences_and_zero_on_sites(dimer, kind, workers):
    system, x = dimer if kind == "dimer" else all_kinds()
    sites = [i for i in range(len(x)) if system.isVirtualSite(i)]
    assert sites
    x = x.requires_grad_()
    with OpenMMEnergy(system, 300, workers=workers) as energy:
        (gradient,) = torch.autograd.grad(energy(x), x)
        h = 1e-5
        steps = h * torch.eye(x.numel(), dtype=torch.float64).reshape(-1, *x.shape)
        with torch.no_grad():
            differences = ((energy(x + steps) - energy(x - steps)) / (2 * h)).reshape(x.shape)
            moved = x.clone()
            moved[sites] += 1.0
            assert energy(moved) == energy(x)
    torch.testing.assert_close(gradient, differences, rtol=0, atol=1e-3)
    assert (gradient[sites] == 0).all()
    assert gradient.abs().max() > 10


def test_simulations_place_the_sites_first(dimer, tmp_path, in_threads):
    system, x = dimer
    moved = x.detach().clone()
    moved[[3, 7]] = moved[[0, 4]]  # on the oxygens: an infinite energy, were it taken as given
    options = {"stride": 1, "equilibration": 0, "executor": in_threads, "cache": tmp_path, "progress": False}
    a, b = (simulate(system, 300, 3, positions=p.numpy(), **options) for p in (x.detach(), moved))
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_constrained_bonds_are_refused_with_the_way_out(molecule, tmp_path, in_threads):
    field = app.ForceField("amber99sbildn.xml", "amber96_obc.xml")
    system = field.createSystem(molecule.topology, nonbondedMethod=app.NoCutoff, constraints=app.HBonds)
    x = simulate(
        system,
        *(600, 80, 20),
        positions=molecule.positions,
        equilibration=0,
        executor=in_threads,
        cache=tmp_path,
        progress=False,
    )
    with pytest.raises(ValueError, match="expected every coordinate to vary") as error:
        MixedCoordinates(molecule.z_matrix, molecule.rigid_block, x)
    assert "the distance of atoms 8 and 9 of the block" in str(error.value)
    assert "the bond 0-1" in str(error.value)
    assert "constraints=None" in str(error.value)


@pytest.mark.parametrize("atom", [10, 0])  # of the block, and placed by the z-matrix
def test_the_smallest_spread_is_relative(molecule, atom):
    """Bonds that vary by 0.1 %, as at a few kelvin, are coordinates; those that vary by 0.001 % are not."""
    x = torch.tensor(molecule.positions).repeat(200, 1, 1)
    x += 0.005 * torch.randn(x.shape, dtype=torch.float64)
    neighbour = {10: 8, 0: 1}[atom]
    bond = torch.nn.functional.normalize(x[:, atom] - x[:, neighbour], dim=-1)

    def with_spread(relative, scale):
        y = x.clone()
        length = 0.11 * (1 + relative * torch.randn(200, 1, dtype=torch.float64))
        y[:, atom] = y[:, neighbour] + length * bond
        return scale * y

    for scale in (1.0, 10.0):  # and in other units as well
        MixedCoordinates(molecule.z_matrix, molecule.rigid_block, with_spread(1e-3, scale))
        with pytest.raises(ValueError, match=f"{min(atom, neighbour)}( and |-){max(atom, neighbour)}"):
            MixedCoordinates(molecule.z_matrix, molecule.rigid_block, with_spread(1e-5, scale))

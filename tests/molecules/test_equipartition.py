"""Sampled structures, energies, forces and log-determinants against theorems of statistical mechanics."""

import math

import numpy as np
import pytest
import torch

pytest.importorskip("openmm")
pytest.importorskip("tqdm")

from openmm import app

from p4flows.molecules import MixedCoordinates, Molecule, OpenMMEnergy, simulate

BLOCKS = 20


def block_error(values):
    """Mean and its error from blocks, for correlated samples (frames, ...)."""
    blocks = values.reshape(BLOCKS, -1, *values.shape[1:]).mean(1)
    return values.mean(0), blocks.std(0) / math.sqrt(BLOCKS)


CASES = [(300, None), (600, app.HBonds), (600, app.AllBonds)]


@pytest.mark.parametrize(("temperature", "constraints"), CASES, ids=["free", "HBonds", "AllBonds"])
def test_every_coordinate_has_its_share(molecule, tmp_path, in_threads, temperature, constraints):
    """⟨z ∂(u - ln|∂x/∂z|)/∂z⟩ = 1 for each coordinate whose density vanishes at the ends of its range."""
    field = app.ForceField("amber99sbildn.xml")  # without a solvent, which would take three times as long
    system = field.createSystem(molecule.topology, constraints=constraints, removeCMMotion=False)
    molecule = Molecule.from_openmm(molecule.topology, system, molecule.positions)
    options = {"equilibration": 2_000, "cache": tmp_path, "executor": in_threads, "progress": False}
    x = torch.from_numpy(simulate(molecule, temperature, 8_000, 50, **options)).double()
    coordinates = MixedCoordinates(molecule, x)
    z = coordinates(x)[0].requires_grad_()
    y, logabsdet = coordinates.inverse(z)
    (gradient,) = torch.autograd.grad((OpenMMEnergy(molecule, temperature)(y) - logabsdet).sum(), z)
    # Proper dihedrals turn; their density is not zero at the cut.
    torsions = coordinates.torsions
    vanishing = torch.ones(coordinates.n_coordinates, dtype=torch.bool)
    vanishing[torsions.indices[(torsions.high - torsions.low) <= 15]] = False
    assert vanishing.sum() > 0.6 * coordinates.n_coordinates
    shares = (z * gradient).detach()[:, vanishing]
    mean, error = block_error(shares)
    deviation = (mean - 1) / error
    assert error.max() < 0.08
    assert deviation.abs().max() < 4.5
    assert np.sqrt((deviation**2).mean()) < 1.5
    mean, error = block_error(shares.mean(1))  # all together: the temperature, to a per cent
    assert error < 0.015
    assert mean.item() == pytest.approx(1, abs=4 * error.item())

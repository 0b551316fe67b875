"""The molecules that come along."""

import pytest
import torch

pytest.importorskip("openmm")
pytest.importorskip("tqdm")


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

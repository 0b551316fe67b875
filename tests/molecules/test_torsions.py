"""Which coordinates are dihedrals, and where they come round: what circular splines ask for."""

import math

import pytest
import torch

pytest.importorskip("openmm")
pytest.importorskip("tqdm")

from p4flows.molecules import MixedCoordinates, dihedral


@pytest.fixture(scope="module", params=[torch.float32, torch.float64])
def coordinates(request, molecule, frames):
    return MixedCoordinates(molecule, frames.to(request.param))


def test_they_are_the_dihedrals_of_the_z_matrix(molecule, coordinates, frames):
    torsions = coordinates.torsions
    assert torsions.indices.tolist() == list(range(60 - 17, 60))
    assert torsions.atoms.tolist() == molecule.z_matrix.tolist()
    x = frames.to(coordinates.mean.dtype)
    z = coordinates(x)[0][:, torsions.indices]
    assert ((z >= torsions.low) & (z < torsions.high)).all()
    std = coordinates.std[-17:]
    torch.testing.assert_close(torsions.high - torsions.low, 2 * math.pi / std)
    angles = dihedral(*(x[:, atoms] for atoms in torsions.atoms.T))
    turned = z * std + coordinates.mean[-17:] - angles
    torch.testing.assert_close(torch.cos(turned), torch.ones_like(turned), atol=1e-4, rtol=0)


def test_a_whole_turn_is_the_same_structure_and_out_of_range(coordinates, frames):
    z, _ = coordinates(frames[:20].to(coordinates.mean.dtype))
    torsions = coordinates.torsions
    x, logabsdet = coordinates.inverse(z)
    turned = z.clone()
    turned[:, torsions.indices] += torsions.high - torsions.low
    y, same = coordinates.inverse(turned)
    torch.testing.assert_close(y, x, atol=1e-4, rtol=0)
    torch.testing.assert_close(same, logabsdet)
    assert coordinates.in_range(z).all()
    assert not coordinates.in_range(turned).any()
    # On its circle, every coordinate may be anywhere.
    position = torch.rand(20, 17, dtype=z.dtype)
    turned[:, torsions.indices] = torsions.low + position * (torsions.high - torsions.low) * (1 - 1e-5)
    assert coordinates.in_range(turned).all()

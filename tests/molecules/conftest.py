import pytest
import torch


@pytest.fixture(scope="session")
def molecule():
    return pytest.importorskip("p4flows.molecules").alanine_dipeptide()


@pytest.fixture(scope="session")
def frames(molecule, tmp_path_factory):
    """600 real frames at 600 K."""
    from p4flows.molecules import simulate

    cache = tmp_path_factory.mktemp("md")
    return torch.from_numpy(
        simulate(
            molecule.system, 600, 600, 50, positions=molecule.positions, equilibration=500, cache=cache, progress=False
        )
    )


@pytest.fixture(scope="session")
def energy(molecule):
    from p4flows.molecules import OpenMMEnergy

    return OpenMMEnergy(molecule.system, 600)

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch


@pytest.fixture(scope="session")
def molecule():
    return pytest.importorskip("p4flows.molecules").alanine_dipeptide()


@pytest.fixture(scope="session")
def frames(molecule, tmp_path_factory, in_threads):
    """600 real frames at 600 K."""
    from p4flows.molecules import simulate

    cache = tmp_path_factory.mktemp("md")
    options = {"positions": molecule.positions, "equilibration": 500, "executor": in_threads}
    return torch.from_numpy(simulate(molecule.system, 600, 600, 50, cache=cache, progress=False, **options))


@pytest.fixture(scope="session")
def energy(molecule):
    from p4flows.molecules import OpenMMEnergy

    return OpenMMEnergy(molecule.system, 600)


@pytest.fixture(scope="session")
def in_threads():
    """An executor for simulations in this process: starting others would take seconds."""
    with ThreadPoolExecutor(2) as executor:
        yield executor

import pytest
from building import build_sdist, build_wheel, clean_environment, copy_repository, pip

collect_ignore = ["programs"]  # they are run, not imported


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
    return copy_repository(tmp_path_factory.mktemp("checkout") / "p4flows")


@pytest.fixture(scope="session")
def sdist(checkout, tmp_path_factory):
    return build_sdist(checkout, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="session")
def wheel(sdist, tmp_path_factory):
    """Made from the sdist, as pip would where there is no wheel."""
    return build_wheel(sdist, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def stranger(wheel, tmp_path_factory):
    """The Python of somebody who has installed the wheel, and has torch and NumPy."""
    python = clean_environment(tmp_path_factory.mktemp("stranger"))
    pip("install", "--no-index", wheel, python=python)
    return python

"""The way of somebody who has the wheel and the site: extras are installed, and the programs of the pages run."""

import importlib.util
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pages
import pytest
from building import clean_environment, pip, run, site_of

pytest.importorskip("setuptools", minversion="77.0.3")

EXTRAS = ("nflows", "bgflow", "normflows", "zuko", "sbi", "lightning", "molecules")
RUNNER = Path(__file__).parent / "programs_of_pages.py"


def installed(name):
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def requirements(extra):
    """The packages that an extra asks for beside p4flows itself."""
    return {"bgflow": ["einops", "nflows"], "molecules": ["openmm", "tqdm"], "sbi": ["sbi", "nflows"]}.get(
        extra, [extra]
    )


@pytest.fixture(scope="module")
def extras():
    """Those whose packages the environment of the tests has."""
    return [extra for extra in EXTRAS if all(map(installed, requirements(extra)))]


@pytest.fixture(scope="module")
def reader(wheel, extras, tmp_path_factory):
    """The Python of somebody who has installed the wheel with its extras, and has no checkout."""
    packages = {name for extra in extras for name in requirements(extra)}
    python = clean_environment(tmp_path_factory.mktemp("reader"), *packages)
    bgflow = importlib.util.find_spec("bgflow")
    if bgflow:  # on no index
        (site_of(python) / "bgflow").symlink_to(Path(bgflow.origin).parent)
    pip("install", "--no-index", f"p4flows[{','.join(extras)}] @ {wheel.as_uri()}", python=python)
    return python


def programs(extras):
    """The program of each page that these extras suffice for, with what it prints."""
    known = {*extras, "bgflow" if importlib.util.find_spec("bgflow") else "", "einops"}
    for page, needs in pages.NEEDS.items():
        if known.issuperset(needs):
            found = pages.blocks(pages.path_of(page).read_text())
            yield page, "\n".join(code for code, _ in found), "".join(printed or "" for _, printed in found)
    if "nflows" in extras:
        yield "README", pages.doctests((pages.ROOT / "README.md").read_text()), None
    if "molecules" in extras:  # the rest takes long, and is run in tests/molecules
        first, prepared = (code for code, _ in pages.blocks(pages.path_of("molecule").read_text())[:2])
        yield "molecule", first + prepared, None


def test_the_programs_of_the_pages_run_with_the_wheel_alone(reader, extras, tmp_path):
    expected = {}
    for page, code, printed in programs(extras):
        folder = tmp_path / page
        folder.mkdir(parents=True)
        (folder / "program.py").write_text(code)
        expected[page] = printed
    if "molecule" in expected:  # which is to be had from its page
        pdb = pages.ROOT / "tests" / "data" / "molecules" / "proline_dipeptide.pdb"
        (tmp_path / "molecule" / pdb.name).write_bytes(pdb.read_bytes())
    assert {"start", "contract", "howto/resume"} <= set(expected)
    # In one process, since each would need seconds to import torch.
    run(reader, "-I", "-W", "ignore", RUNNER, *(tmp_path / page for page in expected), cwd=tmp_path)
    for page, printed in expected.items():
        found = (tmp_path / page / "printed.txt").read_text()
        if printed is not None:
            assert pages.without_progress(page, found) == printed, page


def test_a_program_that_fails_is_noticed(reader, tmp_path):
    (tmp_path / "program.py").write_text("import no_such_module")
    assert "no_such_module" in run(reader, "-I", RUNNER, tmp_path, cwd=tmp_path, succeeds=False)


def test_the_reader_has_the_wheel_and_no_checkout(reader, tmp_path):
    names = ("p4flows", "benchmarks", "tests", "pytest")
    code = f"import importlib.util as u; print(*(getattr(u.find_spec(name), 'origin', None) for name in {names}))"
    where, *others = run(reader, "-I", "-c", code, cwd=tmp_path).split()
    assert Path(where).is_relative_to(reader.parents[1])
    assert others == ["None", "None", "None"]

"""What is published: sdist, wheel and metadata; and a stranger's first steps with the wheel, torch and NumPy alone."""

import configparser
import email
import re
import sys
import zipfile
from pathlib import Path

import pytest
from building import ROOT, pip, run

from p4flows import __version__
from p4flows.installing import REPOSITORY

pytest.importorskip("setuptools", minversion="77.0.3")

PROGRAMS = sorted((Path(__file__).parent / "programs").glob("*.py"))
FOLDERS = ("p4flows", "tests", "benchmarks", "docs", "notebooks", ".ci", ".github")
FILES = (
    *("README.md", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "Makefile"),
    *("setup.py", "setup.cfg", "pyproject.toml", "constraints.txt", "constraints-numpy2.txt"),
)


def files(root, *folders):
    found = [path for folder in folders for path in (root / folder).rglob("*")]
    return {path.relative_to(root).as_posix() for path in found if path.is_file()}


def extras():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return {name: text.split() for name, text in parser["options.extras_require"].items()}


def packages(extra):
    """The names of all packages that an extra installs, through other extras of ours too."""
    for requirement in extras()[extra]:
        name, more = re.fullmatch(r"([\w-]+)(?:\[([\w,-]+)\])?.*", requirement).groups()
        if name == "p4flows":
            for each in more.split(","):
                yield from packages(each)
        else:
            yield name


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


# --- files ----------------------------------------------------------------------------------------------------------


def test_the_sdist_has_what_its_tests_need(checkout, sdist):
    expected = files(checkout, *FOLDERS) | set(FILES)
    assert len(expected) > 150
    assert expected - files(sdist, ".") == set()


def test_tests_run_in_the_sdist(sdist):
    tests = ["tests/benchmarks/test_commands.py", "tests/test_notebooks.py", "tests/layers/test_inputs.py"]
    options = ["-q", "-p", "no:cacheprovider", "-n", "0", "-k", "documents or committed or inputs"]
    output = run(sys.executable, "-m", "pytest", *options, *tests, cwd=sdist)
    assert int(re.search(r"(\d+) passed", output)[1]) > 10


def test_the_wheel_has_the_package_with_its_types_and_nothing_else(wheel, checkout):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert "p4flows/py.typed" in names
    assert names == files(checkout, "p4flows")


# --- metadata -------------------------------------------------------------------------------------------------------


def test_the_version_is_one(metadata):
    assert metadata["Version"] == __version__
    assert re.search(r"p4flows-([\d.]+)-py3", (ROOT / "docs" / "start.md").read_text())[1] == __version__
    assert re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1] == __version__
    assert re.findall(r"^## \[(\d.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0] == __version__


def test_the_address_is_one(metadata):
    urls = dict(line.split(", ") for line in metadata.get_all("Project-URL"))
    assert set(urls) >= {"Repository", "Documentation", "Changelog", "Issues"}
    assert all(url.startswith(REPOSITORY) for url in urls.values())
    assert f'repository-code: "{REPOSITORY}"' in (ROOT / "CITATION.cff").read_text()
    changelog = re.findall(r"^\[.*\]: (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert changelog
    assert all(url.startswith(REPOSITORY) for url in changelog)
    installs = re.findall(r"p4flows(?:\[\w+\])? @ git\+([^\s'\"]+)", (ROOT / "README.md").read_text())
    assert set(installs) == {REPOSITORY}


def test_license_typing_and_versions_of_python(metadata):
    assert metadata["License-Expression"] == "MIT"
    # Older versions leave it out without a word.
    assert 'requires = ["setuptools>=77.0.3"]' in (ROOT / "pyproject.toml").read_text()
    assert metadata["License-File"] == "LICENSE"
    classifiers = metadata.get_all("Classifier")
    assert "Typing :: Typed" in classifiers
    minors = [each.split()[-1] for each in classifiers if re.search(r":: 3\.\d+$", each)]
    assert metadata["Requires-Python"] == f">={minors[0]}"
    workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text()
    assert re.search(r"python: \[(.*)\]", workflow)[1].replace('"', "").split(", ") == minors
    assert len(metadata["Keywords"].split(",")) > 5


def test_an_index_would_take_what_is_required(metadata):
    """An index refuses requirements with an address."""
    requirements = metadata.get_all("Requires-Dist")
    assert not [each for each in requirements if "@" in each or "://" in each]
    assert sorted(re.match(r"\w+", each)[0] for each in requirements if "extra ==" not in each) == ["numpy", "torch"]


def test_what_development_installs_is_pinned():
    def pinned(*names):
        text = "".join((ROOT / name).read_text() for name in names)
        return {name.lower() for name in re.findall(r"^([\w-]+)==", text, re.MULTILINE)}

    assert set(packages("dev")) - pinned("constraints.txt") == set()
    assert set(packages("dev-numpy2")) - pinned("constraints.txt", "constraints-numpy2.txt") == set()


# --- the long description -------------------------------------------------------------------------------------------


def test_links_of_the_long_description_are_absolute_and_lead_somewhere(metadata):
    assert metadata["Description-Content-Type"] == "text/markdown"
    text = re.sub(r"^```.*?^```$", "", metadata.get_payload(), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^\s)]+)", text) + re.findall(r"^\[[^\]\n]+\]: +(\S+)", text, re.MULTILINE)
    targets += re.findall(r'(?:src|href)="([^"]+)"', text)
    assert len(targets) > 3
    assert [each for each in targets if not each.startswith("https://")] == []
    own = [each.removeprefix(REPOSITORY) for each in targets if each.startswith(REPOSITORY)]
    assert any(each.startswith("/raw/main/") and each.endswith(".png") for each in own)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    anchors = {"#" + re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for each in own:
        path = re.sub(r"^/(raw|blob)/main/", "", each).partition("#")[0]
        assert each in anchors if each.startswith("#") else (ROOT / path).exists(), each


# --- a stranger -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_a_program_runs_with_the_wheel_torch_and_numpy_alone(program, stranger, tmp_path):
    print(run(stranger, "-I", "-W", "error", program, cwd=tmp_path))


def test_the_stranger_has_the_wheel(stranger, tmp_path):
    code = "import p4flows, importlib.util as u; print(p4flows.__file__, u.find_spec('nflows'), u.find_spec('pytest'))"
    file, nflows, pytest_ = run(stranger, "-I", "-c", code, cwd=tmp_path).split()
    assert Path(file).is_relative_to(stranger.parents[1])
    assert (nflows, pytest_) == ("None", "None")


def test_what_the_errors_say_to_install_is_an_extra(stranger, tmp_path):
    """pip takes the installed p4flows, and needs no more than what the extra names."""
    (program,) = (path for path in PROGRAMS if path.stem == "plug_ins")
    said = set(re.findall(r"pip install 'p4flows\[(\w+)\]'", run(stranger, "-I", program, cwd=tmp_path)))
    assert said == {"nflows", "bgflow", "normflows", "zuko", "lightning", "molecules"}
    assert said <= set(extras())
    output = pip("install", "--no-index", "p4flows[nflows]", python=stranger, succeeds=False)
    assert re.search(r"No matching distribution found for (\w+)", output)[1] == "nflows", output

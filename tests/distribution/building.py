"""Builds in a copy of the repository, and environments with named packages and what they require alone."""

import os
import shutil
import subprocess
import sys
import tarfile
import venv
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
_NOT_COPIED = (
    *(".git", ".venv*", ".*_cache", ".hypothesis", "__pycache__", "*.egg-info"),
    *("build", "dist", "out", "_build", "tutorials"),
)


def run(*command, succeeds=True, cwd=None):
    """What a command prints. Nothing of this process' path leads it to a p4flows, and it takes one core."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, cwd=cwd)
    output = result.stdout + result.stderr
    assert (result.returncode == 0) == succeeds, output
    return output


def pip(*arguments, python=None, succeeds=True):
    """What pip of this environment prints, at work in that of another Python if one is given."""
    where = ["--python", python] if python else []
    return run(sys.executable, "-m", "pip", *where, "--disable-pip-version-check", *arguments, succeeds=succeeds)


def copy_repository(folder):
    """Without what an earlier build or run has left."""
    return shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*_NOT_COPIED))


def build_sdist(source, folder):
    """The sdist, unpacked."""
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", code, folder, cwd=source)
    (path,) = folder.iterdir()
    with tarfile.open(path) as archive:
        archive.extractall(folder)
    return folder / path.name.removesuffix(".tar.gz")


def build_wheel(source, folder):
    pip("wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", folder, source)
    (wheel,) = folder.iterdir()
    return wheel


def clean_environment(folder, *packages):
    """A new environment's Python, with torch, NumPy, these packages, what they all require, and nothing else.

    To install torch takes about a minute. So their files are links to those of the environment that this runs in, with
    their metadata, by which pip finds them installed.
    """
    venv.create(folder, symlinks=True)
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    site = site_of(python)
    for name in _closure(["torch", "numpy", *packages]):
        for top in {file.parts[0] for file in distribution(name).files} - {"..", "__pycache__"}:
            if not (site / top).exists():  # a folder may belong to several of them
                (site / top).symlink_to(distribution(name).locate_file(top))
    return python


def site_of(python):
    return Path(run(python, "-I", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())


def _closure(names):
    """The names of all that the packages require, through extras too, such as ``fsspec[http]``."""
    found, left = set(), [Requirement(name) for name in names]
    while left:
        needed = left.pop()
        key = needed.name.lower(), frozenset(needed.extras)
        if key not in found:
            found.add(key)
            for text in distribution(needed.name).requires or ():
                each = Requirement(text)
                if not each.marker or any(each.marker.evaluate({"extra": e}) for e in ("", *needed.extras)):
                    left.append(each)
    return {name for name, _ in found}

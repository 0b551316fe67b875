"""benchmarks/harness: what every benchmark stands on."""

import subprocess
from multiprocessing import active_children

import pytest
import torch

from benchmarks.harness import commit as commits
from benchmarks.harness.environment import environment, save
from benchmarks.harness.parts import part
from benchmarks.harness.pool import pool_of
from benchmarks.harness.readme import provenance
from benchmarks.harness.threads import one_thread


def test_parts_are_computed_once(tmp_path):
    count = []
    for settings in ({"a": 1}, {"a": 1}, {"a": 2}):
        assert part(tmp_path, settings, lambda s=settings: (count.append(0), {"b": s["a"]})[1]) == {"b": settings["a"]}
    assert len(count) == 2


# --- the commit of a result ---------------------------------------------------------------------------------


def git(folder, *arguments):
    names = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(["git", "-C", folder, *names, *arguments], check=True, capture_output=True, text=True).stdout


def test_the_commit_and_whether_files_differ_from_it(monkeypatch, tmp_path):
    root = tmp_path / "checkout"
    (root / "benchmarks" / "results").mkdir(parents=True)
    monkeypatch.setattr(commits, "_ROOT", root)
    commit = commits.commit.__wrapped__
    unknown = {"commit": "unknown", "dirty": None}
    assert commit() == unknown
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "--allow-empty", "-qm", "of something around it")
    assert commit() == unknown
    git(root, "init", "-q")
    assert commit() == unknown  # no commit yet
    (root / "code.py").touch()
    git(root, "add", ".")
    git(root, "commit", "-qm", "one")
    clean = {"commit": git(root, "rev-parse", "HEAD").strip(), "dirty": False}
    assert commit() == clean
    (root / "benchmarks" / "results" / "new.json").touch()
    assert commit() == clean
    (root / "code.py").write_text("changed")
    assert commit() == {**clean, "dirty": True}
    monkeypatch.setenv("PATH", "")
    assert commit() == unknown  # no git


def test_results_have_the_commit(tmp_path):
    assert {"commit", "dirty"} <= environment().keys()
    assert '"commit": "' in save("a", {"rows": []}, tmp_path).read_text()


def test_the_line_under_a_table_tells_the_commit_if_it_is_known():
    old = {"machine": {"cpu": "X", "cores": 2}, "versions": {"torch": "1", "numpy": "2"}, "date": "2026-01-01"}
    assert provenance(old) == "*X, 2 cores; torch 1, numpy 2; 2026-01-01.*"
    assert provenance({**old, "commit": "unknown", "dirty": None}) == provenance(old)
    commit = "0123456789abcdef0123456789abcdef01234567"
    clean = "*X, 2 cores; torch 1, numpy 2; commit 0123456789; 2026-01-01.*"
    assert provenance({**old, "commit": commit, "dirty": False}) == clean
    assert provenance({**old, "commit": commit, "dirty": True}) == clean.replace("789;", "789 with changes;")


# --- threads and processes ----------------------------------------------------------------------------------


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_one_thread():
    assert one_thread()(torch.get_num_threads)() == 1
    with pytest.raises(ValueError, match="inside"), one_thread():
        raise ValueError(f"inside {torch.get_num_threads()}")
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("threads", [None, 2])
def test_workers_have_one_thread_each_unless_told_otherwise(threads):
    with pool_of(1, **({} if threads is None else {"threads": threads})) as pool:
        assert pool.submit(torch.get_num_threads).result() == (threads or 1)
    assert not active_children()


class Threads(Exception):
    pass


class Arguments:
    """Tells what thread count a command has when it looks at its arguments."""

    def __getattr__(self, name):
        raise Threads(torch.get_num_threads())


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    "module",
    [
        *("paper.demo", "paper.linear", "paper.density2d", "paper.alanine_dipeptide"),
        *("numerics.drift", "mixing.swaps", "mixing.perturbation"),
    ],
)
def test_commands_for_narrow_networks_run_in_one_thread(module):
    module = pytest.importorskip(f"benchmarks.{module}", exc_type=ImportError)
    with pytest.raises(Threads, match=r"^1$"):
        module.run(Arguments())
    assert torch.get_num_threads() == 2

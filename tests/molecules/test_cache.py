"""What the cache of simulations holds, from Python and from the command line."""

import contextlib
import errno
import subprocess
import sys
import threading
from pathlib import Path

import pytest

pytest.importorskip("openmm")
pytest.importorskip("tqdm")

from p4flows.molecules import cached_simulations, clear_cache, simulate
from p4flows.molecules.__main__ import main
from p4flows.molecules.cache import is_in_use, remove, workplace


@pytest.fixture
def filled(molecule, tmp_path, in_threads):
    options = {"stride": 1, "equilibration": 0, "executor": in_threads, "cache": tmp_path, "progress": False}
    for frames in (3, 4):
        simulate(molecule, 300, frames, **options)
    other = tmp_path / "md" / "notes"
    other.mkdir()
    (other / "keep.txt").write_text("not ours")
    (tmp_path / "bgflow").mkdir()
    return tmp_path


def test_listing(filled):
    found = cached_simulations(filled)
    assert sorted(simulation.description["frames"] for simulation in found) == [3, 4]
    assert all(simulation.finished and simulation.size > 700 for simulation in found)
    four = next(simulation for simulation in found if simulation.description["frames"] == 4)
    assert str(four).startswith(four.key)
    assert "4 frames of 22 atoms at 300 K" in str(four)
    assert four.folder == filled / "md" / four.key
    assert cached_simulations(filled / "nowhere") == []


def test_what_is_older_or_interrupted_is_listed_too(filled):
    first, second = cached_simulations(filled)
    (first.folder / "about.json").unlink()
    (second.folder / "frames.npy").unlink()
    texts = [str(simulation) for simulation in cached_simulations(filled)]
    assert any(text.endswith("no description") for text in texts)
    assert any(text.endswith("interrupted") for text in texts)


def test_clearing(filled, molecule):
    first, second = cached_simulations(filled)
    with pytest.raises(ValueError, match="keys: expected some that cached_simulations lists, got 'md'"):
        clear_cache(filled, [first.key, "md"])
    assert len(cached_simulations(filled)) == 2
    assert clear_cache(filled, [first.key]) == ([first], [])
    assert cached_simulations(filled) == [second]
    removed, left = clear_cache(filled)
    assert (removed, left) == ([second], [])
    assert {path.name for path in filled.iterdir()} == {"md", "bgflow"}
    assert (filled / "md" / "notes" / "keep.txt").exists()


def test_a_running_simulation_is_left_alone(filled):
    first, second = cached_simulations(filled)
    ready, done = threading.Event(), threading.Event()

    def hold():
        with workplace(first.folder, lambda: None):
            ready.set()
            done.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    ready.wait(30)
    running = [simulation for simulation in cached_simulations(filled) if simulation.running]
    removed, left = clear_cache(filled)
    done.set()
    thread.join()
    assert [s.key for s in running] == [first.key]
    assert str(running[0]).endswith(", running")
    assert ([s.key for s in removed], [s.key for s in left]) == ([second.key], [first.key])
    assert first.folder.exists()


def test_who_waits_for_a_folder_that_is_removed_gets_a_new_one(tmp_path):
    """The lock of the old one is no lock of the folder any more: two processes would be in it at once."""
    folder = tmp_path / "place"
    with contextlib.ExitStack() as first:
        first.enter_context(workplace(folder, lambda: None))

        def leave_and_remove():
            first.close()
            assert remove(folder)

        with workplace(folder, leave_and_remove) as place:
            assert place == folder
            assert is_in_use(folder)
            assert not remove(folder)
            (place / "x").write_text("kept")
    assert (folder / "x").read_text() == "kept"
    assert not is_in_use(folder)
    assert remove(folder)
    assert remove(folder)
    assert not [*tmp_path.iterdir()]


def test_listing_while_files_come_and_go(filled, monkeypatch):
    """Temporary files are renamed while the folder is read."""
    (first, second), stat = cached_simulations(filled), Path.stat

    def vanishing(path, **options):
        if path.name == "frames.npy" and path.parent == first.folder:
            raise FileNotFoundError(errno.ENOENT, "gone", str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", vanishing)
    assert [simulation.key for simulation in cached_simulations(filled)] == [first.key, second.key]


def test_what_a_killed_clearing_left_is_removed(filled):
    (filled / "md" / "removed-0123abcd").mkdir()
    clear_cache(filled)
    assert [path.name for path in (filled / "md").iterdir()] == ["notes"]


def test_the_command_line(filled, capsys, monkeypatch):
    monkeypatch.setenv("P4FLOWS_CACHE", str(filled))
    main(["cache"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[-1] == f"2 simulations, 0.0 MB in {filled / 'md'}"
    key = lines[0].split()[0]
    main(["cache", "--clear", key])
    assert capsys.readouterr().out == "removed 1 simulation, 0.0 MB\n"
    with pytest.raises(SystemExit, match="keys: expected some that cached_simulations lists"):
        main(["cache", "--clear", key])
    command = [sys.executable, "-m", "p4flows.molecules", "cache", "--folder", str(filled), "--clear"]
    assert (
        subprocess.run(command, capture_output=True, text=True, check=True).stdout == "removed 1 simulation, 0.0 MB\n"
    )
    assert cached_simulations(filled) == []

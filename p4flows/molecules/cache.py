"""Files that several processes may want at once: each is either whole or not there, and one process writes them."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # the usual way to say that a module is not there

__all__ = ["is_in_use", "remove", "root", "save", "workplace"]


def root(cache: str | os.PathLike | None) -> Path:
    """The folder of the cache: the one given, that of the environment variable P4FLOWS_CACHE, or ~/.cache/p4flows."""
    return Path(cache or os.environ.get("P4FLOWS_CACHE") or Path.home() / ".cache" / "p4flows")


def save(path: Path, content: np.ndarray | bytes | dict) -> None:
    """Write a file that is either whole or not there, under a temporary name that no other process uses."""
    part = path.with_name(f"{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.part")
    try:
        with open(part, "wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            elif isinstance(content, dict):
                np.savez(file, **content)
            else:
                np.save(file, content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def workplace(folder: Path, wait: Callable[[], None]) -> Iterator[Path]:
    """A folder for intermediate files that nobody else writes to.

    It is ``folder`` itself, as soon as no other process or thread has it; ``wait`` is called once if there is a
    wait. The system releases the lock of a process that was killed. Where files cannot be locked, it is a new folder
    inside, which is removed at the end, so that every caller does the work for itself.
    """
    lock = _take(folder, wait)
    if lock is not None:
        with lock:
            try:
                yield folder
            finally:
                fcntl.flock(lock, fcntl.LOCK_UN)  # a forked process may have the file open for longer
        return
    private = Path(tempfile.mkdtemp(prefix="private-", dir=folder))
    try:
        yield private
    finally:
        shutil.rmtree(private, ignore_errors=True)


def is_in_use(folder: Path) -> bool:
    """Whether another process or thread has the folder as its :func:`workplace`; False where that cannot be known."""
    if fcntl is None or not (folder / "lock").exists():
        return False
    try:
        with open(folder / "lock", "a") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared, so that two who look do not see each other
    except BlockingIOError:
        return True
    except OSError:  # removed in between, or some network file systems
        return False
    return False


def remove(folder: Path) -> bool:
    """Remove a folder with all that is in it; False if another process or thread has it as its :func:`workplace`.

    Raises:
        OSError: for what cannot be removed.
    """
    with contextlib.ExitStack() as held:
        try:
            if fcntl is not None:
                file = held.enter_context(open(folder / "lock", "a"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except FileNotFoundError:  # somebody else was faster
            return True
        except OSError:  # some network file systems
            pass
        # All at once: whoever waits for the lock finds that it is not that of the folder any more.
        aside = folder.rename(folder.with_name(f"removed-{uuid.uuid4().hex[:8]}"))
    shutil.rmtree(aside)
    return True


def _take(folder: Path, wait: Callable[[], None]) -> IO | None:
    """The locked file of a folder, which is made if need be; None where files cannot be locked."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as held, contextlib.suppress(FileNotFoundError):
            file = held.enter_context(open(folder / "lock", "a"))
            if not _lock(file.fileno(), wait):
                return None
            # The folder may have been removed while we waited, and another one be there in its place.
            if os.path.samestat(os.fstat(file.fileno()), os.stat(folder / "lock")):
                held.pop_all()
                return file


def _lock(file: int, wait: Callable[[], None]) -> bool:
    """Whether the file is locked now; False where that is not possible."""
    if fcntl is None:
        return False
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            wait()
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:  # some network file systems
        return False
    return True

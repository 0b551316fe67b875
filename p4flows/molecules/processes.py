"""Processes that compute with OpenMM for this one: how they start, and what is said when they die."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

__all__ = ["check_started", "disinherit", "obituary", "spawn"]

_GUARD = (
    "a script that simulates, or that uses OpenMMEnergy with workers, is imported by each process that it starts, and "
    "needs `if __name__ == '__main__':` around what it runs"
)


def spawn(target: Callable[..., None], *arguments: Any) -> tuple[BaseProcess, Connection]:
    """Start ``target(connection, *arguments)`` in a new interpreter; the process and our end of the connection.

    Spawned, not forked: OpenMM's threads do not survive a fork. The arguments must be small, less than the 64 kB that
    a pipe holds. With more, the call would wait for the new interpreter to read them, and for ever if it dies before.
    What is larger can be sent through the connection, which tells if nobody is there any more.

    Raises:
        RuntimeError: as :func:`check_started`.
    """
    check_started()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def check_started() -> None:
    """RuntimeError in a process that cannot start others.

    It is itself being started, by a script that lacks the ``__main__`` guard, or it is a daemon, as the workers of a
    ``torch.utils.data.DataLoader`` are.
    """
    process = multiprocessing.current_process()
    if getattr(process, "_inheriting", False):
        raise RuntimeError(_GUARD)
    if process.daemon:
        raise RuntimeError(f"{process.name} is a daemonic process, which may not start others; use workers=0 in it")


def obituary(who: str, process: BaseProcess, started: bool) -> RuntimeError:
    """The error for a process that closed its connection; ``started`` if it ever sent anything."""
    if started:
        return RuntimeError(f"{who} died")
    process.join(1)
    return RuntimeError(f"{who} died while it started, with exit code {process.exitcode}; note that {_GUARD}")


def disinherit(process: BaseProcess) -> None:
    """After a fork, in the child: forget a process that the parent started.

    Otherwise the end of the child would terminate it, as the end of a process does with all daemons that it knows.
    """
    with contextlib.suppress(AttributeError):
        multiprocessing.process._children.discard(process)  # type: ignore[attr-defined]  # not public

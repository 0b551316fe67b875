"""Ctrl-C: one line, whatever runs."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import active_children
from multiprocessing.resource_tracker import ensure_running
from typing import Any

__all__ = ["interruptible"]

_EXIT_CODE = 128 + signal.SIGINT


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt in this process only, and ends it with one line and exit code 130.

    The line tells the message of the exception, if somebody gives it one on the way. A second Ctrl-C ends the process
    without waiting for anything.
    """
    with _kept_from_workers():
        try:
            yield
        except KeyboardInterrupt as error:
            for process in active_children():
                process.terminate()
            print("\ninterrupted" + (f": {error}" if str(error) else ""), file=sys.stderr)
            sys.exit(_EXIT_CODE)


@contextmanager
def _kept_from_workers() -> Iterator[None]:
    """A terminal sends SIGINT to workers too, wherever they were started, and each would print a traceback.

    So the signal is blocked, which threads and processes inherit that are started from here on. One thread waits for
    it, and hands it to the main thread under another name. Where there are no such signals (Windows), nothing changes.
    """
    if not hasattr(signal, "pthread_sigmask") or threading.current_thread() is not threading.main_thread():
        yield
        return
    main, finished = threading.get_ident(), threading.Event()

    def pass_on() -> None:
        while signal.sigwait({signal.SIGINT}) and not finished.is_set():
            signal.pthread_kill(main, signal.SIGUSR1)

    ensure_running()  # Python's tracker of shared memory; to start it later would unblock the signal
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    handler = signal.signal(signal.SIGUSR1, _interrupt)
    thread = threading.Thread(target=pass_on, daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        signal.pthread_kill(thread.ident, signal.SIGINT)
        thread.join()
        signal.signal(signal.SIGUSR1, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _interrupt(*_: Any) -> None:
    signal.signal(signal.SIGUSR1, lambda *_: os._exit(_EXIT_CODE))
    raise KeyboardInterrupt

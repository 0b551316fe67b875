"""Processes that train several networks at a time."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import active_children, get_context
from typing import Any

import torch

__all__ = ["pool_of"]


@contextmanager
def pool_of(jobs: int, threads: int = 1) -> Iterator[Executor]:
    """``jobs`` spawned processes with ``threads`` of torch each, one by default, which narrow networks want.

    Ctrl-C ends them, and the processes that they started, at once. Any other error lets those finish what they are at.
    """
    with ProcessPoolExecutor(jobs, get_context("spawn"), _start, (threads,)) as pool:
        try:
            yield pool
        except KeyboardInterrupt:
            # Python 3.11's own thread stumbles over futures that are cancelled when a process ends, and says so.
            hook, threading.excepthook = threading.excepthook, lambda _: None
            _terminate_children()
            pool.shutdown()
            threading.excepthook = hook
            raise
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _start(threads: int) -> None:
    torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, _end)


def _end(*_: Any) -> None:
    _terminate_children()
    os._exit(128 + signal.SIGTERM)


def _terminate_children() -> None:
    for process in active_children():
        process.terminate()

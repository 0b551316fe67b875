"""Who may use what holds an OpenMM context or processes: one thread at a time, in the process that made it."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar

__all__ = ["Deadline", "Owner", "Resource"]


class Deadline:
    """A point in time that several waits share; None seconds for never."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._end = None if seconds is None else time.monotonic() + seconds

    @property
    def left(self) -> float | None:
        """Seconds that are left, at least zero; None for no limit."""
        return None if self._end is None else max(self._end - time.monotonic(), 0)


class Resource(Protocol):
    """What an :class:`Owner` owns."""

    def close(self) -> None:
        """Give back what it holds."""

    def abandon(self) -> None:
        """Forget what it holds without touching it: it belongs to the process that this one was forked from."""


R = TypeVar("R", bound=Resource)


class Owner(Generic[R]):
    """Makes a resource on first use, and lends it to one thread at a time.

    An OpenMM context is not thread safe, and neither is a pipe to a worker. Nor do they survive a fork: a context of
    the CPU platform waits for threads that the child does not have, and two processes that read from one pipe take
    each other's answers. So a forked child abandons the resource that it inherited, and makes its own when it needs
    one. The lock is new as well, since another thread may have held it when the process forked.
    """

    def __init__(self, make: Callable[[], R]) -> None:
        self._make = make
        self._reset()
        _owners.add(self)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self.resource: R | None = None

    @contextlib.contextmanager
    def borrow(self, deadline: Deadline) -> Iterator[R]:
        """The resource, for this thread alone; it is closed if there is an error.

        Raises:
            RuntimeError: if other threads do not give it back before the deadline.
        """
        with self.exclusive(deadline):
            self.resource = self.resource or self._make()
            try:
                yield self.resource
            except BaseException:
                self._close()  # it may still be at work on what failed
                raise

    def close(self, deadline: Deadline) -> None:
        """Close the resource, if there is one, as soon as no thread uses it; the next use makes a new one."""
        with self.exclusive(deadline):
            self._close()

    def _close(self) -> None:
        resource, self.resource = self.resource, None
        if resource is not None:
            resource.close()

    @contextlib.contextmanager
    def exclusive(self, deadline: Deadline) -> Iterator[None]:
        """Keep other threads out, without the resource. Raises RuntimeError as :meth:`borrow` does."""
        lock, left = self._lock, deadline.left
        if not lock.acquire(timeout=-1 if left is None else min(left, threading.TIMEOUT_MAX)):
            raise RuntimeError(f"another thread did not finish with OpenMM within {deadline.seconds} s")
        try:
            yield
        finally:
            lock.release()

    def _after_fork(self) -> None:
        if self.resource is not None:
            self.resource.abandon()
        self._reset()


_owners: weakref.WeakSet[Owner] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for owner in list(_owners):
        owner._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)

"""Threads of torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["one_thread"]


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread of torch, for narrow networks; as a decorator for the time of a call.

    With few features there is nothing to share out, and threads wait for each other as soon as the machine does
    something else as well: at a load of 8 on two cores, a step of the demo took 142 ms with two threads and 31 ms
    with one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

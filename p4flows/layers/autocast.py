"""Whether autocast is on, also for tensors of devices that know of none."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

__all__ = ["autocasting", "without_autocast"]


def autocasting(x: Tensor) -> bool:
    """Whether operations on tensors like x are cast to half precision."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def without_autocast(x: Tensor) -> AbstractContextManager:
    """For determinants, which half precision would spoil."""
    return torch.autocast(x.device.type, enabled=False) if autocasting(x) else nullcontext()

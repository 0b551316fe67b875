"""What both directions of every layer say about a wrong input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from p4flows.layers.autocast import autocasting

__all__ = ["require_floating", "require_images", "require_rows"]


def require_floating(x: Any) -> None:
    """ValueError unless x is a floating-point tensor; it says what to do about the usual mistakes."""
    if isinstance(x, Tensor):
        if not x.is_floating_point():
            raise ValueError(f"input: expected a floating-point tensor, got one of {x.dtype}")
        return
    given, advice = type(x).__name__, ""
    if isinstance(x, tuple) and len(x) == 2 and all(isinstance(part, Tensor) for part in x):
        given = "a pair of tensors"
        advice = (
            ". Layers return (output, log|det|), so that torch.nn.Sequential cannot chain them: call one after the "
            "other and add up the log-determinants, or use p4flows.P4InvStack"
        )
    elif type(x).__module__.partition(".")[0] == "numpy":
        given, advice = f"numpy.{given}", "; torch.as_tensor makes one of it"
    raise ValueError(f"input: expected a floating-point tensor, got {given}{advice}")


def require_rows(x: Any, A: Tensor, leading: Sequence[int] = ()) -> None:
    """ValueError unless x is a tensor (*leading, ..., n) of the dtype and device of the layer's matrix A (..., n)."""
    n, lead = A.shape[-1], len(leading)
    _require_alike(x, A)
    if x.ndim <= lead or x.shape[-1] != n or x.shape[:lead] != torch.Size(leading):
        expected = ", ".join([*map(str, leading), "...", str(n)])
        raise ValueError(f"input: expected shape ({expected}), got {tuple(x.shape)}")


def require_images(x: Any, A: Tensor, channels: int) -> None:
    """ValueError unless x is a tensor (N, channels, H, W) or (channels, H, W) like the layer's matrix A."""
    _require_alike(x, A)
    if x.ndim not in (3, 4) or x.shape[-3] != channels:
        raise ValueError(f"input: expected shape (N, {channels}, H, W), got {tuple(x.shape)}")


def _require_alike(x: Any, A: Tensor) -> None:
    require_floating(x)
    if x.device != A.device:
        raise ValueError(f"input: expected device {A.device} as the layer's, got {x.device}")
    if x.dtype != A.dtype and not autocasting(x):
        raise ValueError(f"input: expected dtype {A.dtype} as the layer's, got {x.dtype}")

"""What both directions of every layer say about an input that is no floating-point tensor."""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["require_floating"]


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

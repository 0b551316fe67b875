"""Where to measure: the processor, or a GPU."""

from __future__ import annotations

import time
from argparse import ArgumentParser, ArgumentTypeError

import torch

__all__ = ["add_device", "now"]


def add_device(parser: ArgumentParser) -> None:
    """Add ``--device``, a torch.device in the arguments."""
    parser.add_argument("--device", type=_device, default="cpu", help="where to measure: cpu or cuda")


def now(device: torch.device) -> float:
    """Seconds, when all that the device was told to do is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _device(text: str) -> torch.device:
    if text == "cpu":
        return torch.device(text)
    try:
        device = torch.device(text)
        if device.type != "cuda":
            raise ValueError
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, ValueError):
        raise ArgumentTypeError(f"expected cpu, or cuda where torch sees a GPU, got {text!r}") from None
    return device

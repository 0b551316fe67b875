"""Layers as nflows and normflows call them: on rows, and with a context that is ignored."""

from __future__ import annotations

from torch import Tensor

__all__ = ["OnRows"]


class OnRows:
    """For a layer with ``forward`` and ``inverse`` that comes next in the order of resolution; mypy cannot know it."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The forward direction of rows (N, features), and its log|det| (N,)."""
        return super().forward(_rows(inputs))  # type: ignore[misc]

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The inverse direction of rows (N, features), and its log|det| (N,)."""
        return super().inverse(_rows(inputs))  # type: ignore[misc]


def _rows(inputs: Tensor) -> Tensor:
    if isinstance(inputs, Tensor) and inputs.ndim != 2:
        raise ValueError(f"inputs: expected shape (N, features), got {tuple(inputs.shape)}")
    return inputs

"""What became of merges: counts, and a warning where a training quietly learns nothing more."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from p4flows.outcomes import Correction, MergeOutcome

__all__ = ["Tally", "Warnings"]

_Names = tuple[str | None, ...]  # of layers; None for those that are not known

_COUNTED = {
    "merged": MergeOutcome.MERGED,
    "forced": MergeOutcome.FORCED,
    "partial": MergeOutcome.PARTIAL,
    "resets": MergeOutcome.RESET,
    "skipped_update": MergeOutcome.SKIPPED_UPDATE,
    "skipped_determinant": MergeOutcome.SKIPPED_DETERMINANT,
    "skipped_range": MergeOutcome.SKIPPED_RANGE,
    "skipped_not_finite": MergeOutcome.SKIPPED_NOT_FINITE,
}
_ROUNDS_BETWEEN_LOOKS = 100
_TOLERATED_SKIPS = 0.1


class Warnings:
    """Warnings that are given once each."""

    def __init__(self) -> None:
        self._given: set[str] = set()

    def __call__(self, message: str, key: str) -> None:
        if key not in self._given:
            self._given.add(key)
            warnings.warn(message, stacklevel=3)


class Tally:
    """Counts of outcomes and corrections; they are counted on the device and read only on demand."""

    def __init__(self, warn: Warnings) -> None:
        self._warn = warn
        self._outcomes: dict[tuple[_Names, torch.device], Tensor] = {}  # (len(names), outcomes)
        self._corrections = torch.zeros(len(Correction), dtype=torch.int64)
        self._rounds = 0
        self._looked_round = 0
        self._looked: dict[tuple[_Names, torch.device], Tensor] = {}  # the counts of each when they were looked at

    def count(self, outcomes: Tensor, names: _Names) -> None:
        """Count what became of merges of the layers of these names, (len(names), ...)."""
        size, device = len(MergeOutcome), outcomes.device
        counts = self._outcomes.get((names, device))
        if counts is None:
            zeros = torch.zeros(len(names), size, dtype=torch.int64, device=device)
            counts = self._outcomes[names, device] = zeros
        places = outcomes.reshape(len(names), -1) + torch.arange(0, counts.numel(), size, device=device)[:, None]
        counts.view(-1).index_add_(0, places.flatten(), torch.ones_like(places).flatten())
        if outcomes.device.type == "cpu" and (outcomes == MergeOutcome.SKIPPED_NOT_FINITE).any():
            self._warn_not_finite()

    def count_corrections(self, done: Tensor) -> None:
        """Count what corrections did."""
        self._corrections += torch.bincount(done.flatten().cpu(), minlength=len(Correction))

    def end_round(self) -> None:
        """Now and then, see whether merges are skipped: a training that quietly stops merging learns nothing more."""
        self._rounds += 1
        if self._rounds - self._looked_round < _ROUNDS_BETWEEN_LOOKS:
            return
        self._looked_round = self._rounds
        # Each kind of layer by itself: some that merge often must not hide others that never do.
        for key, counts in self._outcomes.items():
            now = counts.cpu().sum(0)
            since, self._looked[key] = now - self._looked.get(key, _zeros()), now
            found = _named(since)
            if found["skipped_not_finite"]:
                self._warn_not_finite()
            elif found["skipped"] > _TOLERATED_SKIPS * int(since.sum()):
                reasons = ", ".join(f"{name} {count}" for name, count in found.items() if "skipped_" in name and count)
                self._warn(
                    f"{found['skipped'] / int(since.sum()):.0%} of the last merges were skipped "
                    f"({reasons or 'no reason given'}), so that the layers hardly learn; the documentation of "
                    "MergeScheduler says what to do",
                    "skips",
                )

    @property
    def counters(self) -> dict[str, int]:
        """The counts, by name."""
        _, iterated, inverted = self._corrections.tolist()
        totals = sum((counts.cpu().sum(0) for counts in self._outcomes.values()), _zeros())
        return {**_named(totals), "corrections": iterated + inverted, "inversions": inverted}

    @property
    def by_layer(self) -> dict[str, dict[str, int]]:
        """The counts of outcomes that are not zero, by the name of the layer and their own."""
        rows: dict[str, Tensor] = defaultdict(_zeros)
        for (names, _), counts in self._outcomes.items():
            for name, row in zip(names, counts.cpu(), strict=True):
                if name is not None:
                    rows[name] = rows[name] + row
        return {name: {key: count for key, count in _named(row).items() if count} for name, row in rows.items()}

    def load(self, counters: Mapping[str, int], by_layer: Mapping[str, Mapping[str, int]]) -> None:
        """Go on from these counts, in total and by layer; those that are missing are zero."""
        inverted = counters.get("inversions", 0)
        self._corrections = torch.tensor([0, counters["corrections"] - inverted, inverted])
        total, rows = _numbered(counters), [_numbered(counts) for counts in by_layer.values()]
        names: _Names = (None, *by_layer)  # what is not told by layer is of none that is known
        self._outcomes = {(names, torch.device("cpu")): torch.stack([total - sum(rows, _zeros()), *rows])}
        self._looked_round, self._looked = self._rounds, {key: counts.sum(0) for key, counts in self._outcomes.items()}

    def _warn_not_finite(self) -> None:
        self._warn("a weight is not finite, and is not followed: the training has diverged", "finite")


def _zeros() -> Tensor:
    return torch.zeros(len(MergeOutcome), dtype=torch.int64)


def _named(outcomes: Tensor) -> dict[str, int]:
    """Counts (outcomes,) by name, and ``skipped``, for whatever reason."""
    counts = {name: int(outcomes[outcome]) for name, outcome in _COUNTED.items()}
    return {**counts, "skipped": int(outcomes[MergeOutcome.is_skip(torch.arange(len(MergeOutcome)))].sum())}


def _numbered(counts: Mapping[str, int]) -> Tensor:
    """What :func:`_named` has named."""
    outcomes = _zeros()
    for name, outcome in _COUNTED.items():
        outcomes[outcome] = counts.get(name, 0)
    with_reason = sum(counts.get(name, 0) for name in _COUNTED if "skip" in name)
    outcomes[MergeOutcome.SKIPPED] = counts.get("skipped", 0) - with_reason
    return outcomes
